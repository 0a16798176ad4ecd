"""What the methods compute, against optax by hand, and what they learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import flax_mechanic
from flax_mechanic import Optimizer, TrainState
from flax_mechanic.methods import readers
from tests import network, optimizers
from tests.by_hand import (
  SHAPE,
  LinenRun,
  Mlp,
  NnxRun,
  add,
  assert_close,
  assert_equal,
  batch,
  batches,
  build,
  by_hand,
  flat,
  initial,
  measure,
  minimize,
  norm,
  scheduled,
  under,
)
from tests.test_config import make_config

# The other methods, on the shared network.


def tuned(method):
  return lambda **options: method(scheduled, **options)


def learned(method, factor=1.0):
  return lambda **options: method(
    lambda count: factor * SHAPE(count), **options
  )


def dog(init_step_kind, init_step, averaging, **options):
  return contrib.dog(SHAPE, (init_step_kind, init_step), **options)


@pytest.mark.parametrize(
  ("name", "reference", "options"),
  [
    ("adam", tuned(optax.adam), {"b1": 0.8, "nesterov": True}),
    (
      "adafactor",
      tuned(optax.adafactor),
      {
        "min_dim_size_to_factor": 4,
        "momentum": 0.5,
        "weight_decay_rate": 1e-3,
      },
    ),
    (
      "muon",
      tuned(contrib.muon),
      {"beta": 0.8, "weight_decay": 0.1, "consistent_rms": 0.2},
    ),
    (
      "lars",
      tuned(optax.lars),
      {"weight_decay": 1e-3, "trust_coefficient": 0.5, "eps": 1e-6},
    ),
    ("cocob", learned(contrib.cocob), {"alpha": 50.0, "weight_decay": 1e-3}),
    (
      "dowg",
      learned(contrib.dowg, 0.5),
      {"learning_rate": 0.5, "init_estim_sq_dist": 1e-2, "weight_decay": 0.1},
    ),
    (
      "prodigy",
      learned(contrib.prodigy, 0.5),
      {
        "learning_rate": 0.5,
        "estim_lr0": 1e-3,
        "beta3": 0.9,
        "weight_decay": 0.1,
      },
    ),
    (
      "dadapt_adamw",
      learned(contrib.dadapt_adamw),
      {"estim_lr0": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.99)},
    ),
    (
      "dog",
      dog,
      {
        "init_step_kind": "distance",
        "init_step": 1e-2,
        "averaging": 8.0,
        "weight_decay": 1e-3,
      },
    ),
    (
      "momo",
      learned(contrib.momo),
      {
        "beta": 0.8,
        "weight_decay": 0.1,
        "lower_bound": 0.1,
        "adapt_lower_bound": True,
      },
    ),
    (
      "momo_adam",
      learned(contrib.momo_adam, 0.25),
      {
        "learning_rate": 0.25,
        "weight_decay": 0.1,
        "lower_bound": 0.1,
        "adapt_lower_bound": True,
      },
    ),
  ],
)
def test_a_method_is_optax_s(x64, name, reference, options):
  fields = under(name, **options)
  # Options are handed on as they are given, the factor through the schedule.
  kept = {k: v for k, v in options.items() if k != "learning_rate"}
  state, losses = minimize(build(name, SHAPE, **fields), 30, jnp.float64)
  x, _, expected = by_hand(reference(**kept), 30)
  np.testing.assert_allclose(losses, expected, rtol=1e-9)
  assert_close(state.params, x, 1e-9)
  assert losses[-1] != losses[0]


BASES = {
  "sgd": lambda: optax.sgd(scheduled, momentum=None),
  "adamw": lambda: optax.adamw(scheduled, b1=0.0),
  "radam": lambda: optax.radam(scheduled, b1=0.0),
}


def free(base, **options):
  return contrib.schedule_free(BASES[base](), scheduled, **options)


@pytest.mark.parametrize("base", BASES)
def test_schedule_free_is_optax_s_over_a_base_without_momentum(x64, base):
  tx = build(
    "schedule_free",
    SHAPE,
    opt__schedule_free__base=base,
    opt__schedule_free__b1=0.8,
  )
  state, losses = minimize(tx, 30, jnp.float64)
  x, bare, expected = by_hand(free(base, b1=0.8), 30)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  assert_close(state.params, x, 1e-6)
  evaluated = state.eval_params()
  assert_close(evaluated, contrib.schedule_free_eval_params(bare, x), 1e-6)
  assert norm(flat(evaluated) - flat(x)) > 1e-3 * norm(x)


@pytest.mark.parametrize("between", [None, "split_real_and_imaginary"])
def test_schedule_free_over_mechanic_averages_what_mechanic_moves(x64, between):
  tx = build(
    "schedule_free",
    **under("schedule_free", base=between or "mechanic", b1=0.8),
    **under("split_real_and_imaginary", base="mechanic"),
  )
  state, _ = minimize(tx, 12, jnp.float64)

  mechanic = build("mechanic", **under("adamw", b1=0.0))
  z = x = network.params(jnp.float64)
  between = lambda weight: jax.tree.map(
    lambda a, b: (1 - weight) * a + weight * b, z, x
  )
  learned = mechanic.init(z)
  grad, update = jax.jit(jax.grad(network.loss)), jax.jit(mechanic.update)
  for t in range(1, 13):
    grads = grad(between(0.8), *network.batch(t - 1, jnp.float64))
    moved, learned = update(grads, learned, z)
    z = optax.apply_updates(z, moved)
    x = between(1 - 1 / t)
  assert_close(state.params, between(0.8), 1e-6)
  assert_close(state.eval_params(), x, 1e-6)
  scale = flax_mechanic.scalars(state.opt_state)["learning_rate/effective"]
  assert scale == pytest.approx(float(jnp.mean(learned.scale)))


@pytest.mark.parametrize("bad_at", [0, 6])
def test_schedule_free_averages_nothing_that_mechanic_skips(bad_at):
  tx = build("schedule_free", **under("schedule_free", base="mechanic"))
  update, start = jax.jit(tx.update), network.params()
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  grads = [jax.tree.map(draw, start) for _ in range(8)]

  def train(grads):
    x, state = start, tx.init(start)
    for g in grads:
      updates, state = update(g, state, x)
      x = optax.apply_updates(x, updates)
    kept = state.weight_sum, state.max_lr, state.step_count, state.z
    return x, kept

  bad = jax.tree.map(lambda g: np.full_like(g, np.nan), grads[0])
  assert_equal(train([*grads[:bad_at], bad, *grads[bad_at:]]), train(grads))
  # A first one that was too large goes back to the start.
  large = jax.tree.map(lambda g: 1e6 * g, grads[0])
  x, (_, _, count, _) = train([large, *grads])
  assert count < 1 + 9
  assert np.all(np.isfinite(flat(x)))


@pytest.mark.parametrize(
  ("fields", "reference", "bare"),
  [
    (
      {"grad_clip": 0.1},
      lambda: optax.chain(optax.clip_by_global_norm(0.1), free("adamw")),
      lambda state: state[1],
    ),
    (
      {"accumulate_steps": 2},
      lambda: optax.MultiSteps(free("adamw"), 2).gradient_transformation(),
      lambda state: state.inner_opt_state,
    ),
    (
      {"grad_clip": 0.1, "accumulate_steps": 2},
      lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(0.1), free("adamw")), 2
      ).gradient_transformation(),
      lambda state: state.inner_opt_state[1],
    ),
  ],
)
def test_the_average_is_found_in_any_nesting(x64, fields, reference, bare):
  state, _ = minimize(build("schedule_free", SHAPE, **fields), 9, jnp.float64)
  x, nested, _ = by_hand(reference(), 9)
  expected = contrib.schedule_free_eval_params(bare(nested), x)
  assert_close(state.eval_params(), expected, 1e-6)
  assert norm(flat(expected) - flat(x)) > 1e-3 * norm(x)


def test_the_average_beside_frozen_parameters(x64):
  tx = build("schedule_free", SHAPE, freeze=("^hidden/",))
  state, _ = minimize(tx, 9, jnp.float64)
  start = network.params(jnp.float64)
  x, bare, _ = by_hand(
    free("adamw"),
    9,
    {"head": start["head"]},
    lambda x, *batch: network.loss(x | {"hidden": start["hidden"]}, *batch),
  )
  evaluated = state.eval_params()
  expected = contrib.schedule_free_eval_params(bare, x)
  assert_close(evaluated["head"], expected["head"], 1e-6)
  assert_equal(evaluated["hidden"], start["hidden"])


def test_eval_model_holds_the_average_and_leaves_the_model_alone(x64):
  job = NnxRun(build("schedule_free", SHAPE), initial())
  for i in range(5):
    job.step(*batch(i))
  x = job.params
  evaluated = job.optimizer.eval_model(job.model)
  z = nnx.to_pure_dict(optax.tree.get(job.optimizer.opt_state, "z"))
  expected = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, x, z)
  assert_close(nnx.to_pure_dict(nnx.state(evaluated)), expected, 1e-6)
  assert_equal(job.params, x)


@pytest.mark.parametrize("run", [NnxRun, LinenRun])
def test_dog_evaluates_averaged_iterates(x64, run):
  job = run(build("dog", opt__dog__init_step=1e-2), initial())
  average, previous = initial(), initial()
  for t in range(1, 8):
    job.step(*batch(t))
    average = add(average, add(job.params, average, -1), 9 / (t + 8))
    assert norm(flat(job.params) - flat(previous)) > 0
    previous = job.params
  if run is NnxRun:
    model = job.optimizer.eval_model(job.model)
    assert model is not job.model
    evaluated = nnx.to_pure_dict(nnx.state(model))
  else:
    evaluated = job.state.eval_params()
  assert_close(evaluated, average)
  assert_equal(job.params, previous)
  assert norm(flat(average) - flat(previous)) > 1e-3 * norm(previous)


# Every row.


# Those that add nothing to `DISTINCT` are slow.
ROWS = list(optimizers.cases(optimizers.NAMES, optimizers.DISTINCT))
KINDS = list(optimizers.cases(optimizers.KINDS, optimizers.DISTINCT))


@functools.cache
def row_step(name):
  """A donated step whose first rate and whose gradient's factor are given."""

  def loss_fn(params, inputs, targets, factor):
    loss = network.loss(params, inputs, targets)
    return factor * loss + (1 - factor) * jax.lax.stop_gradient(loss)

  def step(params, opt_state, first, factor, inputs, targets):
    tx = build(
      name,
      lambda count: jnp.where(count == 0, first, 1.0),
      learning_rate=optimizers.learning_rate(name),
    )
    state = TrainState(
      step=0, apply_fn=None, params=params, tx=tx, opt_state=opt_state
    )
    state, loss = state.minimize(loss_fn, inputs, targets, factor)
    return state.params, state.opt_state, loss

  return jax.jit(step, donate_argnums=(0, 1))


