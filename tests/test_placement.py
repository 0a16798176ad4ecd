"""The state's placement: by contract for every method, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic import Optimizer, TrainState, mesh, sharding
from tests import network, optimizers

SPECS = {
  "hidden": {"kernel": P(None, "model"), "bias": P("model")},
  "head": P("model", None),
}
# With ZeRO-1: a dimension that the axis divides; the kernel's first, and the
# second of a bias and a head that are split by the model axis already.
SPLIT = {
  "hidden": {"kernel": P("data", "model"), "bias": P(("model", "data"))},
  "head": P(("model", "data"), None),
}
# One method of each way to keep a state; all the others are slow.
QUICK = ["mechanic", "adamw", "prodigy", "adafactor", "sam", "dpsgd"]
NAMES = [
  name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
  for name in optimizers.NAMES
]


# jit's own count of its cache also counts entries that compile nothing (keys
# among the arguments, jax 0.10).
_COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: _COMPILED.append(event)
)


def compilations():
  """Returns how many functions have been compiled so far."""
  return _COMPILED.count("/jax/core/compile/jaxpr_to_mlir_module_duration")


def make_mesh(axis_type):
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def make_tx(name):
  config = ConfigDict({"learning_rate": 1e-2})
  flax_mechanic.add_optimizer_config(config)
  config.optimizer = name
  return flax_mechanic.make_optimizer(config)


def place(tree, devices, specs=SPECS):
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(devices, spec)),
    tree,
    specs,
  )


def loss(params, inputs, targets, *, typed=False):
  """`network.loss`, saying how its products are sharded where types want it."""
  layer, head = params["hidden"], params["head"]
  if not typed:
    return network.loss(params, inputs, targets)
  hidden = jnp.tanh(
    jnp.einsum(
      "bi,ij->bj", inputs, layer["kernel"], out_sharding=P(None, "model")
    )
    + layer["bias"]
  )
  outputs = jnp.einsum("bi,ij->bj", hidden, head, out_sharding=P())
  return jnp.mean((outputs - targets) ** 2)


def check_state(state, params, specs):
  """Asserts that each leaf of a state lies by the contract."""
  shardings = sharding.Shardings.of(params)
  wanted = {
    sharding.leaf_path(path): spec
    for path, spec in jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda node: isinstance(node, P)
    )
  }
  shapes = {leaf.path: leaf.shape for leaf in shardings.leaves}
  devices = shardings.leaves[0].sharding.mesh
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    text = sharding.leaf_path(path)
    spec = next(
      (
        spec
        for name, spec in wanted.items()
        if f"/{name}/" in f"/{text}/" and shapes[name] == leaf.shape
      ),
      P(),
    )
    expected = NamedSharding(devices, spec)
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), text


@pytest.mark.parametrize("shard_over", [(), ("data",)])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_stays_where_it_belongs(name, axis_type, shard_over):
  tx, devices = make_tx(name), make_mesh(axis_type)
  specs = SPLIT if shard_over else SPECS
  typed = axis_type == AxisType.Explicit

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, inputs, targets):
    return state.minimize(functools.partial(loss, typed=typed), inputs, targets)

  with jax.set_mesh(devices):
    params = place(network.params(), devices)
    state = TrainState.create(
      apply_fn=None, params=params, tx=tx, shard_over=shard_over
    )
    check_state(state.opt_state, params, specs)
    promised = flax_mechanic.state_sharding(tx, params, shard_over=shard_over)
    equivalent = jax.tree.map(
      lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim),
      state.opt_state,
      promised,
    )
    assert all(jax.tree.leaves(equivalent))
    losses, compiled = [], []
    for batch in [network.batch(i) for i in range(3)]:
      before = compilations()
      state, value = step(state, *batch)
      compiled.append(compilations() - before)
      losses.append(float(value))
    assert compiled == [1, 0, 0]
    check_state(state.opt_state, state.params, specs)
    check_state(state.params, state.params, SPECS)

  one = TrainState.create(apply_fn=None, params=network.params(), tx=tx)
  for i in range(3):
    one, value = jax.jit(lambda s, *b: s.minimize(loss, *b))(
      one, *network.batch(i)
    )
    assert losses[i] == pytest.approx(float(value), rel=1e-5)


class Model(nnx.Module):
  def __init__(self, annotated):
    params = network.params()
    specs = {"kernel": SPECS["hidden"]["kernel"], "head": SPECS["head"]}
    for name, value in (
      ("kernel", params["hidden"]["kernel"]),
      ("head", params["head"]),
    ):
      metadata = {"out_sharding": tuple(specs[name])} if annotated else {}
      setattr(self, name, nnx.Param(value, **metadata))


@pytest.mark.parametrize("shard_over", [(), ("data",)])
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_nnx_annotated_or_not_eager_or_jitted(
  axis_type, annotated, jitted, shard_over
):
  devices, tx = make_mesh(axis_type), make_tx("mechanic")
  specs = {
    "kernel": (SPLIT if shard_over else SPECS)["hidden"]["kernel"],
    "head": (SPLIT if shard_over else SPECS)["head"],
  }

  def make_model():
    model = Model(annotated)
    if not annotated:
      place_one = jax.device_put
      if jitted and axis_type == AxisType.Explicit:
        place_one = jax.sharding.reshard
      elif jitted:
        place_one = jax.lax.with_sharding_constraint
      for name, spec in (
        ("kernel", SPECS["hidden"]["kernel"]),
        ("head", SPECS["head"]),
      ):
        variable = getattr(model, name)
        variable.set_value(
          place_one(variable.get_value(), NamedSharding(devices, spec))
        )
    return model

  def create():
    model = make_model()
    return model, Optimizer(model, tx, shard_over=shard_over)

  with jax.set_mesh(devices):
    model, optimizer = nnx.jit(create)() if jitted else create()
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    if jitted and not annotated and axis_type == AxisType.Auto:
      # Nothing says where the parameters lie, and so nothing is promised.
      assert not optimizer.shardings.leaves
      optimizer.update(model, nnx.state(model, nnx.Param))
      return
    check_state(nnx.as_pure(optimizer.opt_state), params, specs)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer):
      grads = jax.tree.map(lambda x: 0.1 * x, nnx.state(model, nnx.Param))
      optimizer.update(model, grads)

    for _ in range(3):
      step(model, optimizer)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    check_state(nnx.as_pure(optimizer.opt_state), params, specs)
    own = {"kernel": SPECS["hidden"]["kernel"], "head": SPECS["head"]}
    check_state(params, params, own)
  # Outside of the mesh's context, compiled and not.
  step(model, optimizer)
  grads = jax.tree.map(lambda x: 0.1 * x, nnx.state(model, nnx.Param))
  optimizer.update(model, grads)
  optimizer.reanchor(model)
  params = nnx.as_pure(nnx.state(model, nnx.Param))
  check_state(nnx.as_pure(optimizer.opt_state), params, specs)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_model_that_is_annotated_in_part_compiles_once(axis_type):
  class Partly(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.ones((8, 4)), out_sharding=("model", None))
      self.bias = nnx.Param(jnp.ones(4))

  with jax.set_mesh(make_mesh(axis_type)):
    model = Partly()
    optimizer = Optimizer(model, make_tx("mechanic"))
    graphdef, state = nnx.split((model, optimizer))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
      model, optimizer = nnx.merge(graphdef, state)
      grads = jax.tree.map(lambda x: 0.1 * x, nnx.state(model, nnx.Param))
      optimizer.update(model, grads)
      return nnx.state((model, optimizer))

    for _ in range(3):
      state = step(state)
  assert step._cache_size() == 1


@pytest.mark.parametrize(
  ("shape", "spec", "axes", "wanted"),
  [
    ((8, 8), P(None, None), ["data"], P("data", None)),
    ((3, 8), P(None, None), ["data"], P(None, "data")),
    ((8, 8), P("model", None), ["data"], P(("model", "data"), None)),
    ((4, 8), P("model", None), ["data"], P("model", "data")),
    ((8, 8), P("data", None), ["data"], P("data", None)),
    ((8,), P(), ["data", "model"], P(("data", "model"))),
    ((3, 5), P(None, None), ["data"], P(None, None)),
    ((8, 8), P(None, None), ["absent"], P(None, None)),
    ((), P(), ["data"], P()),
  ],
)
def test_split_over(shape, spec, axes, wanted):
  devices = make_mesh(AxisType.Auto)
  leaf = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(devices, spec)
  )
  (split,) = sharding.Shardings.of([leaf]).split_over(axes).leaves
  assert split.sharding.is_equivalent_to(
    NamedSharding(devices, wanted), len(shape)
  )


def test_a_tree_on_one_device_is_on_no_mesh():
  shardings = flax_mechanic.state_sharding(
    optax.adam(0.1), network.params(), shard_over=["data"]
  )
  assert not jax.tree.leaves(shardings)


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw", "momo_adam"])
def test_no_leaf_is_gathered_for_an_inner_product(name):
  devices = make_mesh(AxisType.Auto)
  specs = {"hidden": {"kernel": P("data", "model"), "bias": P()}, "head": P()}
  with jax.set_mesh(devices):
    params = place(network.params(), devices, specs)
    tx = make_tx(name)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
    lowered = update.lower(params, tx.init(params), params)
    assert "all-gather" not in lowered.compile().as_text()


def test_the_work_around_of_vdot_is_needed_and_leaves_nothing_behind():
  # Once this fails, `_vdot_without_ravel` can go.
  assert mesh.optax_ravels()
  original = optax.tree_utils._tree_math._vdot
  with mesh._vdot_without_ravel():
    a = np.array([[1 + 2j, 3], [4, 5j]], np.complex64)
    b = np.array([[1, 2j], [3, 4 + 1j]], np.complex64)
    np.testing.assert_allclose(optax.tree.vdot(a, b), np.vdot(a, b), rtol=1e-6)
    assert optax.tree_utils._tree_math._vdot is not original
  assert optax.tree_utils._tree_math._vdot is original
