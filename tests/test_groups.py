"""A scale for each group of leaves, and an initial scale relative to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from flax_mechanic import Shardings, mechanize, scalars
from tests import network

BASES = {
  "adamw": lambda rate=1.0: optax.adamw(
    lambda count: rate * optax.linear_schedule(0.0, 1.0, 10)(count)
  ),
  "sgd": lambda rate=1.0: optax.sgd(rate, momentum=0.9),
  "lion": lambda rate=1.0: optax.lion(rate),
}
# Leaves in the order of the tree: head, hidden/bias, hidden/kernel.
GROUPS = {
  "": [0, 0, 0],
  ".*": [0, 1, 2],
  "^hidden": [0, 1, 1],
}
FLAG = {
  "relative_s_init": 0.01,
  "weight_decay": 1e-4,
  "mean_decay": True,
  "eps": 1e-20,
}


gradient_of = jax.jit(jax.grad(network.loss))


def numpy_run(
  base,
  members,
  steps,
  rho,
  mean_decay,
  lam,
  eps,
  s_init=1e-6,
  n=6,
  gain=lambda t: 1.0,
):
  """Algorithm 1 as optax has it, once a group, in float64.

  `gain(t)` is how far S goes towards the sum of s. Returns the leaves, and each
  group's S.
  """
  beta = 1 - 10.0 ** -np.arange(1, n + 1)
  params = network.params(jnp.float64)
  treedef = jax.tree.structure(params)
  base_state, base_update = base.init(params), jax.jit(base.update)
  x0 = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
  x, delta = list(x0), [np.zeros_like(leaf) for leaf in x0]
  count = max(members) + 1
  m, v, r = np.zeros((3, count, n))
  s = np.full((count, n), s_init)
  scale = s.sum(1)
  start = np.full(count, np.inf if rho else s_init)
  norms = [[] for _ in range(count)]
  for t in range(steps):
    inputs = network.batch(t, jnp.float64)
    gradient = gradient_of(treedef.unflatten(x), *inputs)
    update, base_state = base_update(gradient, base_state, treedef.unflatten(x))
    g, u = jax.tree.leaves(gradient), jax.tree.leaves(update)
    for i in range(count):
      leaves = [k for k, group in enumerate(members) if group == i]
      flat = lambda tree, leaves=leaves: np.concatenate(
        [np.ravel(tree[k]) for k in leaves]
      )
      S = scale[i]
      shrink = S / (S + eps)
      for k in leaves:
        delta[k] = shrink * delta[k]
      G, X, D = flat(g), flat(x), flat(delta)
      size = np.linalg.norm
      decay = lam * S / (start[i] if rho else 1)
      # Else the offset may be all rounding.
      if rho and S * size(D) > 2e-6 * size(X):
        young = t if np.isfinite(start[i]) else min(t, 10)
        candidate = rho * (1 + size(X)) * np.sqrt(young) / size(D)
        start[i] = min(start[i], candidate)
      first = start[i] if np.isfinite(start[i]) else s_init * min(10.0**t, 1e4)
      norms[i].append(size(G))
      norm = np.mean(norms[i]) if mean_decay else size(G)
      h = D @ (G + decay * norm / (size(X) + eps) * X)
      r[i] = beta * r[i] - np.clip(h, -m[i], m[i]) * s[i]
      m[i] = np.maximum(beta * m[i], abs(h) + eps)
      v[i] = beta**2 * v[i] + h * h
      wealth = first / n * m[i] + np.maximum(r[i], 0)
      s[i] = wealth / (np.sqrt(v[i]) + eps)
      if rho and sum(s[i]) < first:
        s[i] *= first / sum(s[i])
      scale[i] += gain(t) * (sum(s[i]) - scale[i])
      for k in leaves:
        delta[k] = delta[k] + u[k]
        x[k] = x0[k] + scale[i] * delta[k]
  return x, scale


@pytest.mark.parametrize(
  ("base", "groups", "rho", "mean_decay"),
  [
    *(("adamw", groups, 0.01, True) for groups in GROUPS),
    ("adamw", "", 0.0, True),
    ("adamw", ".*", 0.01, False),
    ("sgd", "", 0.0, False),
    ("lion", "^hidden", 0.01, True),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        *(("adamw", groups, 0.0, False) for groups in GROUPS),
        ("sgd", ".*", 0.01, True),
      )
    ),
  ],
)
def test_equals_numpy(base, groups, rho, mean_decay):
  options = {"weight_decay": 1e-3, "eps": 1e-12}
  with jax.enable_x64(True):
    tx = mechanize(
      BASES[base](),
      groups=groups,
      relative_s_init=rho,
      mean_decay=mean_decay,
      spike_factor=0.0,
      **options,
    )
    x, state, _ = network.train(tx, 60, jnp.float64)
    leaves, S = numpy_run(
      BASES[base](), GROUPS[groups], 60, rho, mean_decay, *options.values()
    )
  for ours, theirs in zip(jax.tree.leaves(x), leaves, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(np.atleast_1d(state.scale), S, rtol=1e-6)
  shape = (len(S),) if groups else ()
  assert state.scale.shape == state.initial_scale.shape == shape
  assert state.s.shape == state.m.shape == (*shape, 6)


def test_a_function_names_groups():
  run = lambda groups: network.train(
    mechanize(BASES["adamw"](), groups=groups, **FLAG), 20
  )[0]
  by_function = run(lambda path: path.startswith("hidden"))
  jax.tree.map(np.testing.assert_array_equal, by_function, run("^hidden"))


@pytest.mark.parametrize(
  "base",
  [
    "adamw",
    pytest.param("sgd", marks=pytest.mark.slow),
    pytest.param("lion", marks=pytest.mark.slow),
  ],
)
def test_the_base_s_learning_rate_does_not_matter(base):
  batches = [network.batch(i) for i in range(300)]
  batches = jax.tree.map(lambda *x: jnp.stack(x), *batches)

  def train(rate):
    tx = mechanize(BASES[base](rate), groups=".*", **FLAG)

    def step(carry, batch):
      x, state = carry
      value, g = jax.value_and_grad(network.loss)(x, *batch)
      updates, state = tx.update(g, state, x)
      return (optax.apply_updates(x, updates), state), value

    x = network.params()
    return jax.lax.scan(step, (x, tx.init(x)), batches)[1][-50:].mean()

  rates = (1e-6, 1e-4, 1e-2, 1.0, 1e2)
  ends = jax.jit(jax.vmap(train))(jnp.array(rates))
  losses = dict(zip(rates, ends.tolist(), strict=True))
  drop_in = np.mean(network.train(mechanize(BASES[base]()), 300)[2][-50:])
  assert losses[1.0] < 1.05 * drop_in
  assert losses[1e2] < 1.1 * losses[1.0]
  # What is small drowns in float32's rounding for a while.
  start = np.mean(network.train(optax.set_to_zero(), 50)[2])
  assert max(losses.values()) < 0.75 * start


def test_an_offset_below_rounding_gives_no_initial_scale():
  # Each update moves a parameter of 1 by less than half of float32's spacing.
  tx = mechanize(optax.sgd(1e-3), groups=".*", **FLAG)
  x = {"w": jnp.ones(1000)}
  state, update = tx.init(x), jax.jit(tx.update)
  scales = []
  for _ in range(8):
    updates, state = update({"w": jnp.full(1000, 1e-3)}, state, x)
    x = optax.apply_updates(x, updates)
    scales.append(float(state.scale[0]))
  np.testing.assert_allclose(scales[1:4], [1e-5, 1e-4, 1e-3], rtol=1e-5)
  assert max(scales) <= 1.0001e-2  # At most, until the offset is clear.
  assert state.initial_scale == 0.0


def test_nothing_is_decayed_until_an_initial_scale_is_measured():
  def after_two(weight_decay):
    options = FLAG | {"weight_decay": weight_decay}
    tx = mechanize(optax.sgd(1.0), **options)
    update, x = jax.jit(tx.update), jnp.ones(10)
    state = tx.init(x)
    for _ in range(2):
      updates, state = update(jnp.full(10, 0.5), state, x)
      x = optax.apply_updates(x, updates)
    assert state.initial_scale == 0.0
    return state

  # Of an offset that is above rounding, so that h is not 0.
  decayed, alone = map(after_two, (1e6, 0.0))
  assert decayed.m.min() > 1.0
  np.testing.assert_array_equal(decayed.m, alone.m)


def test_a_skipped_gradient_leaves_what_was_measured():
  tx = mechanize(BASES["adamw"](), groups=".*", **FLAG)
  x, state, _ = network.train(tx, 5)
  bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x)
  # A gradient that is finite, and so measurable, but a spike.
  spike = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e9), x)
  update = jax.jit(tx.update)
  for g in (bad, spike):
    # Parameters that moved by other means would be measured anew.
    moved = jax.tree.map(lambda leaf: leaf + 1.0, x)
    _, after = update(g, state, moved)
    assert after.skipped == state.skipped + 1
    for field in ("initial_scale", "mean_norm", "s", "count"):
      np.testing.assert_array_equal(
        getattr(after, field), getattr(state, field)
      )


def test_the_scale_stays_above_the_initial_one():
  tx = mechanize(BASES["sgd"](), groups=".*", **FLAG)
  x = network.params()
  state, update = tx.init(x), jax.jit(tx.update)
  rng = np.random.default_rng(0)
  for _ in range(100):
    # Gradients without a direction, from which a tuner learns to stand still.
    g = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), x
    )
    updates, state = update(g, state, x)
    x = optax.apply_updates(x, updates)
  np.testing.assert_array_less(state.initial_scale * 0.999, state.scale)
  np.testing.assert_array_less(state.scale, state.initial_scale * 3)


def test_the_mean_norm_holds_the_scale_where_gradients_vanish():
  """As on data that a model separates: the loss falls without an end."""

  def last_scale(mean_decay):
    tx = mechanize(optax.adam(1.0), **FLAG | {"mean_decay": mean_decay})
    x, signs = jnp.zeros(2), jnp.array([1.0, -1.0])
    loss = lambda x: jnp.sum(jax.nn.softplus(-signs * x))

    def step(carry, _):
      x, state = carry
      updates, state = tx.update(jax.grad(loss)(x), state, x)
      return (optax.apply_updates(x, updates), state), state.scale

    return jax.lax.scan(step, (x, tx.init(x)), length=500)[1][-1]

  assert last_scale(True) < 0.3 * last_scale(False)


@pytest.mark.parametrize("variant", ["optax", "pytorch"])
@pytest.mark.parametrize("base", [optax.adam, optax.adamw])
def test_a_group_without_gradients_waits(variant, base):
  tx = mechanize(base(1.0), variant=variant, groups=".*", **FLAG)
  x = {"used": jnp.ones(3), "unused": jnp.ones(3), "empty": jnp.ones((0, 2))}
  state, update = tx.init(x), jax.jit(tx.update)
  for _ in range(20):
    g = {k: jnp.full_like(v, float(k == "used")) for k, v in x.items()}
    updates, state = update(g, state, x)
    x = optax.apply_updates(x, updates)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(x))
  # But for the base's own weight decay, of 1e-4.
  np.testing.assert_allclose(x["unused"], 1.0, rtol=3e-5)
  assert np.all(x["used"] < 1.0)
  np.testing.assert_allclose(state.scale[:2], 1e-2, rtol=1e-5)


@pytest.mark.parametrize("value", [1e3, 1e-3])
def test_another_group_s_change_of_size_is_none_of_its_own(value):
  def run(change, spike_factor=4.0):
    tx = mechanize(
      optax.adam(1.0), groups=".*", spike_factor=spike_factor, **FLAG
    )
    x = {"same": jnp.zeros(8), "other": jnp.zeros(8)}

    def step(carry, i):
      x, state = carry
      noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (8,))
      g = {"same": x["same"] - 30 + noise, "other": 100 * noise}
      g["other"] *= jnp.where(i < 100, 1.0, change)
      updates, state = tx.update(g, state, x)
      return (optax.apply_updates(x, updates), state), None

    steps = jnp.arange(200)
    (x, state), _ = jax.jit(
      lambda: jax.lax.scan(step, (x, tx.init(x)), steps)
    )()
    return x["same"], state

  x, state = run(value)
  expected, as_is = run(value, spike_factor=0.0)
  np.testing.assert_allclose(x, expected, atol=2)
  np.testing.assert_allclose(state.mean_norm[1], as_is.mean_norm[1], rtol=0.2)
  assert state.skipped == (24 if value > 1 else 0)


def test_gradients_that_come_late_find_a_small_scale():
  tx = mechanize(optax.adam(1.0), groups=".*", **FLAG)
  x = {"early": jnp.ones(100), "late": jnp.ones(100)}
  state, update = tx.init(x), jax.jit(tx.update)
  moved = []
  for step in range(1100):
    g = {
      "early": jnp.full(100, 1.0 - 2.0 * (step % 2)),
      "late": jnp.full(100, float(step >= 1000)),
    }
    if step == 1001:
      x_norm = jnp.linalg.norm(x["late"])
      delta_norm = jnp.linalg.norm((x["late"] - 1) / state.scale[1])
    updates, state = update(g, state, x)
    x = optax.apply_updates(x, updates)
    moved.append(float(jnp.linalg.norm(updates["late"]) / 10))
    if step == 1001:
      first = state.initial_scale[1]
  assert max(moved[:1000]) == 0.0
  assert 0.005 < max(moved[1000:1003]) < 0.1
  # The first offset is taken for the sum of 10 updates, not of 1000.
  np.testing.assert_allclose(
    first, 0.01 * (1 + x_norm) * np.sqrt(10) / delta_norm, rtol=1e-5
  )
  # Of gradients that are there.
  np.testing.assert_allclose(state.mean_norm[1], 10.0, rtol=1e-5)


@pytest.mark.parametrize("groups", ["", ".*"])
def test_zeros_in_front_of_the_first_gradient_are_none(groups):
  # Under weight decay, which moves the parameters without a gradient.
  tx = mechanize(optax.adamw(1.0), groups=groups, **FLAG)
  update = jax.jit(tx.update)
  x = network.params()
  state = tx.init(x)
  for _ in range(20):
    zeros = jax.tree.map(jnp.zeros_like, x)
    updates, state = update(zeros, state, x)
    x = optax.apply_updates(x, updates)
  jax.tree.map(np.testing.assert_array_equal, x, network.params())
  jax.tree.map(np.testing.assert_array_equal, state, tx.init(x))


def test_scalars_tell_the_range():
  state = network.train(mechanize(BASES["sgd"](), groups=".*"), 5)[1]
  told = scalars(state)
  assert told["mechanic/scale_min"] == np.min(state.scale)
  assert told["mechanic/scale_max"] == np.max(state.scale)
  assert told["mechanic/scale"] == pytest.approx(np.mean(state.scale))
  assert all(value.shape == () for value in told.values())


@pytest.mark.parametrize(
  "axis_type",
  [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
)
def test_sharded_equals_one_device(axis_type):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  place = lambda tree: network.place(tree, mesh)
  tx = mechanize(BASES["adamw"](), groups=".*", **FLAG)
  with jax.set_mesh(mesh), jax.enable_x64(True):
    one = network.params(jnp.float64)
    many = place(one)
    shardings = Shardings.of(many)
    one_state, many_state = tx.init(one), tx.init(many)
    grads = [
      gradient_of(one, *network.batch(i, jnp.float64)) for i in range(10)
    ]
    update = jax.jit(tx.update)
    sharded = jax.jit(lambda *a: tx.update(*a, shardings=shardings))
    for g in grads:
      updates, one_state = update(g, one_state, one)
      one = optax.apply_updates(one, updates)
      updates, many_state = sharded(place(g), many_state, many)
      many = optax.apply_updates(many, updates)
    hlo = sharded.lower(place(g), many_state, many).compile().as_text()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), many, one
  )
  np.testing.assert_allclose(many_state.s, one_state.s, rtol=1e-9)
  assert hlo.count(" all-reduce(") == 1
  assert "all-gather" not in hlo


def test_what_is_out_of_range_is_said():
  for rho in (-1.0, float("inf"), float("nan")):
    with pytest.raises(ValueError, match=r"relative_s_init=.* must be above 0"):
      mechanize(optax.sgd(1.0), relative_s_init=rho)
  with pytest.raises(ValueError, match=r"groups='\(' is not a regular"):
    mechanize(optax.sgd(1.0), groups="(")


@pytest.mark.parametrize(
  "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16]
)
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"variant": "pytorch"},
    {"x0_dtype": "bfloat16"},
  ],
  ids=str,
)
def test_it_goes_with_every_option(options, dtype):
  tx = mechanize(BASES["adamw"](), groups=".*", **FLAG, **options)
  drop_in = mechanize(BASES["adamw"](), **options)
  last = lambda tx: np.mean(network.train(tx, 300, dtype)[2][-50:])
  assert last(tx) < 1.1 * last(drop_in)