@functools.cache
def row(name):
  return build(name, learning_rate=optimizers.learning_rate(name))


def assert_finite(x, state):
  assert np.all(np.isfinite(flat(x)))
  for leaf in jax.tree.leaves(state):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      # The best loss so far is infinite before the first.
      assert not np.any(np.isnan(leaf))


# Rows that divide by what they have seen.
_ZEROS = [
  *("mechanic", "prodigy", "dog", "cocob", "momo", "adafactor", "muon"),
  *("polyak_sgd", "dpsgd"),
]


@pytest.mark.parametrize(
  ("name", "zero"),
  [
    *optimizers.cases(optimizers.NAMES, _ZEROS, "gradient"),
    # Plain ones multiply their updates by the rate.
    *optimizers.cases(optimizers.KINDS, _ZEROS[:2], "rate"),
  ],
)
def test_a_first_update_of_nothing_is_safe(name, zero):
  step = row_step(name)
  first = np.float32(zero != "rate")
  x = network.params()
  state, losses = row(name).init(x), []
  for i in range(200):
    factor = np.float32(i > 0 or zero != "gradient")
    x, state, loss = step(x, state, first, factor, *network.batch(i))
    if i == 0:
      assert_finite(x, state)
    losses.append(loss)
  assert_finite(x, state)
  assert sum(losses[-10:]) / 10 < 0.8 * losses[0]


