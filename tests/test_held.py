"""Bases whose state is held still, against a select after the fact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_mechanic.mechanic.held import Restart, held_update
from tests import network


def odd_state():
  """A base whose state is of every kind that a compiler could see."""

  def init(params):
    return {
      "constant": jnp.zeros([]),
      "moved": jnp.ones([]),
      "unchanged": jnp.ones(3),
      "swapped": (jnp.zeros(2), jnp.ones(2)),
      "twice": (jnp.zeros([]), jnp.ones([])),
      "widened": jnp.ones([], jnp.bfloat16),
      "narrowed": jnp.ones([], jnp.float32),
      "key": jax.random.key(0),
    }

  def update(updates, state, params=None):
    count = jnp.square(state["moved"]) + 1
    double = 2 * count
    new = {
      "constant": jnp.float32(7.0),
      "moved": count,
      "unchanged": state["unchanged"],
      "swapped": state["swapped"][::-1],
      "twice": (double, double),
      "widened": state["widened"].astype(jnp.float32) * 3,
      "narrowed": (3 * state["narrowed"]).astype(jnp.bfloat16),
      "key": jax.random.split(state["key"])[0],
    }
    # Both of bfloat16.
    count += (new["narrowed"] + jnp.bfloat16(1)).astype(jnp.float32)
    return jax.tree.map(lambda g: count * g, updates), new

  return optax.GradientTransformation(init, update)


BASES = {
  "adamw": optax.adamw(0.1),
  "sgd": optax.sgd(0.1, momentum=0.9),
  "lion": optax.lion(0.1),
  "adafactor": optax.adafactor(0.1),
  "prodigy": optax.contrib.prodigy(0.1),
  "injected": optax.inject_hyperparams(optax.adamw)(
    optax.linear_schedule(0.0, 1.0, 10)
  ),
  "noisy": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(0.1)),
  "odd": odd_state(),
}


def raw(tree):
  is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return [
    np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf, np.float64)
    for leaf in jax.tree.leaves(tree)
  ]


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("name", BASES)
def test_keeps_the_new_state_or_the_old_one(name, ok):
  base = BASES[name]
  params = network.params()
  grads = jax.grad(network.loss)(params, *network.batch(0))
  state = base.init(params)

  @jax.jit
  def guarded(ok, grads, state, params):
    keep = lambda new, old: jnp.where(ok, new, old)
    return held_update(base.update, keep, grads, state, params)

  updates, new_state = guarded(ok, grads, state, params)
  wanted, wanted_state = jax.jit(base.update)(grads, state, params)
  if not ok and name == "injected":
    # Its schedule goes on.
    wanted_state = wanted_state._replace(inner_state=state.inner_state)
  elif not ok:
    wanted_state = state
  else:
    np.testing.assert_allclose(
      np.concatenate([leaf.ravel() for leaf in raw(updates)]),
      np.concatenate([leaf.ravel() for leaf in raw(wanted)]),
      rtol=1e-5,
    )
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  for mine, theirs in zip(raw(new_state), raw(wanted_state), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-6 if ok else 0)


@pytest.mark.parametrize("name", BASES)
def test_goes_back_to_the_start(name):
  base = BASES[name]
  params = network.params()
  gradient = lambda i: jax.grad(network.loss)(params, *network.batch(i))
  start = base.init(params)
  state = start
  for i in range(2):
    _, state = base.update(gradient(i), state, params)

  # A reference point stays, wherever the parameters are by now.
  moved = jax.tree.map(lambda x: x + 1, params)

  @jax.jit
  def update(now, g, state):
    take = lambda new, old: new
    restart = Restart(now, base.init(moved))
    return held_update(base.update, take, g, state, params, restart)

  for now, before in ((True, start), (False, state)):
    if name == "injected":  # Its schedule goes on.
      before = state._replace(inner_state=before.inner_state)
    found, wanted = (
      update(now, gradient(2), state),
      jax.jit(base.update)(gradient(2), before, params),
    )
    for mine, theirs in zip(raw(found), raw(wanted), strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
