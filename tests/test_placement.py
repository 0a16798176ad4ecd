"""The state's placement: by contract for every method, on every mesh."""

import functools
import itertools

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
from flax_mechanic import Optimizer, TrainState, placement
from flax_mechanic.methods import repairs
from flax_mechanic.paths import leaf_path
from tests import network, optimizers
from tests.compilations import compilations
from train.cost.facts import mixed_mesh

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
# One method of each way to keep a state; the others are slow.
QUICK = ["mechanic", "prodigy", "adafactor", "dpsgd"]
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
SHARD_OVER = [(), ("data",)]


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
  shardings = placement.Shardings.of(params)
  wanted = {
    leaf_path(path): spec
    for path, spec in jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda node: isinstance(node, P)
    )
  }
  shapes = {leaf.path: leaf.shape for leaf in shardings.leaves}
  devices = shardings.leaves[0].sharding.mesh
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    text = leaf_path(path)
    spec = next(
      (
        spec
        for name, spec in wanted.items()
        if f"/{name}/" in f"/{text}/" and shapes[name] == leaf.shape
      ),
      P(),
    )
    expected = NamedSharding(
      devices, spec, memory_kind=leaf.sharding.memory_kind
    )
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), text


def train_state_cases():
  """Yields every combination for mechanic, and one for each other step.

  Where a leaf is placed does not depend on the API, and `cases` has every kind.
  """
  for i, name in enumerate(optimizers.KINDS):
    if name == "mechanic":
      for axis_type, shard_over in itertools.product(AXIS_TYPES, SHARD_OVER):
        quick = (axis_type == AxisType.Auto) == bool(shard_over)
        yield pytest.param(
          *(name, axis_type, shard_over),
          marks=() if quick else pytest.mark.slow,
        )
    elif name in optimizers.STEPS or name == "prodigy":
      yield pytest.param(
        *(name, AXIS_TYPES[i % 2], SHARD_OVER[i // 2 % 2]),
        marks=() if name == "prodigy" else pytest.mark.slow,
      )


@pytest.mark.parametrize(
  ("name", "axis_type", "shard_over"), train_state_cases()
)
def test_train_state_stays_where_it_belongs(name, axis_type, shard_over):
  tx, devices = make_tx(name), mixed_mesh(axis_type)
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
    losses, compiled = [], []
    for batch in [network.batch(i) for i in range(3)]:
      before = compilations()
      state, value = step(state, *batch)
      compiled.append(compilations() - before)
      losses.append(float(value))
    assert compiled == [1, 0, 0]
    check_state(state.opt_state, state.params, specs)
    check_state(state.params, state.params, SPECS)
  assert losses == pytest.approx(losses_of_one_device(name), rel=1e-5)


class Model(nnx.Module):
  """`network`'s parameters on a mesh, which annotations say or not."""

  def __init__(self, place, annotated):
    params = network.params()
    self.hidden = nnx.Dict(
      {
        name: self._make(params["hidden"][name], spec, place, annotated)
        for name, spec in SPECS["hidden"].items()
      }
    )
    self.head = self._make(params["head"], SPECS["head"], place, annotated)

  def _make(self, value, spec, place, annotated):
    if annotated:
      return nnx.Param(value, out_sharding=tuple(spec))
    return nnx.Param(place(value, spec))


def cases():
  """Yields every combination for mechanic, and two for each other kind.

  Those are on either type of axes: one with each way in which the placement is
  known, in turns, and one with the state split further and in host memory. Of
  mechanic's, the half is quick that has every combination of three causes.
  """
  ways = list(itertools.product([True, False], [True, False]))
  for i, name in enumerate(optimizers.DISTINCT):
    known = [(AXIS_TYPES[(i + 1) % 2], *ways[i // 2 % 4], ())]
    split = [(AXIS_TYPES[i % 2], True, True, ("data",))]
    if name == "mechanic":
      known = [
        (axis_type, *way, shard_over)
        for axis_type, shard_over in itertools.product(AXIS_TYPES, SHARD_OVER)
        for way in ways
      ]
      split = [(axis_type, True, True, ("data",)) for axis_type in AXIS_TYPES]
    for offload, each in ((False, known), (True, split)):
      for axis_type, annotated, jitted, shard_over in each:
        causes = (
          axis_type == AxisType.Auto,
          annotated,
          jitted,
          shard_over != (),
        )
        quick = name in QUICK and offload
        quick |= name == "mechanic" and sum(causes) % 2 == 0
        yield pytest.param(
          *(name, axis_type, annotated, jitted, shard_over, offload),
          marks=() if quick else pytest.mark.slow,
        )


@functools.cache
def losses_of_one_device(name):
  tx = make_tx(name)
  state = TrainState.create(apply_fn=None, params=network.params(), tx=tx)
  step, losses = jax.jit(lambda s, *b: s.minimize(loss, *b)), []
  for i in range(3):
    state, value = step(state, *network.batch(i))
    losses.append(float(value))
  return losses


@pytest.mark.parametrize(
  ("name", "axis_type", "annotated", "jitted", "shard_over", "offload"),
  cases(),
)
def test_every_leaf_stays_where_it_belongs(
  name, axis_type, annotated, jitted, shard_over, offload
):
  devices, tx = mixed_mesh(axis_type), make_tx(name)
  typed = axis_type == AxisType.Explicit
  specs = SPLIT if shard_over else SPECS

  def place_one(value, spec):
    if not jitted:
      return jax.device_put(value, NamedSharding(devices, spec))
    if typed:
      return jax.sharding.reshard(value, spec)
    return jax.lax.with_sharding_constraint(value, spec)

  shardings = None
  if jitted and not annotated and not typed:
    # Nothing in the trace says where these parameters lie.
    shardings = placement.Shardings.of(place(network.params(), devices))

  def create():
    model = Model(place_one, annotated)
    optimizer = Optimizer(
      model, tx, shard_over=shard_over, offload=offload, shardings=shardings
    )
    return model, optimizer

  def check(model, optimizer):
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    check_state(params, params, SPECS)
    opt_state = nnx.as_pure(optimizer.opt_state)
    check_state(opt_state, params, specs)
    promised = flax_mechanic.state_sharding(
      tx, params, shard_over=shard_over, offload=offload
    )
    for leaf, lies in zip(
      jax.tree.leaves(opt_state), jax.tree.leaves(promised), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(lies, leaf.ndim)
      assert leaf.sharding.memory_kind == lies.memory_kind
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(opt_state)}
    kept = {leaf.shape for leaf in jax.tree.leaves(opt_state)}
    shaped = not kept.isdisjoint(x.shape for x in jax.tree.leaves(params))
    assert ("pinned_host" in kinds) == (offload and shaped)

  def pure_loss(model, inputs, targets):
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    return loss(params, inputs, targets, typed=typed)

  with jax.set_mesh(devices):
    model, optimizer = nnx.jit(create)() if jitted else create()
    check(model, optimizer)
    graphdef, state = nnx.split((model, optimizer))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, inputs, targets):
      model, optimizer = nnx.merge(graphdef, state)
      value = optimizer.minimize(model, pure_loss, inputs, targets)
      return nnx.state((model, optimizer)), value

    losses, compiled = [], []
    for batch in [network.batch(i) for i in range(3)]:
      before, old = compilations(), state
      state, value = step(state, *batch)
      compiled.append(compilations() - before)
      losses.append(float(value))
      kept = [leaf for leaf in jax.tree.leaves(old) if not leaf.is_deleted()]
      assert all(leaf.size <= 1 for leaf in kept)
    assert compiled == [1, 0, 0]
    check(*nnx.merge(graphdef, state))
  assert losses == pytest.approx(losses_of_one_device(name), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_outside_of_the_mesh_s_context(axis_type):
  devices = mixed_mesh(axis_type)
  with jax.set_mesh(devices):
    model = nnx.jit(lambda: Model(None, annotated=True))()
    optimizer = Optimizer(model, make_tx("mechanic"), shard_over=["data"])

  def update(model, optimizer):
    grads = jax.tree.map(lambda x: 0.1 * x, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)

  nnx.jit(update, donate_argnums=(0, 1))(model, optimizer)
  update(model, optimizer)
  optimizer.reanchor(model)
  params = nnx.as_pure(nnx.state(model, nnx.Param))
  check_state(nnx.as_pure(optimizer.opt_state), params, SPLIT)
  check_state(params, params, SPECS)


def test_where_nothing_is_known_nothing_is_promised():
  devices = mixed_mesh(AxisType.Auto)

  def create():
    lay = jax.lax.with_sharding_constraint
    model = Model(lay, annotated=False)
    return model, Optimizer(model, make_tx("mechanic"), shard_over=["data"])

  with jax.set_mesh(devices):
    model, optimizer = nnx.jit(create)()
    assert not optimizer.shardings.by_path

    @nnx.jit
    def update(model, optimizer):
      optimizer.update(model, nnx.state(model, nnx.Param))

    update(model, optimizer)


def test_an_annotated_scalar_is_known():
  def create():
    scale = nnx.Param(jnp.ones(()), out_sharding=(), eager_sharding=False)
    model = nnx.Dict({"scale": scale})
    return model, Optimizer(model, make_tx("mechanic"))

  with jax.set_mesh(mixed_mesh(AxisType.Auto)):
    _, optimizer = nnx.jit(create)()
  assert list(optimizer.shardings.by_path) == ["scale"]


@pytest.mark.parametrize(
  ("axis_type", "jitted", "own"),
  [
    (AxisType.Auto, True, {}),
    (AxisType.Auto, False, {"out_sharding": (None, "model")}),
    (AxisType.Explicit, True, {"out_sharding": (None, "model")}),
  ],
)
def test_an_annotation_of_the_state_is_as_in_flax(axis_type, jitted, own):
  def create(make):
    split = ("data", None)
    w = nnx.Param(jnp.ones((8, 4)), optimizer_sharding=split, **own)
    model = nnx.Dict({"w": w})
    return model, make(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

  made = nnx.jit(create, static_argnums=0) if jitted else create
  place = lambda variable: variable.get_value().sharding
  of_state = lambda optimizer: place(optimizer.opt_state[0].trace["w"])
  with jax.set_mesh(mixed_mesh(axis_type)):
    (model, optimizer), (_, flax_s) = made(Optimizer), made(nnx.Optimizer)
    wanted, before = of_state(flax_s), place(model["w"])
    assert wanted.spec[0] == "data"
    assert of_state(optimizer).is_equivalent_to(wanted, 2)
    if own:
      optimizer.update(model, nnx.state(model, nnx.Param))
      assert of_state(optimizer).is_equivalent_to(wanted, 2)
      assert place(model["w"]).is_equivalent_to(before, 2)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Optimizer, TrainState])
def test_offloads_from_one_device_too(make):
  params, tx = {"w": jnp.ones((4, 3))}, make_tx("mechanic")
  if make is Optimizer:
    model = nnx.Dict({"w": nnx.Param(params["w"])})
    optimizer = Optimizer(model, tx, offload=True)
    for _ in range(2):
      optimizer.minimize(model, lambda model: jnp.sum(model.w**2))
    optimizer.eval_model(model)
    state = nnx.as_pure(optimizer.opt_state)
  else:
    created = TrainState.create(
      apply_fn=None, params=params, tx=tx, offload=True
    )
    created, _ = created.minimize(lambda params: jnp.sum(params["w"] ** 2))
    created = created.apply_gradients(grads=created.params)
    created.eval_params()
    state = created.opt_state
  for leaf in jax.tree.leaves(state):
    kind = "pinned_host" if leaf.shape == (4, 3) else "device"
    assert leaf.sharding.memory_kind == kind
  flax_mechanic.scalars(state)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_model_that_is_annotated_in_part_compiles_once(axis_type):
  class Partly(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.ones((8, 4)), out_sharding=("model", None))
      self.bias = nnx.Param(jnp.ones(4))

  with jax.set_mesh(mixed_mesh(axis_type)):
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


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", ["dog", "schedule_free"])
def test_what_is_evaluated_is_placed_as_what_is_trained(axis_type, name):
  mesh = mixed_mesh(axis_type)
  with jax.set_mesh(mesh):
    spec = NamedSharding(mesh, P("model", None))
    params = {"w": jax.device_put(jnp.eye(8), spec)}
    loss = lambda params: jnp.sum((params["w"] - 2) ** 2)
    whole, split = (
      TrainState.create(
        apply_fn=None, params=params, tx=make_tx(name), shard_over=axes
      ).minimize(loss)[0]
      for axes in SHARD_OVER
    )
    expected, evaluated = whole.eval_params()["w"], split.eval_params()["w"]
    assert evaluated.sharding == split.params["w"].sharding
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)
    model = nnx.Dict({"w": nnx.Param(params["w"])})
    optimizer = Optimizer(model, make_tx(name), shard_over=["data"])
    optimizer.minimize(model, lambda model: jnp.sum((model["w"] - 2) ** 2))
    evaluated = optimizer.eval_model(model)["w"].get_value()
    assert evaluated.sharding == model["w"].get_value().sharding
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)


def test_axes_of_both_types_are_the_partitioner_s():
  mesh = jax.make_mesh(
    (4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit, AxisType.Auto)
  )
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data")))
    w = jax.device_put(jnp.eye(8), NamedSharding(mesh, P(None, "tensor")))
    state = TrainState.create(
      apply_fn=None, params={"w": w}, tx=make_tx("mechanic")
    )
    loss = lambda params: jnp.sum((x @ params["w"]) ** 2)
    step = jax.jit(lambda state: state.minimize(loss))
    state, _ = step(state)
  assert state.params["w"].sharding.is_equivalent_to(w.sharding, 2)


@pytest.mark.parametrize("offload", [False, True])
def test_a_state_of_shapes_says_where_the_arrays_will_be(offload):
  sharding = NamedSharding(mixed_mesh(AxisType.Auto), P(None, "model"))
  w = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
  tx = make_tx("mechanic")
  state = TrainState.create(
    apply_fn=None, params={"w": w}, tx=tx, offload=offload
  )
  wanted = placement.state_sharding(tx, {"w": w}, offload=offload)
  assert jax.tree.map(lambda x: x.sharding, state.opt_state) == wanted


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
    ((0, 8), P(None, None), ["data"], P(None, "data")),
    ((), P(), ["data"], P()),
  ],
)
def test_split_over(shape, spec, axes, wanted):
  devices = mixed_mesh(AxisType.Auto)
  leaf = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(devices, spec)
  )
  (split,) = placement.Shardings.of([leaf]).split_over(axes).leaves
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
  devices = mixed_mesh(AxisType.Auto)
  specs = {"hidden": {"kernel": P("data", "model"), "bias": P()}, "head": P()}
  with jax.set_mesh(devices):
    params = place(network.params(), devices, specs)
    tx = make_tx(name)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
    lowered = update.lower(params, tx.init(params), params)
    assert "all-gather" not in lowered.compile().as_text()


def test_the_work_around_of_vdot_is_needed_and_leaves_nothing_behind():
  # Once this fails, `_vdot_without_ravel` can go.
  assert repairs.optax_ravels()
  original = optax.tree_utils._tree_math._vdot
  with repairs._vdot_without_ravel():
    a = np.array([[1 + 2j, 3], [4, 5j]], np.complex64)
    b = np.array([[1, 2j], [3, 4 + 1j]], np.complex64)
    np.testing.assert_allclose(optax.tree.vdot(a, b), np.vdot(a, b), rtol=1e-6)
    assert optax.tree_utils._tree_math._vdot is not original
  assert optax.tree_utils._tree_math._vdot is original


def test_of_parameters_on_two_meshes_nothing_is_known():
  def on(devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    return jax.device_put(jnp.ones(4), NamedSharding(mesh, P("data")))

  one, other = on(jax.devices()[:2]), on(jax.devices()[2:4])
  known = placement.Shardings.of({"a": one, "b": one}).by_path
  assert list(known) == ["a", "b"]
  assert not placement.Shardings.of({"a": one, "b": other}).by_path