@pytest.mark.parametrize("name", KINDS)
def test_eager_states_can_be_donated_with_the_parameters(name):
  step, one = row_step(name), jnp.float32(1.0)
  ends = []
  for _ in range(2):
    x = network.params()
    state = row(name).init(x)
    for i in range(2):
      given = x, state
      x, state, _ = step(x, state, one, one, *network.batch(i))
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]))
    ends.append(x)
  assert_equal(*ends)


def bfloat16_step(name):
  """Returns the start of a job in bfloat16, and its step."""
  config = optimizers.configure(make_config(), name)
  tx = flax_mechanic.make_optimizer(config, SHAPE)
  state = TrainState.create(
    apply_fn=None, params=network.params(jnp.bfloat16), tx=tx
  )
  return state, lambda state, *batch: state.minimize(network.loss, *batch)


@pytest.mark.parametrize("name", ROWS)
def test_bfloat16_parameters_keep_every_type(name):
  state, step = bfloat16_step(name)
  after, _ = jax.eval_shape(step, state, *network.batch(0))
  assert after == jax.eval_shape(lambda state: state, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.DISTINCT)
def test_bfloat16_parameters_stay_finite(name):
  state, step = bfloat16_step(name)
  step = jax.jit(step, donate_argnums=0)
  for i in range(2):
    state, loss = step(state, *network.batch(i))
  assert step._cache_size() == 1
  assert np.isfinite(loss)


