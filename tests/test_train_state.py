"""`TrainState` in the place of flax's class, which is the reference."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, serialization, struct
from flax.training import checkpoints, train_state
from flax.training.dynamic_scale import DynamicScale

import flax_mechanic
from tests import network


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
    tx=TX,
    **{
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
  ours, theirs = create(OURS), create(THEIRS)
  ours, loss = ours.minimize(network.loss, *network.batch(0))
  value, grads = jax.value_and_grad(network.loss)(
    theirs.params, *network.batch(0)
  )
  assert_same(ours, theirs.apply_gradients(grads=grads))
  assert loss == value
