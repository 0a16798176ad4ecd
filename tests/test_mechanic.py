"""`mechanize` against optax's, against NumPy, and on meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic import MechanicState, mechanize
from tests import network

BASES = {
  "adamw": lambda: optax.adamw(
    optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 200)
  ),
  "sgd": lambda: optax.sgd(1.0, momentum=0.9),
  "lion": lambda: optax.lion(1.0),
}


def relative_error(tree, reference):
  """Returns the largest error of a leaf over the leaf's largest value."""

  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-300)

  return max(jax.tree.leaves(jax.tree.map(leaf, tree, reference)))


def numpy_mechanic(base, x, steps, lam=1e-2, eps=1e-8, s_init=1e-6, n=6):
  """Algorithm 1 over flat float64 vectors, with optax's clipping and signs."""
  flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
  unflat = ravel_pytree(x)[1]
  base_state, base_update = base.init(x), jax.jit(base.update)
  grad = jax.jit(jax.grad(network.loss))
  x0 = xt = flat(x)
  beta = 1 - 10.0 ** -np.arange(1, n + 1)
  m, v, r, s = np.zeros(n), np.zeros(n), np.zeros(n), np.full(n, s_init)
  for t in range(steps):
    gradient = grad(unflat(xt), *network.batch(t, jnp.float64))
    update, base_state = base_update(gradient, base_state, unflat(xt))
    g, u = flat(gradient), flat(update)
    S = sum(s)
    delta = (xt - x0) / (S + eps)
    decayed = g + lam * S * np.linalg.norm(g) / (np.linalg.norm(xt) + eps) * xt
    h = -(decayed @ delta)
    r = beta * r + np.clip(h, -m, m) * s
    m = np.maximum(beta * m, abs(h) + eps)
    v = beta**2 * v + h * h
    s = (s_init / n * m + np.maximum(r, 0)) / (np.sqrt(v) + eps)
    xt = x0 + sum(s) * (delta + u)
  return unflat(xt), m, v, r, s


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(jnp.float64, 1e-10), (jnp.float32, 1e-3)]
)
def test_equals_optax(base, dtype, tolerance):
  with jax.enable_x64(dtype == jnp.float64):
    ours = network.train(mechanize(BASES[base]()), 200, dtype)
    optaxs = network.train(optax.contrib.mechanize(BASES[base]()), 200, dtype)
    assert relative_error(ours[0], optaxs[0]) < tolerance
    for field in ("s", "m", "v", "r", "x0"):
      mine, reference = getattr(ours[1], field), getattr(optaxs[1], field)
      assert relative_error(mine, reference) < tolerance, field
    assert ours[1].s.dtype == dtype
    assert float(jnp.sum(ours[1].s)) > 1e-4  # it did learn a scale


@pytest.mark.parametrize("base", BASES)
def test_equals_numpy(base):
  with jax.enable_x64(True):
    x, state, _ = network.train(mechanize(BASES[base]()), 200, jnp.float64)
    reference = numpy_mechanic(BASES[base](), network.params(jnp.float64), 200)
    ours = (x, state.m, state.v, state.r, state.s)
    assert relative_error(ours, reference) < 1e-10


def test_options_equal_optax():
  options = {"weight_decay": 0.1, "eps": 1e-6, "s_init": 1e-3, "num_betas": 3}
  with jax.enable_x64(True):
    ours = network.train(
      mechanize(optax.sgd(0.1), *options.values()), 50, jnp.float64
    )
    optaxs = network.train(
      optax.contrib.mechanize(optax.sgd(0.1), **options), 50, jnp.float64
    )
    assert relative_error(ours[0], optaxs[0]) < 1e-10


def test_state_fields_are_those_of_optax():
  theirs = optax.contrib.mechanize(optax.sgd(1.0)).init(network.params())
  assert MechanicState._fields[: len(theirs._fields)] == theirs._fields


def test_replaced_weights_are_the_reference_point():
  tx = mechanize(optax.adamw(1.0))
  state = tx.init(network.params())
  loaded = jax.tree.map(lambda x: x + 1.0, network.params())
  step = network.make_step(tx)
  x, state, _ = step(loaded, state, *network.batch(0))
  assert relative_error(state.x0, loaded) == 0
  x, state, _ = step(x, state, *network.batch(1))
  assert relative_error(state.x0, loaded) == 0


def test_donation_after_eager_init():
  tx = mechanize(optax.adamw(1.0))
  x = network.params()
  state = tx.init(x)
  step = network.make_step(tx, donate_argnums=(0, 1))
  for i in range(3):
    x, state, value = step(x, state, *network.batch(i))
  assert np.isfinite(value)
  assert step._cache_size() == 1


def test_zero_first_gradient_is_harmless():
  tx = mechanize(optax.adamw(1.0))
  x = network.params()
  state = tx.init(x)
  zeros = jax.tree.map(jnp.zeros_like, x)
  updates, state = tx.update(zeros, state, x)
  assert all(
    np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state))
  )
  step = network.make_step(tx)
  for i in range(200):
    x, state, value = step(x, state, *network.batch(i))
  assert value < network.loss(network.params(), *network.batch(199)) * 0.7


def test_params_are_asked_for():
  tx = mechanize(optax.sgd(1.0))
  state = tx.init(network.params())
  with pytest.raises(ValueError, match="needs params"):
    tx.update(network.params(), state)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_one_device(axis_type):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  specs = {
    "hidden": {"kernel": P("data", "model"), "bias": P("model")},
    "head": P("data", None),
  }
  place = lambda tree: jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
  )
  tx = mechanize(optax.adamw(1.0))
  with jax.set_mesh(mesh), jax.enable_x64(True):
    x = network.params(jnp.float64)
    grads = [
      jax.grad(network.loss)(x, *network.batch(i, jnp.float64))
      for i in range(20)
    ]
    one, many = x, place(x)
    one_state, many_state = tx.init(one), tx.init(many)
    update = jax.jit(tx.update)
    for g in grads:
      updates, one_state = update(g, one_state, one)
      one = optax.apply_updates(one, updates)
      updates, many_state = update(place(g), many_state, many)
      many = optax.apply_updates(many, updates)
    assert relative_error(many, one) < 1e-10
    assert relative_error(many_state.s, one_state.s) < 1e-10
    for leaf, spec in zip(
      jax.tree.leaves(many_state.x0), jax.tree.leaves(specs), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(
        NamedSharding(mesh, spec), leaf.ndim
      )
    hlo = update.lower(place(g), many_state, many).compile().as_text()
    assert not re.search(r"all-gather", hlo)