@pytest.mark.parametrize("name", KINDS)
def test_reanchoring_is_a_fresh_start(name):
  tx = row(name)
  step, one = row_step(name), jnp.float32(1.0)
  x = network.params()
  x, opt_state, _ = step(x, tx.init(x), one, one, *network.batch(0))
  other = jax.tree.map(lambda x: 2 * x + 0.1, network.params())
  state = TrainState(
    step=1, apply_fn=None, params=other, tx=tx, opt_state=opt_state
  )
  fresh = TrainState.create(apply_fn=None, params=other, tx=tx)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)),
    state.reanchor().opt_state,
    fresh.opt_state,
  )

  model = Mlp(4, nnx.Rngs(0))
  optimizer = Optimizer(model, tx)
  nnx.update(model, jax.tree.map(jnp.float32, initial()))
  optimizer.reanchor(model)
  fresh = Optimizer(model, tx)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)),
    nnx.as_pure(optimizer.opt_state),
    nnx.as_pure(fresh.opt_state),
  )


def raw(leaf):
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(leaf) if is_key else leaf


# What was learned.


def trajectory(tx, steps):
  """Returns parameters, gradients and scalars, one a step, in float64."""
  ravel = lambda tree: jnp.concatenate(
    [x.ravel() for x in jax.tree.leaves(tree)]
  )

  def step(state, batch):
    grads = jax.grad(network.loss)(state.params, *batch)
    after, _ = state.minimize(network.loss, *batch)
    found = flax_mechanic.scalars(after.opt_state)
    return after, (ravel(after.params), ravel(grads), found)

  @jax.jit
  def run(x, batches):
    state = TrainState.create(apply_fn=None, params=x, tx=tx)
    return jax.lax.scan(step, state, batches)[1]

  x = network.params(jnp.float64)
  points, grads, found = run(x, batches(steps, jnp.float64))
  return np.stack([flat(x), *points]), np.asarray(grads), found


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_scalars_read_the_distance_estimate(x64, name):
  state, _ = minimize(
    build(name, SHAPE, **under(name, estim_lr0=1e-3)), 20, jnp.float64
  )
  method = getattr(contrib, name)
  _, theirs, _ = by_hand(method(SHAPE, estim_lr0=1e-3), 20)
  found = flax_mechanic.scalars(state.opt_state)
  d = float(theirs.estim_lr)
  assert d > 2e-3
  np.testing.assert_allclose(found[f"{name}/d"], d, rtol=1e-6)
  # The twentieth update used the schedule's value at 19.
  np.testing.assert_allclose(
    found["learning_rate/effective"], d * (1 - 19 / 32), rtol=1e-6
  )
  # The names of its fields tell the method, where nothing else is left.
  optimizer = Optimizer(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), build(name, SHAPE))
  named = flax_mechanic.scalars(nnx.state(optimizer)["opt_state"])
  assert named.keys() == found.keys()


