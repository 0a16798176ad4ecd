"""`minimize` where a batch is split over a mapped axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic import Optimizer, TrainState, UsageError
from tests import network
from tests.by_hand import build

# Methods that take the loss, a second gradient, a gradient for each example.
METHODS = ["mechanic", "momo", "sam", "dpsgd"]
DEVICES = 4


def in_pmap(step):
  """Returns a step over devices from one on a device's part of the batch."""
  mapped = jax.pmap(
    step,
    axis_name="batch",
    in_axes=(None, 0, 0, None),
    devices=jax.devices()[:DEVICES],
  )

  def run(state, *batch, key):
    parts = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in batch]
    results = mapped(state, *parts, key)
    state, loss = results
    for leaf in (*jax.tree.leaves(state.params), loss):
      np.testing.assert_array_equal(leaf, leaf[:1].repeat(DEVICES, 0))
    return jax.tree.map(lambda x: x[0], results)

  return run


def make_mesh():
  return jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))


def in_shard_map(step):
  rows, whole = P("batch"), P()
  mapped = jax.shard_map(
    step, mesh=make_mesh(), in_specs=(whole, rows, rows, whole), out_specs=whole
  )
  jitted = jax.jit(mapped)
  return lambda state, *batch, key: jitted(state, *batch, key)


def noisy_loss(params, inputs, targets, key):
  """Adds noise, which differs between examples that have their own keys."""
  noise = 0.1 * jax.random.normal(key, inputs.shape[1:])
  return network.loss(params, inputs + noise, targets)


def train(step, state):
  losses = []
  for i in range(3):
    key = jax.random.key(i)
    state, loss = step(state, *network.batch(i), key=key)
    losses.append(loss)
  return state, losses


@pytest.mark.parametrize(
  ("method", "map_"),
  [
    ("mechanic", in_pmap),
    *(
      pytest.param(*each, marks=pytest.mark.slow)
      for each in (
        *((method, in_pmap) for method in METHODS if method != "mechanic"),
        ("mechanic", in_shard_map),
        ("dpsgd", in_shard_map),
      )
    ),
  ],
)
def test_a_split_batch_is_a_whole_one(method, map_):
  def step(state, inputs, targets, key, axis_name="batch"):
    return state.minimize(noisy_loss, inputs, targets, key, axis_name=axis_name)

  create = lambda params: TrainState.create(
    apply_fn=None, params=params, tx=build(method)
  )
  params = network.params()
  state = create(params)
  if map_ is in_shard_map:  # Of parameters that know their place on its mesh.
    params = jax.device_put(params, NamedSharding(make_mesh(), P()))
  whole = jax.jit(functools.partial(step, axis_name=None))
  found, expected = train(map_(step), create(params)), train(whole, state)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, found[0].params, expected[0].params)
  close(found[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("map_", [in_shard_map, in_pmap])
def test_an_estimate_of_the_hessian_is_the_whole_batch_s(map_):
  def step(state, inputs, targets, key, axis_name="batch"):
    del key
    return state.minimize(network.loss, inputs, targets, axis_name=axis_name)

  state = TrainState.create(
    apply_fn=None, params=network.params(), tx=build("sophia")
  )
  whole = jax.jit(functools.partial(step, axis_name=None))
  found, expected = (
    optax.tree.get(train(each, state)[0].opt_state, "nu")
    for each in (map_(step), whole)
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
  jax.tree.map(close, found, expected)
  assert np.abs(expected["head"]).max() > 1e-4


@pytest.mark.parametrize(
  "method", [pytest.param("momo", marks=pytest.mark.slow), "dpsgd"]
)
def test_an_nnx_model_on_a_split_batch(method):
  def loss_fn(model, inputs, targets):
    return jnp.mean((model(inputs) - targets) ** 2)

  def step(state, inputs, targets, key, axis_name="batch"):
    del key
    model, optimizer = job = nnx.merge(graphdef, state)
    loss = optimizer.minimize(
      model, loss_fn, inputs, targets, axis_name=axis_name
    )
    return nnx.state(job), loss

  model = nnx.Linear(8, 1, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split((model, Optimizer(model, build(method))))
  whole = jax.jit(functools.partial(step, axis_name=None))
  _, losses = train(in_shard_map(step), state)
  np.testing.assert_allclose(losses, train(whole, state)[1], rtol=1e-5)


def test_a_loss_that_is_averaged_already():
  def step(state, inputs, targets, key):
    averaged = lambda *args: jax.lax.pmean(network.loss(*args), "batch")
    return state.minimize(averaged, inputs, targets, axis_name="batch")

  state = TrainState.create(
    apply_fn=None, params=network.params(), tx=optax.sgd(0.1)
  )
  with pytest.raises(UsageError, match="already averaged over"):
    in_shard_map(step)(state, *network.batch(0), key=0)
