"""S follows the schedule: it stands still where the base does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic import make_schedule, mechanize
from flax_mechanic.mechanic import gain
from tests import network
from tests.test_groups import FLAG, numpy_run

SCHEDULES = {
  "rises and falls": optax.join_schedules(
    [
      optax.linear_schedule(0.0, 1.0, 10),
      optax.cosine_decay_schedule(1.0, 40, alpha=0.1),
    ],
    [10],
  ),
  "drops": optax.piecewise_constant_schedule(1.0, {20: 0.1, 40: 0.1}),
}


def exact_gains(schedule, counts):
  rates = np.asarray(jax.vmap(schedule)(counts))
  peaks = np.maximum.accumulate(rates)
  return np.divide(rates, peaks, out=np.ones_like(rates), where=peaks > 0)


def by_flag(name="mechanic", schedule=None, **options):
  config = flax_mechanic.add_optimizer_config(ConfigDict(), name)
  config.opt[name].update(options)
  return flax_mechanic.make_optimizer(config, schedule)


@pytest.mark.parametrize(
  ("name", "peak"), [("rises and falls", 3e-4), ("drops", 1.0)]
)
def test_equals_numpy(name, peak):
  schedule = lambda count: peak * SCHEDULES[name](count)
  options = {"weight_decay": 1e-3, "eps": 1e-20}
  with jax.enable_x64(True):
    tx = mechanize(
      optax.adam(schedule),
      groups=".*",
      relative_s_init=0.01,
      mean_decay=True,
      spike_factor=0.0,
      schedule=schedule,
      **options,
    )
    x, state, _ = network.train(tx, 60, jnp.float64)
    leaves, S = numpy_run(
      optax.adam(schedule),
      [0, 1, 2],
      60,
      0.01,
      True,
      *options.values(),
      gain=exact_gains(schedule, np.arange(60)).__getitem__,
    )
  for ours, theirs in zip(jax.tree.leaves(x), leaves, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(state.scale, S, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "num_steps"),
  [
    ("warmup_cosine", 50),
    ("warmup_stable_decay", 3000),
    ("rsqrt", 200_000),
  ],
)
def test_finds_the_peak_of_any_schedule(name, num_steps):
  schedule = make_schedule(name, num_steps, num_steps // 7)
  counts = np.arange(0, num_steps * 2, max(1, num_steps // 500))
  exact = exact_gains(schedule, counts)
  at = lambda count: gain.of(schedule, optax.ScaleByScheduleState(count))
  found = jax.jit(jax.vmap(at))(counts)
  np.testing.assert_allclose(found, exact, atol=0.03)


def test_a_rate_below_0_is_0():
  state = optax.ScaleByScheduleState(jnp.int32(20))
  assert gain.of(optax.linear_schedule(1.0, -1.0, 20), state) == 0


def test_stands_still_after_the_end():
  schedule = make_schedule("warmup_linear", 20, 2)
  tx = by_flag(schedule=schedule)
  short, at_the_end, _ = network.train(tx, 20)
  long, after_it, _ = network.train(tx, 40)
  scale = lambda state: flax_mechanic.scalars(state)["mechanic/scale"]
  assert scale(at_the_end) == scale(after_it) > 0
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), short, long
  )


@pytest.mark.parametrize(
  ("name", "options", "given"),
  [
    ("mechanic", {}, True),
    ("mechanic", {"follow_schedule": False}, False),
    ("mechanize", {}, False),
    ("mechanize", {"follow_schedule": True}, True),
  ],
)
def test_is_an_option_of_the_flag(name, options, given):
  schedule = make_schedule("warmup_linear", 40, 4)
  defaults = {"groups": ".*", **FLAG} if name == "mechanic" else {}
  if given:
    defaults["schedule"] = schedule
  ours = network.train(by_flag(name, schedule, **options), 40)[0]
  exact = network.train(mechanize(optax.adamw(schedule), **defaults), 40)[0]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), ours, exact
  )


def test_skipped_gradients_do_not_delay_it():
  schedule = make_schedule("warmup_cosine", 40, 4)
  tx = by_flag(schedule=schedule)

  @jax.jit
  def step(params, state, factor, *batch):
    gradient = jax.grad(network.loss)(params, *batch)
    gradient = jax.tree.map(lambda g: g * factor, gradient)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  params = network.params()
  state, scales = tx.init(params), []
  for t in range(50):
    factor = jnp.nan if 10 <= t < 25 else 1.0
    params, state = step(params, state, factor, *network.batch(t))
    found = flax_mechanic.scalars(state)
    scales.append(float(found["mechanic/scale"]))
  assert found["skipped"] == 15
  assert scales[30] != scales[35]
  assert len(set(scales[40:])) == 1


def test_wants_the_base_s_schedule():
  with pytest.raises(ValueError, match=r"give it to both"):
    mechanize(
      optax.sgd(1.0), schedule=optax.cosine_decay_schedule(1.0, 9)
    ).init(jnp.ones(2))
