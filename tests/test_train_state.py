"""`TrainState` in the place of flax's class, which is the reference."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, serialization, struct
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import checkpoints, train_state
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mechanic
from flax_mechanic import UsageError
from tests import network
from tests.by_hand import build
from tests.test_adoption import save_standard


def make_class(base):
  class State(base):
    batch_stats: Any
    key: jax.Array
    name: str = struct.field(pytree_node=False)
    dynamic_scale: DynamicScale | None = None
    note: str = struct.field(pytree_node=False, default="none")

  class Job(State):
    ema: Any = None

  return Job


THEIRS = make_class(train_state.TrainState)
OURS = make_class(flax_mechanic.TrainState)
TX = optax.adam(0.01)


def create(cls, **fields):
  return cls.create(
    apply_fn=network.loss,
    **{
      "tx": TX,
      "params": network.params(),
      "batch_stats": {"mean": jnp.zeros(2)},
      "name": "job",
      "dynamic_scale": DynamicScale(scale=2.0**10),
      "key": jax.random.PRNGKey(0),
    }
    | fields,
  )


def step(state, inputs, targets, axis_name=None):
  """The shape of flax's imagenet example."""
  scale, is_finite, _, grads = state.dynamic_scale.value_and_grad(
    state.apply_fn, axis_name=axis_name
  )(state.params, inputs, targets)
  stats = {"mean": state.batch_stats["mean"] + jnp.mean(inputs)}
  new = state.apply_gradients(
    grads=grads, batch_stats=stats, dynamic_scale=scale
  )
  return new.replace(
    params=jax.tree.map(
      functools.partial(jnp.where, is_finite), new.params, state.params
    ),
    key=jax.random.split(state.key)[0],
  )


def trained(cls, steps=3):
  state, run = create(cls), jax.jit(step)
  for i in range(steps):
    state = run(state, *network.batch(i))
  return state


def assert_same(ours, theirs):
  """Asserts that leaves, their paths and their order are the same."""
  leaves = map(jax.tree_util.tree_leaves_with_path, (ours, theirs))
  for (path, mine), (name, other) in zip(*leaves, strict=True):
    assert jax.tree_util.keystr(path) == jax.tree_util.keystr(name)
    np.testing.assert_array_equal(mine, other)


