"""Facts of the compiled update: collectives, temporaries, aliasing, bytes."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from ml_collections import ConfigDict

from configs import text
from flax_mechanic import (
  Optimizer,
  TrainState,
  add_optimizer_config,
  make_optimizer,
  mechanize,
)
from train.cost import facts, program
from train.cost.updates import UPDATES, base_copies
from train.job import make_job

pytestmark = pytest.mark.usefixtures("optimized")
MOVES = ("all-gather", "all-to-all", "collective-permute")


def compile_bare(tx, mesh):
  with jax.set_mesh(mesh):
    params = facts.MixedModel(mesh).params
    step = jax.jit(facts.update_step(tx), donate_argnums=(1, 2))
    compiled = step.lower(params, tx.init(params), params).compile()
  return facts.facts_of(compiled, facts.copy_bytes(params))


def compile_train_state(tx, mesh):
  with jax.set_mesh(mesh):
    params = facts.MixedModel(mesh).params
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(
      lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0
    )
    compiled = step.lower(state, params).compile()
  return facts.facts_of(compiled, facts.copy_bytes(params))


# The flag's options on every kind of mesh, and others where programs differ.
FLAGS = {"groups": ".*", "relative_s_init": 0.01, "mean_decay": True}


@pytest.mark.parametrize(
  ("axis_type", "compile_update", "options"),
  [
    (AxisType.Auto, facts.compile_optimizer, FLAGS),
    (AxisType.Auto, compile_train_state, FLAGS),
    (AxisType.Explicit, compile_bare, FLAGS),
    (AxisType.Explicit, facts.compile_optimizer, FLAGS),
    *(
      pytest.param(
        *(axis_type, compile_train_state, options), marks=pytest.mark.slow
      )
      for axis_type in (AxisType.Auto, AxisType.Explicit)
      for options in ({}, {"x0_dtype": "bfloat16"}, FLAGS)
      if (axis_type, options) != (AxisType.Auto, FLAGS)
    ),
  ],
)
def test_one_all_reduce_for_all_placements(axis_type, compile_update, options):
  tx = mechanize(optax.adamw(1.0), **options)
  found = compile_update(tx, facts.mixed_mesh(axis_type))
  assert found.collectives["all-reduce"] == 1
  assert not any(found.collectives[move] for move in MOVES)
  assert found.temporary < 0.1
  if "x0_dtype" not in options:
    # On a CPU adamw takes 10; 2 are the first step's, which copies x0, and 2
    # those of nnx.jit, which hands the gradient back.
    by_nnx = compile_update is facts.compile_optimizer
    assert found.accessed < (18.1 if by_nnx else 16.1)
  # The parameters, two moments and x0.
  assert found.aliased == pytest.approx(
    3.5 if "x0_dtype" in options else 4.0, abs=0.01
  )


def test_an_auto_mesh_that_nobody_names():
  tx = mechanize(optax.adamw(1.0))
  found = compile_bare(tx, facts.mixed_mesh(AxisType.Auto))
  assert not any(found.collectives[move] for move in MOVES)
  assert found.collectives["all-reduce"] <= 3  # Kinds that are split.
  assert found.aliased == pytest.approx(4.0, abs=0.01)


def test_parameters_made_under_jit_are_known_by_their_annotations():
  mesh = facts.mixed_mesh(AxisType.Auto)

  class Annotated(nnx.Module):
    def __init__(self):
      for name, (shape, spec) in facts.MIXED.items():
        value = jnp.ones(shape)
        setattr(self, name, nnx.Param(value, out_sharding=tuple(spec)))

  @nnx.jit
  def create():
    model = Annotated()
    return model, Optimizer(model, mechanize(optax.adamw(1.0)))

  with jax.set_mesh(mesh):
    model, optimizer = create()
    step = nnx.jit(
      lambda model, optimizer, grads: optimizer.update(model, grads) and None,
      donate_argnums=(0, 1),
    )
    lowered = step.lower(model, optimizer, nnx.state(model, nnx.Param))
    found = facts.facts_of(lowered.compile(), 1)
  assert found.collectives["all-reduce"] == 1
  assert not any(found.collectives[move] for move in MOVES)


# A step after the first on a v5e, without prefetches, reads and writes what it
# has to, and within a few scalars nothing else.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "base", "shapes"),
  [
    *(
      (name, "adamw", facts.SIX_MATRICES)
      for name in UPDATES
      if name != "optax's mechanize"
    ),
    ("mechanic", "adamw", facts.ONE_ARRAY),
    ("mechanize", "sgd", facts.SIX_MATRICES),
    ("mechanic", "lion", facts.SIX_MATRICES),
  ],
)
@pytest.mark.usefixtures("tpu_compiler")
def test_bytes_on_v5e(name, base, shapes):
  update = UPDATES[name]
  found = facts.compile_update(
    update.make(base), shapes, facts.v5e(), facts.NO_PREFETCH
  )
  unavoidable = base_copies(base) + update.unavoidable
  assert found.accessed == pytest.approx(unavoidable, abs=0.02)
  assert found.temporary < 0.01


# Also of methods whose state has a copy of the first parameters.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prodigy", "cocob", "dog"])
@pytest.mark.usefixtures("tpu_compiler")
def test_a_guard_reads_the_gradient_once_more(name):
  def accessed(guard):
    config = add_optimizer_config(ConfigDict({"learning_rate": 1.0}), name)
    config.guard = guard
    return facts.compile_update(
      make_optimizer(config),
      facts.SIX_MATRICES[:2],
      facts.v5e(),
      facts.NO_PREFETCH,
    ).accessed

  assert accessed(True) - accessed(False) < 1.02


@functools.cache
def job_collectives(name, base, **fields):
  """Returns what the text job's step on a mesh of 4x2 moves, by kind."""
  config = text.get_config("tiny")
  config.model.update(embed_dim=64, mlp_dim=128, num_layers=1)
  config.optimizer = name
  if base:
    config.opt[name].base = base
  config.mesh.update(data=1, fsdp=4, tensor=2)
  config.update(fields)
  job = make_job(config)
  with jax.set_mesh(job.mesh):
    lowered = job.train_step.lower(job.target, job.batch_target())
  return program.collectives(lowered.compile().as_text())


@pytest.mark.parametrize(
  ("name", "base", "shard_optimizer_state"),
  [
    ("mechanic", "adamw", False),
    ("mechanic", "adamw", True),
    ("adamw", None, True),
    ("prodigy", None, False),
    ("schedule_free", "adamw", False),
  ],
)
@pytest.mark.slow
def test_a_method_moves_numbers_alone(name, base, shard_optimizer_state):
  fields = {"shard_optimizer_state": shard_optimizer_state}
  alone = job_collectives("adamw", None, guard=False, **fields)
  found = job_collectives(name, base, **fields)
  for kind in (*MOVES, "reduce-scatter"):
    assert found[kind] == alone[kind]
  added = tuple(
    a - b for a, b in zip(found["all-reduce"], alone["all-reduce"], strict=True)
  )
  if name == "mechanic":
    # Five sums for each of a block's nine leaves and three more, in one.
    assert added == (1, 4 * 5 * (9 + 3))
  elif name in ("adamw", "schedule_free"):
    # The guard's sum for each leaf.
    assert added == (1, 4 * (9 + 3))
  else:
    # A number a leaf and sum; a CPU does not merge them all.
    assert added[1] < 512