@pytest.mark.parametrize("name", ["dog", "dowg"])
def test_scalars_read_the_distance_moved_and_the_rate(x64, name):
  fields = {
    "dog": {"opt__dog__init_step": 1e-2},
    "dowg": {"opt__dowg__init_estim_sq_dist": 1e-3, "opt__dowg__eps": 1e-12},
  }[name]
  points, grads, found = trajectory(build(name, **fields), 20)
  distance = {
    "dog": 1e-2 * (1 + np.linalg.norm(points[0])),
    "dowg": np.sqrt(1e-3),
  }[name]
  total = 0.0
  grew = 0
  for t in range(20):
    moved = np.linalg.norm(points[t] - points[0])
    grew += moved > distance
    distance = max(distance, moved)
    squared = np.sum(grads[t] ** 2)
    if name == "dog":
      total += squared
      rate = distance / np.sqrt(total)
    else:
      total += distance**2 * squared
      rate = distance**2 / np.sqrt(total)
    np.testing.assert_allclose(
      found[f"{name}/distance"][t], distance, rtol=1e-6
    )
    np.testing.assert_allclose(
      found["learning_rate/effective"][t], rate, rtol=1e-6
    )
    # It is the rate that was applied.
    np.testing.assert_allclose(
      points[t + 1] - points[t], -rate * grads[t], rtol=1e-5, atol=1e-12
    )
  assert grew > 10