def test_the_fields_of_a_subclass_are_those_it_has_in_flax():
  ours, theirs = trained(OURS), trained(THEIRS)
  assert_same(ours, theirs)
  assert (ours.name, ours.note, ours.ema) == ("job", "none", None)
  note, ema = "changed", jnp.ones(1)
  changed = [state.replace(note=note, ema=ema) for state in (ours, theirs)]
  assert_same(*changed)
  assert changed[0].note == note
  for cls in (OURS, THEIRS):
    with pytest.raises(TypeError, match=r"missing .* 'batch_stats'"):
      cls.create(apply_fn=None, params={}, tx=TX, name="", key=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stats'"):
      create(cls, stats=0)


def test_a_batch_in_the_place_of_the_loss_is_refused():
  with pytest.raises(UsageError, match=r"type state\.minimize\(loss_fn, batch"):
    create(OURS).minimize(jnp.ones(2), network.loss)


def test_flax_s_fields_are_positional():
  fields = 1, None, network.params(), TX, TX.init(network.params())
  for base in (flax_mechanic.TrainState, train_state.TrainState):
    assert base(*fields).opt_state is fields[-1]
  more = {"mean": jnp.zeros(2)}, jnp.ones(2), "job", None, "note", jnp.ones(2)
  assert_same(OURS(*fields, *more), THEIRS(*fields, *more))


def test_params_are_kept_as_they_are_given():
  params = {"a": 1, "b": 2.0}
  states = [create(cls, params=params) for cls in (OURS, THEIRS)]
  assert_same(*states)
  for state in states:
    assert state.params is params


@pytest.mark.parametrize(("source", "target"), [(OURS, THEIRS), (THEIRS, OURS)])
def test_what_either_class_serializes_the_other_restores(source, target):
  saved = trained(source)
  assert_same(
    serialization.to_state_dict(saved),
    serialization.to_state_dict(trained(target)),
  )
  restored = serialization.from_bytes(
    create(target), serialization.to_bytes(saved)
  )
  assert_same(restored, saved)
  go_on = lambda state: jax.jit(step)(state, *network.batch(3))
  assert_same(go_on(restored), go_on(saved))


@pytest.mark.parametrize(("source", "target"), [(OURS, THEIRS), (THEIRS, OURS)])
@pytest.mark.parametrize("fresh", [False, True])
def test_checkpoints_of_flax_go_from_one_class_to_the_other(
  tmp_path, source, target, fresh
):
  saved = create(source) if fresh else trained(source)
  checkpoints.save_checkpoint(tmp_path, saved, 3)
  restored = checkpoints.restore_checkpoint(tmp_path, create(target))
  assert isinstance(restored, target)
  assert_same(restored, saved)
  go_on = lambda state: jax.jit(step)(state, *network.batch(3))
  assert_same(go_on(restored), go_on(saved))


def test_a_replicated_state_trains_under_pmap():
  devices = jax.local_devices()[:2]
  run = jax.pmap(
    functools.partial(step, axis_name="batch"),
    axis_name="batch",
    devices=devices,
    donate_argnums=0,
  )
  states = []
  for cls in (OURS, THEIRS):
    state = jax_utils.replicate(create(cls), devices)
    for i in range(3):
      batch = [x.reshape(2, -1, *x.shape[1:]) for x in network.batch(i)]
      state = run(state, *batch)
    states.append(jax_utils.unreplicate(state))
  assert_same(*states)
  assert int(states[0].step) == 3


def test_minimize_keeps_the_fields_of_a_subclass():
  ours, theirs = (create(cls, dynamic_scale=None) for cls in (OURS, THEIRS))
  ours, loss = ours.minimize(network.loss, *network.batch(0))
  value, grads = jax.value_and_grad(network.loss)(
    theirs.params, *network.batch(0)
  )
  assert_same(ours, theirs.apply_gradients(grads=grads))
  assert loss == value


@pytest.mark.parametrize(
  "method", ["momo", pytest.param("sam", marks=pytest.mark.slow)]
)
def test_a_dynamic_scale_does_not_show(method):
  """A power of two is in no rounding, nor is a step that overflows kept."""

  def run(dynamic_scale, steps):
    state = create(OURS, tx=build(method), dynamic_scale=dynamic_scale)
    step = jax.jit(lambda state, *args: state.minimize(network.loss, *args))
    losses = []
    for i in steps:
      inputs, targets = network.batch(max(i, 0))
      before = state
      state, loss = step(state, inputs * (np.inf if i < 0 else 1.0), targets)
      if i < 0:
        assert_same(
          (state.params, state.opt_state), (before.params, before.opt_state)
        )
        scale = before.dynamic_scale.scale
        assert state.dynamic_scale.scale == scale / 2
      else:
        losses.append(loss)
    assert state.step == len(steps)
    return losses, state.params

  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  scaled = run(DynamicScale(scale=2.0**10), [-1, 0, 1, -1, 2])
  jax.tree.map(close, scaled, run(None, [0, 1, 2]))


def test_a_dynamic_scale_where_only_sam_s_second_gradient_overflows():
  def loss_fn(params):
    loss = jnp.sum(params["w"] ** 2)
    steep = lambda loss: loss * 2.0**120
    return jax.lax.cond(loss > 2.0, steep, lambda loss: loss, loss)

  state = create(OURS, tx=build("sam"), params={"w": jnp.ones(2)})
  after, loss = state.minimize(loss_fn)
  assert loss == 2.0
  assert_same((after.params, after.opt_state), (state.params, state.opt_state))
  assert after.dynamic_scale.scale == state.dynamic_scale.scale / 2
  assert after.dynamic_scale.fin_steps == 0


def test_a_dynamic_scale_is_refused_per_example():
  state = create(OURS, tx=build("dpsgd"))
  with pytest.raises(UsageError, match="does not go with a dynamic_scale"):
    state.minimize(network.loss, *network.batch(0))


class Fp8(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    dense = functools.partial(nn.Dense, dot_general_cls=nn.Fp8DotGeneralOp)
    return dense(1, name="head")(jnp.tanh(dense(16, name="hidden")(inputs)))


def create_fp8(cls, tx, sharding=None, **options):
  variables = Fp8().init(jax.random.key(0), network.batch(0)[0])
  variables = jax.device_put(variables, sharding)
  return cls.create(apply_fn=Fp8().apply, params=variables, tx=tx, **options)


def fp8_loss(variables, inputs, targets):
  return jnp.mean((Fp8().apply(variables, inputs) - targets) ** 2)


def test_fp8_s_statistics_are_overwritten_with_their_gradients():
  @jax.jit
  def by_gradients(state, *batch):
    loss, grads = jax.value_and_grad(fp8_loss)(state.params, *batch)
    return state.apply_gradients(grads=grads), loss

  minimize = jax.jit(lambda state, *batch: state.minimize(fp8_loss, *batch))
  runs = []
  for cls, run in [
    (train_state.TrainState, by_gradients),
    (flax_mechanic.TrainState, by_gradients),
    (flax_mechanic.TrainState, minimize),
  ]:
    state = create_fp8(cls, optax.adamw(0.01))
    for i in range(3):
      state, loss = run(state, *network.batch(i))
    runs.append((state, loss))
  for ours in runs[1:]:
    assert_same(ours, runs[0])
  history = jax.tree.leaves(runs[0][0].params[OVERWRITE_WITH_GRADIENT])
  assert any(np.any(leaf != 0) for leaf in history)


@pytest.mark.parametrize(
  "method", [pytest.param("sam", marks=pytest.mark.slow), "schedule_free"]
)
def test_fp8_s_statistics_with_methods_of_more_parameters(method):
  state = create_fp8(flax_mechanic.TrainState, build(method))
  after, _ = jax.jit(lambda state, *batch: state.minimize(fp8_loss, *batch))(
    state, *network.batch(0)
  )
  # Those of the first evaluation.
  grads = jax.grad(fp8_loss)(state.params, *network.batch(0))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    after.params[OVERWRITE_WITH_GRADIENT],
    grads[OVERWRITE_WITH_GRADIENT],
  )
  assert after.eval_params().keys() == state.params.keys()
  reanchored = after.replace(params=state.params).reanchor()
  assert_same(reanchored.opt_state, state.opt_state)


def test_fp8_s_statistics_leave_the_state_where_its_parameters_are():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  state = create_fp8(
    flax_mechanic.TrainState,
    optax.adam(0.01),
    NamedSharding(mesh, P()),
    shard_over=["data"],
  )
  for _ in range(2):
    trace = optax.tree.get(state.opt_state, "mu")["hidden"]["kernel"]
    assert trace.sharding.spec == P("data")
    state, _ = jax.jit(lambda state, *batch: state.minimize(fp8_loss, *batch))(
      state, *network.batch(0)
    )
  assert state.params["params"]["hidden"]["kernel"].sharding.spec == P()


def test_fp8_s_statistics_are_refused_per_example():
  state = create_fp8(flax_mechanic.TrainState, build("dpsgd"))
  with pytest.raises(UsageError, match="does not go with fp8's statistics"):
    state.minimize(fp8_loss, *network.batch(0))


def test_a_model_in_fp8_starts_from_another_s_checkpoint(tmp_path):
  state = create_fp8(flax_mechanic.TrainState, optax.adam(0.01))
  trained, _ = jax.jit(lambda state, *batch: state.minimize(fp8_loss, *batch))(
    state, *network.batch(0)
  )
  save_standard(tmp_path / "saved", trained)
  started, _ = state.init_from(tmp_path / "saved")
  adopted = started.params["params"], optax.tree.get(started.opt_state, "mu")
  assert_same(
    adopted, (trained.params["params"], optax.tree.get(trained.opt_state, "mu"))
  )
  kept = started.params[OVERWRITE_WITH_GRADIENT]
  assert_same(kept, state.params[OVERWRITE_WITH_GRADIENT])
