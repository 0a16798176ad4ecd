"""What is counted of programs, against programs one can count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.cost import program


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def compiled(f, mesh, *specs):
  shaped = [
    jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, s))
    for s in specs
  ]
  return jax.jit(f).lower(*shaped).compile().as_text()


def test_an_all_reduce_and_an_all_gather(mesh):
  whole = NamedSharding(mesh, P())
  add = lambda a, b: jax.lax.with_sharding_constraint(a @ b, whole)
  found = program.collectives(compiled(add, mesh, P(None, "x"), P("x", None)))
  assert found["all-reduce"] == (1, 64 * 64 * 4)
  assert found["all-gather"] == (0, 0)
  gather = lambda a: jax.lax.with_sharding_constraint(a, whole)
  found = program.collectives(compiled(gather, mesh, P("x", None)))
  assert found["all-gather"] == (1, 64 * 64 * 4)
  assert set(found) == set(program.KINDS)


def test_a_loop_counts_each_time_round(mesh):
  def loop(a, b):
    def body(x, _):
      def inner(x, _):
        return jnp.tanh(x @ b), None

      return jax.lax.scan(inner, x, None, length=3)[0], None

    return jax.lax.scan(body, a, None, length=5)[0]

  hlo = compiled(loop, mesh, P(None, "x"), P("x", None))
  found = program.collectives(hlo)
  assert found["all-reduce"] == (3 * 5, 3 * 5 * 64 * 64 * 4)


def test_parts_of_one_collective_count_once_and_started_ones_do():
  hlo = """HloModule m, entry_computation_layout={()->f32[8]}

%part (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7
}

%again (q: bf16[4,8]) -> bf16[16,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[16,8]{1,0} all-gather(%q), channel_id=7, dimensions={0}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=2
  %r = (f32[8]{0}, pred[]) all-reduce(%y, %z), channel_id=3, to_apply=%sum
}

%cond (t: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main () -> f32[8] {
  %f = bf16[16,8]{1,0} fusion(%a), kind=kLoop, calls=%part
  %g = bf16[16,8]{1,0} fusion(%a), kind=kLoop, calls=%again
  %w = (s32[], f32[8]{0}) while(%t0), condition=%cond, body=%body
  %p = (f32[4], f32[4]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%f)
  %to = f32[1,8]{1,0} all-to-all(%f), channel_id=1, dimensions={1}
  %fro = f32[8,1]{1,0} all-to-all(%to), channel_id=1, dimensions={0}
}
"""
  found = program.collectives(hlo)
  assert found["all-gather"] == (1 + 6, 16 * 8 * 2 + 6 * 32)
  assert found["all-reduce"] == (6, 6 * (32 + 1))
  assert found["collective-permute"] == (1, 16)
  assert found["all-to-all"] == (2, 2 * 32)


def test_matrix_products(mesh):
  a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
  flops = lambda f, *args: program.matmul_flops(jax.make_jaxpr(f)(*args))
  assert flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
  assert flops(jax.jit(jnp.matmul), a, b) == 2 * 3 * 4 * 5
  batched = jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))
  assert flops(jnp.matmul, *batched) == 7 * 2 * 3 * 4 * 5
  square = jnp.ones((4, 4))
  loop = lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=6)
  assert flops(loop, square) == 6 * 2 * 4**3
  choose = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)
  assert flops(choose, square) == 2 * 2 * 4**3
  rows = {"mesh": mesh, "in_specs": P("x"), "out_specs": P("x")}
  on_each = jax.shard_map(lambda x: x @ square, **rows)
  assert flops(on_each, jnp.ones((8, 4))) == 8 * 2 * 4**2
  loss = jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x)))
  assert flops(jax.grad(loss), square) == (2 + 2) * 2 * 4**3


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_as_xla_counts_them(groups):
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

  def f(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  counted = program.matmul_flops(jax.make_jaxpr(f)(x, kernel))
  xla = jax.jit(f).lower(x, kernel).cost_analysis()["flops"]
  assert counted == pytest.approx(xla)
  assert counted == 2 * 2 * 6 * 6 * 6 * 3 * 3 * 4 // groups


def test_a_transformer_s_matrix_products_are_xla_s_but_for_a_few():
  from configs import text
  from train.job import make_job

  config = text.get_config("tiny")
  config.mesh.data = 1
  job = make_job(config, jax.devices()[:1])
  with jax.set_mesh(job.mesh):
    traced = job.train_step.trace(job.target, job.batch_target())
    xla = traced.lower().cost_analysis()["flops"]
  counted = program.matmul_flops(traced.jaxpr)
  params = sum(np.size(x) for x in jax.tree.leaves(job.target["model"]))
  # Embeddings are looked up, and attention's own products come on top.
  tokens = 8 * 32
  assert 6 * tokens * (params - 256 * 32) < counted < xla
  assert counted > 0.8 * xla
