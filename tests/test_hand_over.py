"""After `tune_steps` the scale stays, and the base goes on by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_mechanic import mechanize
from tests import network

TUNED, STEPS = 15, 30
BASES = {
  "adamw": lambda: optax.adamw(optax.linear_schedule(0.0, 1.0, 10)),
  "sgd": lambda: optax.sgd(1.0, momentum=0.9),
}
FLAG = {
  "relative_s_init": 0.01,
  "groups": ".*",
  "weight_decay": 1e-4,
  "mean_decay": True,
}


def run(tx, poisoned=(), params=None):
  """Yields the state before each step and what it added to the parameters."""
  params = params or network.params(jnp.float32)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for step in range(STEPS):
    grads = jax.grad(network.loss)(params, *network.batch(step, jnp.float32))
    if step in poisoned:
      grads = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    updates, new_state = update(grads, state, params)
    yield state, params, grads, updates
    params, state = optax.apply_updates(params, updates), new_state


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{}, FLAG], ids=["one scale", "a leaf"])
@pytest.mark.parametrize("store_delta", [False, True])
def test_from_then_on_it_is_the_base_times_the_scale(
  base, options, store_delta
):
  options = {"eps": 1e-20, "s_init": 1e-3, **options}
  tx = BASES[base]()
  tune = lambda tune_steps: run(
    mechanize(tx, store_delta=store_delta, tune_steps=tune_steps, **options)
  )
  for step, (handed, always) in enumerate(
    zip(tune(TUNED), tune(None), strict=True)
  ):
    state, params, grads, updates = handed
    if step < TUNED:
      jax.tree.map(np.testing.assert_array_equal, handed, always)
      continue
    if step == TUNED:
      scale, base_state = state.scale, state.base_optimizer_state
    np.testing.assert_array_equal(state.scale, scale)
    of_base, base_state = tx.update(grads, base_state, params)
    scales = list(scale) if scale.ndim else [scale] * 3
    for u, plain, S, x in zip(
      *map(jax.tree.leaves, (updates, of_base)),
      scales,
      jax.tree.leaves(params),
      strict=True,
    ):
      np.testing.assert_allclose(
        u, S * plain, rtol=1e-3, atol=1e-6 * abs(x).max()
      )


def test_the_other_arrays_stay_too():
  tx = mechanize(BASES["adamw"](), tune_steps=TUNED, **FLAG)
  states = [state for state, *_ in run(tx)]
  for name in ("r", "m", "v", "s", "scale", "s_init"):
    one, last = (getattr(states[i], name) for i in (TUNED, -1))
    np.testing.assert_array_equal(one, last)
    assert np.any(getattr(states[TUNED - 1], name) != one)


def test_bad_gradients_are_skipped_all_the_same():
  tx = mechanize(BASES["adamw"](), tune_steps=TUNED, **FLAG)
  poisoned = (3, TUNED + 3)
  for step, (state, _, _, updates) in enumerate(run(tx, poisoned)):
    moved = any(np.any(u != 0) for u in jax.tree.leaves(updates))
    assert moved == (step not in (0, *poisoned))
    assert state.skipped == sum(step > bad for bad in poisoned)


def test_a_delayed_scale_stays_too():
  tx = mechanize(BASES["sgd"](), tune_steps=TUNED, delayed_scale=True, **FLAG)
  *_, (state, *_) = run(tx)
  np.testing.assert_allclose(state.scale, state.s.sum(-1), rtol=1e-6)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(state.x0))


def test_what_is_not_needed_is_not_computed():
  """The branch of the base alone reads no x0."""
  params = network.params(jnp.float32)
  tx = mechanize(BASES["sgd"](), tune_steps=TUNED, **FLAG)
  jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
  conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
  products = next(e for e in conds if len(e.outvars) == 5)
  alone, tuned = (
    sum(
      v in {str(i) for e in b.jaxpr.eqns for i in e.invars}
      for v in map(str, b.jaxpr.invars)
    )
    for b in products.params["branches"]
  )
  assert alone == 3
  assert tuned > 9


@pytest.mark.parametrize("tune_steps", [0, -1])
def test_no_steps_are_refused(tune_steps):
  with pytest.raises(ValueError, match=f"tune_steps={tune_steps} must be"):
    mechanize(optax.sgd(1.0), tune_steps=tune_steps)