@pytest.mark.parametrize("name", ["momo", "momo_adam"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_scalars_read_the_step_that_momo_took(x64, name, weight_decay):
  cap = 2.0
  tx = build(name, **under(name, learning_rate=cap, weight_decay=weight_decay))
  points, grads, found = trajectory(tx, 10)
  decay = cap * weight_decay / (1 + cap * weight_decay)
  mean, square = grads[0] * (name == "momo"), 0.0
  adaptive = 0
  for t in range(10):
    mean = 0.9 * mean + 0.1 * grads[t]
    direction = mean
    if name == "momo_adam":
      square = 0.999 * square + 0.001 * grads[t] ** 2
      direction = mean / (1e-8 + np.sqrt(square / (1 - 0.999 ** (t + 1))))
    step = points[t + 1] - (1 - decay) * points[t]
    rate = np.linalg.norm(step) / np.linalg.norm(direction)
    np.testing.assert_allclose(found[f"{name}/step"][t], rate, 1e-5, 1e-7)
    np.testing.assert_allclose(
      found["learning_rate/effective"][t], rate, 1e-5, 1e-7
    )
    np.testing.assert_allclose(step, -rate * direction, 1e-4, 1e-7)
    adaptive += rate < 0.99 * cap
  assert adaptive > 3


def test_scalars_read_the_mean_rate_of_cocob_s_bets(x64):
  alpha = 10.0
  tx = build("cocob", **under("cocob", alpha=alpha))
  points, grads, found = trajectory(tx, 10)
  L, G, R = np.full_like(points[0], 1e-8), 0.0, 0.0
  for t in range(10):
    L = np.maximum(L, np.abs(grads[t]))
    G = G + np.abs(grads[t])
    R = np.maximum(R - grads[t] * (points[t] - points[0]), 0)
    rate = np.mean((L + R) / (L * np.maximum(G + L, alpha * L)))
    np.testing.assert_allclose(
      found["learning_rate/effective"][t], rate, rtol=1e-5
    )
    np.testing.assert_allclose(
      found["cocob/reward"][t], R.sum(), rtol=1e-5, atol=1e-12
    )


def test_injected_mechanic_trains_is_donated_and_read():
  tx = optax.inject_hyperparams(
    flax_mechanic.mechanize, static_args=("num_betas",)
  )(
    optax.adamw(1.0),
    s_init=1e-4,
    weight_decay=optax.linear_schedule(1e-2, 0.0, 100),
    num_betas=4,
  )
  model = Mlp(4, nnx.Rngs(0))
  objects = {"model": model, "optimizer": Optimizer(model, tx)}
  graphdef, state = nnx.split(objects)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, inputs, targets):
    objects = nnx.merge(graphdef, state)
    loss = objects["optimizer"].minimize(
      objects["model"],
      lambda model, x, y: measure(model(x), y)[0],
      inputs,
      targets,
    )
    return nnx.state(objects), loss

  losses = []
  inputs, targets = (np.float32(array) for array in batch(0))
  for _ in range(100):
    state, loss = step(state, inputs, targets)
    losses.append(float(loss))
  assert step._cache_size() == 1
  assert losses[-1] < losses[0] / 2
  opt_state = nnx.merge(graphdef, state)["optimizer"].opt_state
  found = flax_mechanic.scalars(opt_state)
  s = np.asarray(optax.tree.get(nnx.as_pure(opt_state), "s"))
  assert s.shape == (4,)
  assert s.sum() > 1e-4
  np.testing.assert_allclose(found["mechanic/scale"], s.sum(), rtol=1e-6)


@pytest.mark.parametrize(
  "name",
  ["mechanic", pytest.param("schedule_free", marks=pytest.mark.slow)],
)
def test_parts_are_read_as_each_would_be_alone(name):
  tx = build(name, **under("schedule_free", base="mechanic"))
  params = {"a": network.params(), "b": jnp.ones(3)}
  grads = jax.tree.map(jnp.cos, params)
  bad = grads | {"b": jnp.full(3, jnp.nan)}

  def train(tx, of):
    x = of(params)
    state, update = tx.init(x), jax.jit(tx.update)
    for g in (*[grads] * 5, bad, grads, bad):
      updates, state = update(of(g), state, x)
      x = optax.apply_updates(x, updates)
    found = flax_mechanic.scalars(state)
    return found, readers.eval_params(state, x)

  parted = optax.partition({"a": tx, "b": tx}, {"a": "a", "b": "b"})
  found, evaluated = train(parted, lambda tree: tree)
  of_a, alone_a = train(tx, lambda tree: tree["a"])
  of_b, alone_b = train(tx, lambda tree: tree["b"])
  assert_close(evaluated, {"a": alone_a, "b": alone_b}, 1e-6)
  assert found["skipped"] == of_a["skipped"] + of_b["skipped"] == 2
  assert found["skipped_in_a_row"] == 1
  for key, combine in {
    "learning_rate/effective": np.mean,
    "mechanic/scale": np.mean,
    "mechanic/scale_min": np.min,
    "mechanic/scale_max": np.max,
  }.items():
    expected = combine([of_a[key], of_b[key]])
    np.testing.assert_allclose(found[key], expected, rtol=1e-5)
  masked = [optax.masked(tx, {"a": a, "b": not a}) for a in (True, False)]
  alike, _ = train(optax.chain(*masked), lambda tree: tree)
  assert_close(alike, found, 1e-6)


@pytest.mark.parametrize(
  "tx",
  [
    build("mechanic", SHAPE),
    build("mechanic", **under("mechanic", groups=""), accumulate_steps=2),
    optax.partition(
      {"a": build("mechanic"), "b": build("prodigy")},
      {"hidden": "a", "head": "b"},
    ),
    optax.chain(optax.clip(1.0), contrib.mechanize(optax.adamw(SHAPE))),
  ],
)
def test_each_member_of_an_ensemble_is_read_alone(tx):
  @jax.jit
  def train(scale):
    def step(_, carry):
      x, state = carry
      grads = jax.tree.map(lambda leaf: jnp.cos(scale * leaf), x)
      updates, state = tx.update(grads, state, x)
      return optax.apply_updates(x, updates), state

    x = network.params()
    return jax.lax.fori_loop(0, 6, step, (x, tx.init(x)))[1]

  scales = jnp.asarray([0.1, 1.0, 3.0])
  found = flax_mechanic.scalars(jax.vmap(train)(scales))
  assert len(np.unique(found["mechanic/scale"])) == 3
  alone = [flax_mechanic.scalars(train(scale)) for scale in scales]
  stacked = jax.tree.map(lambda *each: np.stack(each), *alone)
  assert {name: value.shape for name, value in found.items()} == {
    name: value.shape for name, value in stacked.items()
  }
  assert_close(found, stacked, 1e-5)


@pytest.mark.parametrize(
  "name",
  ["muon", "galore", "adafactor", "novograd", "dog", "schedule_free"],
)
def test_parameters_may_be_numbers(name):
  tx = build(name)

  def train(x):
    state = tx.init(x)
    for _ in range(2):
      grads = jax.tree.map(jnp.ones_like, x)
      updates, state = tx.update(grads, state, x)
      x = optax.apply_updates(x, updates)
    return x, state

  numbers = {"a": 1.0, "b": -2.0}
  assert_equal(train(numbers), train(jax.tree.map(jnp.float32, numbers)))
