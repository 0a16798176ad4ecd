"""Bad gradients: what is told from good ones, and that it changes nothing."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from optax.schedules import InjectStatefulHyperparamsState

import flax_mechanic
from configs import digits
from flax_mechanic import TrainState, mechanize
from flax_mechanic.errors import UsageError
from flax_mechanic.mechanic import sizes
from flax_mechanic.methods.features import accumulate
from flax_mechanic.methods.guard import GuardState, guard
from tests import network
from tests.optimizers import ADAMW_RATE, KINDS, cases, configure
from train import loop
from train.faults import gradients
from train.tasks.digits import Digits


def judge(norms, factor=sizes.FACTOR, young=sizes.YOUNG):
  """Returns the verdicts on gradients, given by the norms of their parts."""
  step = jax.jit(functools.partial(sizes.judge, factor=factor))
  state = sizes.init(np.size(norms[0]), jnp.float32)
  state = state._replace(young=jnp.int32(young))
  verdicts = []
  for each in norms:
    verdict, state = step(state, jnp.square(jnp.asarray(each, jnp.float32)))
    verdicts.append(jax.device_get(verdict))
  return verdicts, jax.device_get(state)


def skipped(norms, **options):
  verdicts, state = judge(norms, **options)
  at = [i for i, verdict in enumerate(verdicts) if not verdict.ok]
  assert state.skipped == len(at)
  return at


GOOD = [1.0, 1.5, 0.7, 1.2, 2.0, 0.9, 1.1, 1.4, 0.8, 1.3] * 2


@pytest.mark.parametrize("spike", [15.0, 1e6, 1e30, np.inf, np.nan])
def test_any_number_of_spikes_is_skipped(spike):
  rounds = 5 * [*GOOD, spike]
  assert skipped(rounds) == [20, 41, 62, 83, 104]
  # However many stand in a row, as long as it is no lasting change.
  assert skipped([*GOOD, *[spike] * 20, *GOOD]) == list(range(20, 40))
  assert skipped([*GOOD, *[spike, 1.0] * 50]) == list(range(20, 120, 2))


def test_what_is_usual_is_not_skipped():
  rng = np.random.default_rng(0)
  noisy = np.exp(rng.normal(size=1000) / 2)
  growing = 1.1 ** np.arange(300)
  vanishing = 0.9 ** np.arange(300) * np.exp(rng.normal(size=300) / 2)
  for norms in (noisy, growing, vanishing):
    verdicts, _ = judge(list(norms))
    assert all(verdict.ok for verdict in verdicts)
    assert not any(verdict.lasting for verdict in verdicts)


def test_a_spike_is_measured_against_the_gradients_of_late():
  smaller = [0.1 * norm for norm in GOOD * 8]
  assert skipped([*GOOD, *smaller, 1.5]) == [180]
  # Zeros are none of them, neither of the whole nor of a part.
  assert skipped([*GOOD, *[0.0] * 160, 1.5]) == []
  parts = [[1.0, 0.5 * (i < 20)] for i in range(180)]
  assert skipped([*parts, [1.0, 0.5]]) == []


def test_little_is_known_among_the_first():
  assert skipped([1.0, 35.0]) == []
  assert skipped([1.0, 60.0]) == [1]
  assert skipped([*GOOD[:11], 15.0]) == [11]


@pytest.mark.parametrize("value", [1e4, 1e-4])
def test_a_size_that_stays_is_the_usual_one(value):
  later = [value * norm for norm in GOOD * 3]
  verdicts, _ = judge([*GOOD, *later])
  lasting = [i for i, verdict in enumerate(verdicts) if verdict.lasting]
  assert lasting == [44]
  # From largest to largest.
  assert verdicts[44].change == pytest.approx(2 * [value], rel=0.5)
  at = [i for i, verdict in enumerate(verdicts) if not verdict.ok]
  assert at == (list(range(20, 44)) if value > 1 else [])
  # What the largest of the row say, not the last.
  row = [*[0.7 * value] * 20, 2.0 * value, *[0.7 * value] * 4]
  change = judge([*GOOD, *row])[0][-1].change
  assert change == pytest.approx(2 * [value], rel=0.3)
  # Each part has its own change, if any.
  parts = [[norm, 1e-6 * norm, 0.0] for norm in GOOD]
  parts += [[value * norm, *2 * [1e-6 * norm]] for norm in [*GOOD, *GOOD[:5]]]
  change = judge(parts)[0][-1].change
  assert change == pytest.approx([value, value, 1.0, 1.0], rel=0.5)
  # A spike of the new size is one.
  assert skipped([*GOOD, *later, 100 * value])[-1] == 80


def test_a_small_size_that_stays_is_small_by_those_of_late():
  # The smallest of long ago is forgotten.
  verdicts, _ = judge([*GOOD, 0.06, *GOOD * 8, *[0.03] * 25])
  assert [i for i, verdict in enumerate(verdicts) if verdict.lasting] == [205]


@pytest.mark.parametrize("before", [0, 1, 10])
def test_a_spike_while_sizes_change_is_not_what_they_change_to(before):
  larger = [10 * norm for norm in GOOD * 3]
  spike = [*GOOD, *larger[:before], 1e6, *larger[before:], 1e6, *GOOD]
  # Of the change all before the 25th, and a later spike.
  assert skipped(spike) == [*range(20, 44), 81]


def test_bad_gradients_come_together():
  assert skipped([*GOOD, 6.0, *GOOD]) == []
  assert skipped([*GOOD, 50.0, 6.0, *GOOD]) == [20, 21]
  assert skipped([*GOOD, np.nan, 6.0, 1.0, 6.0, *GOOD]) == [20, 21]
  # What is usual is accepted after it, too.
  assert skipped([*GOOD, 50.0, 3.0, *GOOD]) == [20]


def test_a_row_of_moderate_gradients_is_soon_accepted():
  # As where an update has led to a place with larger gradients. The limit is
  # 6.9, 1.5 times it 10.3.
  row = lambda *norms: skipped([*GOOD, *norms, *GOOD])
  assert row(10.0, *[5.0] * 5) == list(range(20, 25))
  assert row(10.0, *[5.0] * 4) == list(range(20, 25))
  # It may be over as soon.
  verdicts, _ = judge([*GOOD, *[10.0] * 24])
  assert not any(verdict.lasting for verdict in verdicts)
  assert row(*[11.0] * 24) == list(range(20, 44))
  assert row(*[11.0] * 5, *[5.0] * 19) == list(range(20, 44))
  # A larger one among them is not used, and counts for little.
  assert row(7.0, *[5.0] * 4, 1e6, 5.0) == list(range(20, 26))
  assert row(1e6, *[5.0] * 5) == list(range(20, 25))
  assert row(7.0, 10.0, np.nan, 5.0, 10.0, 5.0, 10.0) == list(range(20, 26))
  # What is not finite says nothing about sizes.
  assert row(*[np.nan] * 20, *[5.0] * 5) == list(range(20, 45))
  # From there on they are usual.
  assert row(*[10.0] * 6, 38.0) == list(range(20, 25))
  assert row(*[10.0] * 6, 42.0) == [*range(20, 25), 26]
  # For a part the limit is twice as high.
  good = [[norm, 10 * norm] for norm in GOOD]
  for part, last in (20.0, 25), (21.0, 44):
    spikes = [[part, 10.0]] * 24
    assert skipped([*good, *spikes, *good]) == list(range(20, last))
  # Unless the part is small.
  tiny = [[norm, 1e-4] for norm in GOOD]
  assert skipped([*tiny, *[[10.0, 0.1]] * 24]) == list(range(20, 25))
  # The size is not that of small ones before, nor is a spike among those used.
  for size, others in (7.0, 5), (1e6, 24):
    norms = [*GOOD, *[0.01] * others, size, 0.01]
    assert skipped(norms) == [20 + others]


def test_the_last_examples_that_are_wrong_are_no_spikes():
  vanishing = [*GOOD, *0.9 ** np.arange(150)]
  wrong = lambda size, others: [size, *[1e-7] * others] * 20
  spikes = lambda others: list(range(170, 170 + 20 * (others + 1), others + 1))
  assert skipped([*vanishing, *wrong(2.0, 15)]) == spikes(15)[:6]
  # They are if they are larger than any that was used, or very rare; those in a
  # row are one.
  assert skipped([*vanishing, *wrong(2.1, 15)]) == spikes(15)
  assert skipped([*vanishing, *wrong(2.0, 64)]) == spikes(64)
  assert skipped([*vanishing, *[2.0] * 20, 1e-7]) == list(range(170, 190))
  # So is a part alone that is larger than it was.
  parts = [[norm, norm / 10] for norm in (*vanishing, *wrong(0.0, 15))]
  parts[170::16] = [[0.5, 1.0]] * 20
  assert skipped(parts) == spikes(15)
  # Spikes of before a lasting change are not counted.
  changed = [*GOOD, *[1e3, 1.0] * 20, *[1e4] * 25, *1e4 * 0.9 ** np.arange(150)]
  assert skipped([*changed, 9e3])[-1] == len(changed)
  # A first gradient that was bad was not used.
  assert skipped([1e3, *vanishing, *wrong(2.1, 15)])[-20:] == [
    step + 1 for step in spikes(15)
  ]


def test_gradients_that_are_not_finite_are_no_size_that_stays():
  norms = [*GOOD, *[np.nan] * 100, 1e6, 1.0]
  assert skipped(norms) == list(range(20, 121))
  # Nor do they interrupt one.
  norms = [*GOOD, *[1e6] * 12, np.nan, *[1e6] * 13]
  assert skipped(norms) == list(range(20, 45))
  # After it there are spikes as before.
  assert skipped([*norms, 1e8]) == [*range(20, 45), 46]


def test_first_gradients_that_were_bad():
  for first in ([1e6], [1e6, 1e5, 1e6], [60.0]):
    verdicts, _ = judge([*first, *GOOD])
    assert [verdict.restart for verdict in verdicts].index(True) == len(first)
    assert sum(verdict.restart for verdict in verdicts) == 1
    assert all(verdict.ok for verdict in verdicts[len(first) + 1 :])
  # Not later, and not if they are not that much smaller.
  for norms in ([*GOOD, 1e-3], [1.0, 0.03], [0.1**i for i in range(10)]):
    assert not any(verdict.restart for verdict in judge(norms)[0])


def test_the_first_that_are_known_of_a_saved_run():
  unknown = functools.partial(judge, young=-sizes.YOUNG)
  # Less is known, as at the start, but there is no start to go back to.
  for norms in ([1.0, *[6.0] * 30], [*GOOD, 15.0]):
    ok = lambda judged: [verdict.ok for verdict in judged[0]]
    assert ok(unknown(norms)) == ok(judge(norms))
  verdicts, state = unknown([1e3, *[1.0] * 20])
  assert not any(verdict.restart for verdict in verdicts)
  assert state.young == 0


def test_zeros_are_none():
  verdicts, state = judge([0.0] * 30)
  assert not any(verdict.ok for verdict in verdicts)
  assert state.skipped == 0
  jax.tree.map(np.testing.assert_array_equal, state, sizes.init(1, jnp.float32))
  # Later they are as good as others, and not a size that stays.
  verdicts, _ = judge([*GOOD, *[0.0] * 30, 1.0])
  assert all(verdict.ok for verdict in verdicts)
  assert not any(verdict.lasting for verdict in verdicts)


def test_a_part_alone():
  good = [[norm, 0.05 * norm, 0.0] for norm in GOOD]
  spike = lambda part, value: [
    value if i == part else each for i, each in enumerate([1.0, 0.05, 0.0])
  ]
  # The whole is hardly larger. The largest of the part was 0.1.
  assert skipped([*good, spike(1, 0.9)]) == [20]
  assert skipped([*good, spike(1, 0.6)]) == []
  # It is much larger than it was, and yet far smaller than the whole.
  tiny = [[norm, 1e-4 * norm, 0.0] for norm in GOOD]
  assert skipped([*tiny, [1.0, 1e-2, 0.0]]) == []
  # A part's first gradient.
  assert skipped([*good, spike(2, 1.0)]) == []


def test_without_a_factor_only_what_is_not_finite_is_skipped():
  norms = [1e6, *GOOD, 1e6, np.nan, np.inf, *[1e-6] * 30]
  assert skipped(norms, factor=0.0) == [22, 23]
  verdicts, _ = judge(norms, factor=0.0)
  assert not any(each.restart or each.lasting for each in verdicts)


def what_stays(state):
  """Returns a state without sizes, schedules, and the keys of noise."""
  is_apart = lambda node: isinstance(
    node,
    InjectStatefulHyperparamsState
    | sizes.Sizes
    | optax.contrib.DifferentiallyPrivateAggregateState,
  )

  def without(node):
    if isinstance(node, InjectStatefulHyperparamsState):
      return what_stays(node.inner_state)
    if is_apart(node):
      return None
    is_key = jax.dtypes.issubdtype(node.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(node) if is_key else node

  return jax.tree.map(without, state, is_leaf=is_apart)


@functools.cache
def make_run(name):
  """Returns the start and the compiled step of a run."""
  config = configure(
    flax_mechanic.add_optimizer_config(ConfigDict({"learning_rate": 0.0})), name
  )
  schedule = optax.linear_schedule(1.0, 0.5, 100)
  state = TrainState.create(
    apply_fn=None,
    params=network.params(),
    tx=flax_mechanic.make_optimizer(config, schedule),
  )

  @jax.jit
  def step(state, batch, factor):
    loss = lambda params, x, y: factor * network.loss(params, x, y)
    state, value = state.minimize(loss, *batch)[:2]
    return state, value

  return state, step


# One of each kind; the others are slow.
QUICK = (
  *("mechanic", "adamw", "adafactor", "prodigy", "momo", "sam"),
  *("schedule_free", "dpsgd"),
)


@pytest.mark.parametrize("name", cases(KINDS, QUICK))
def test_bad_gradients_change_nothing(name):
  state, step = make_run(name)
  private = "per_example" in flax_mechanic.methods()[name].needs
  # Of examples each of which is clipped, none is too large.
  bad = {0: np.nan, 13: np.nan, 14: np.inf} | ({} if private else {16: 1e6})
  values = []
  for i in range(30):
    before = state
    state, value = step(state, network.batch(i), bad.get(i, 1.0))
    values.append(float(value))
    if i in bad:
      jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, what_stays(state.opt_state)),
        (before.params, what_stays(before.opt_state)),
      )
  scalars = flax_mechanic.scalars(state.opt_state)
  assert scalars["skipped"] == len(bad)
  assert scalars["skipped_in_a_row"] == 0
  assert np.isfinite(
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])
  ).all()
  changed = jax.tree.map(np.array_equal, state.params, network.params())
  assert not any(jax.tree.leaves(changed))


def test_dtypes_need_no_promotion():
  tx = guard(optax.sgd(0.1))
  for dtype in (jnp.float32, jnp.bfloat16):
    params = network.params(dtype)
    with jax.numpy_dtype_promotion("strict"):
      state = jax.eval_shape(tx.init, params)
      jax.eval_shape(tx.update, params, state, params)


def test_schedules_follow_the_job_s_steps():
  state, step = make_run("adamw")
  for factor in (1.0, np.nan, np.nan):
    state, _ = step(state, network.batch(0), factor)
  rate = flax_mechanic.scalars(state.opt_state)["learning_rate/effective"]
  expected = ADAMW_RATE * (1 - 0.5 * 2 / 100)
  np.testing.assert_allclose(rate, expected, rtol=1e-6)
  assert optax.tree.get(state.opt_state, "mu")["head"].any()


@pytest.mark.parametrize(
  "inner",
  # The second one's state starts from the parameters.
  [optax.adam(0.1), optax.contrib.schedule_free_sgd(0.1)],
  ids=["adam", "schedule_free"],
)
def test_a_first_gradient_that_was_bad_is_forgotten(inner):
  tx = guard(inner)
  update = jax.jit(tx.update)
  x = network.params()
  state = tx.init(x)
  grad = jax.jit(jax.grad(network.loss))
  gradient = lambda i: grad(x, *network.batch(i))
  _, state = update(jax.tree.map(lambda g: 1e6 * g, gradient(0)), state, x)
  moved, state = update(gradient(1), state, x)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved))
  assert state.sizes.skipped == 1
  updates, state = update(gradient(2), state, x)
  wanted, alone = inner.update(gradient(2), inner.init(x), x)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)
  jax.tree.map(close, (updates, state.inner_state), (wanted, alone))


@pytest.mark.parametrize(
  ("dtype", "groups"), [(jnp.float32, ""), (jnp.bfloat16, ".*")]
)
def test_mechanic_goes_back_to_where_it_started(dtype, groups):
  # With a scale at which the first update wrecks the parameters.
  tx = mechanize(optax.sgd(1.0), s_init=1e-3, groups=groups)
  update, gradient = map(jax.jit, (tx.update, jax.grad(network.loss)))
  x = network.params(dtype)
  start = tx.init(x)
  state = start
  for i, factor in enumerate((1e6, 1.0)):
    g = gradient(x, *network.batch(i, dtype))
    g = jax.tree.map(lambda g, f=factor: (f * g).astype(dtype), g)
    if i == 1:
      g = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), x)
    updates, state = update(g, state, x)
    x = optax.apply_updates(x, updates)
    if i == 0:
      wrecked = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(x))
  assert wrecked > 10
  # To the rounding of where they were.
  tolerance = float(jnp.finfo(dtype).eps) * wrecked
  jax.tree.map(
    lambda ours, first: np.testing.assert_allclose(
      np.float32(ours), np.float32(first), atol=tolerance
    ),
    x,
    network.params(dtype),
  )
  assert state.skipped == 1
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  rest = lambda state: state._replace(sizes=None)
  jax.tree.map(close, rest(state), rest(start))


def test_an_adopted_start_is_not_gone_back_to():
  tx = mechanize(optax.sgd(1.0))
  x = network.params()
  state = tx.init(x)._replace(count=jnp.int32(1000))
  update = jax.jit(tx.update)
  for value in (1.0, 1e-6):
    g = jax.tree.map(lambda x, v=value: jnp.full_like(x, v), x)
    updates, state = update(g, state, x)
  assert any(np.any(leaf) for leaf in jax.tree.leaves(updates))
  assert state.count == 1002


def test_a_lasting_change_costs_mechanic_what_its_base_remembers():
  options = {"relative_s_init": 0.01, "eps": 1e-20, "mean_decay": True}
  tx = mechanize(optax.adam(1.0), **options)
  update, gradient = map(jax.jit, (tx.update, jax.grad(network.loss)))
  x = network.params()
  state = tx.init(x)
  for i in range(60):
    g = gradient(x, *network.batch(i))
    if i >= 30:
      g = jax.tree.map(lambda g: 1e-4 * g, g)
    before = state
    updates, state = update(g, state, x)
    x = optax.apply_updates(x, updates)
    count = state.base_optimizer_state[0].count
    assert count == (i + 1 if i < 54 else i - 53)
    if i == 54:
      change = np.asarray(state.m / before.m)
      # Largest |h| of a tuner with a short memory is the last one's.
      assert np.all(change < 1e-2)
      assert np.all(change[1:] > 1e-5)
      np.testing.assert_allclose(state.scale, before.scale, rtol=0.2)
      assert state.mean_norm < 1e-2 * before.mean_norm


@pytest.mark.parametrize("way", ["pmap", "ZeRO-1", "accumulated"])
def test_all_devices_skip_what_is_bad_on_one(way):
  tx = guard(optax.adam(0.01))
  model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
  start = nnx.to_pure_dict(nnx.state(model))
  bad = jnp.ones([8, 8]).at[3, 0].set(jnp.nan)
  if way == "pmap":
    params = jax_utils.replicate(start)
    state = jax.pmap(tx.init)(params)

    def step(params, state, x):
      g = jax.grad(lambda p: jnp.mean(x @ p["kernel"]))(params)
      return tx.update(jax.lax.pmean(g, "d"), state, params)

    for x in (jnp.ones([8, 1, 8]), bad[:, None]):
      updates, state = jax.pmap(step, "d")(params, state, x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    np.testing.assert_array_equal(state.sizes.skipped, np.ones(8))
    return
  mesh = jax.make_mesh((8,), ("data",))
  with jax.set_mesh(mesh):
    options = {"shard_over": ("data",)} if way == "ZeRO-1" else {}
    if way == "accumulated":
      tx = accumulate(tx, 2)
    optimizer = flax_mechanic.Optimizer(model, tx, **options)
    step = nnx.jit(
      lambda model, optimizer, x: optimizer.minimize(
        model, lambda model, x: jnp.mean(model(x)), x
      )
    )
    for x in (jnp.ones([8, 8]), bad, jnp.ones([8, 8]), jnp.ones([8, 8])):
      step(model, optimizer, jax.device_put(x, P("data")))
  assert flax_mechanic.scalars(optimizer.opt_state)["skipped"] == 1
  assert np.isfinite(model.kernel[...]).all()


def test_a_guard_is_put_around_what_has_none():
  is_guard = lambda node: isinstance(node, GuardState)

  def guards(name, peak=None, **fields):
    config = flax_mechanic.add_optimizer_config(ConfigDict(), name)
    config.learning_rate = 1.0
    config.update(fields)
    schedule = optax.constant_schedule(2.0)
    tx = flax_mechanic.make_optimizer(config, schedule, peak=peak)
    state = tx.init(network.params())
    nodes = jax.tree.leaves(state, is_leaf=is_guard)
    return sum(map(is_guard, nodes)), "skipped" in flax_mechanic.scalars(state)

  assert guards("adamw") == (1, True)
  assert guards("adamw", accumulate_steps=2, grad_clip=1.0) == (1, True)
  assert guards("adamw", guard=False) == (0, False)
  # A job's own optimizer under its own schedule is as it was.
  assert guards("adamw", peak=2.0) == (0, False)
  assert guards("adamw", peak=2.0, guard=True) == (1, True)
  assert guards("prodigy", peak=2.0) == (1, True)
  assert guards("dpsgd") == (1, True)
  assert guards("dpsgd", guard=False) == (0, False)
  # Mechanic has its own, and still skips what is not finite.
  assert guards("mechanic") == guards("mechanic", guard=False) == (0, True)


def test_mechanic_without_the_guard_takes_spikes():
  config = flax_mechanic.add_optimizer_config(ConfigDict(), "mechanic")
  config.opt.mechanic.base = "sgd"
  spikes = {}
  for config.guard in (True, False):
    tx = flax_mechanic.make_optimizer(config)
    x, state = network.params(), tx.init(network.params())
    update = jax.jit(tx.update)
    for value in (1.0, 1e9):
      g = jax.tree.map(lambda x, v=value: jnp.full_like(x, v), x)
      _, state = update(g, state, x)
    spikes[config.guard] = int(flax_mechanic.scalars(state)["skipped"])
  assert spikes == {True: 1, False: 0}


@pytest.fixture
def bad_job(monkeypatch):
  """A function: steps -> a config of a job whose loss is NaN in them."""
  loss, train_batch = Digits.loss, Digits.train_batch
  bad_steps = set()

  def batch(task, step, rows=slice(None)):
    found = train_batch(task, step, rows)
    if step + 1 in bad_steps:
      found["label"] = np.full_like(found["label"], 255)
    return found

  def bad(task, model, batch):
    value, metrics = loss(task, model, batch)
    return value * jnp.where(batch["label"][0] == 255, jnp.nan, 1.0), metrics

  def make(steps, **fields):
    bad_steps.update(steps)
    config = digits.get_config("mlp")
    config.update({"num_steps": 12, **fields})
    config.model.widths = (8,)
    config.schedule.warmup_steps = 1
    return config

  monkeypatch.setattr(Digits, "loss", bad)
  monkeypatch.setattr(Digits, "train_batch", batch)
  return make


def saved_steps(workdir):
  return sorted(int(each.name) for each in workdir.glob("checkpoints/[0-9]*"))


def test_a_run_whose_gradients_are_all_bad_ends(bad_job, tmp_path, capsys):
  config = bad_job(range(1, 13), max_skipped_in_a_row=6, checkpoint_every=2)
  sentence = "step 6: the last 6 gradients were.* same command starts again"
  with pytest.raises(UsageError, match=sentence):
    loop.train(config, tmp_path)
  told = [
    line.partition(":")[0]
    for line in capsys.readouterr().out.splitlines()
    if "skipped a gradient that is not finite" in line
  ]
  assert told == ["step 1", "step 2", "step 4"]


def test_a_run_may_skip_any_number(bad_job, tmp_path, capsys):
  config = bad_job(range(1, 9), max_skipped_in_a_row=0, num_steps=8)
  loop.train(config, tmp_path)
  assert "step 8: skipped" in capsys.readouterr().out
  assert saved_steps(tmp_path) == [8]


def test_a_checkpoint_waits_for_a_gradient_that_is_accepted(tmp_path, bad_job):
  config = bad_job([4, 5, 8], checkpoint_every=4, checkpoint_keep=9)
  expected = loop.train(config, tmp_path)
  assert saved_steps(tmp_path) == [7, 10, 12]
  for step in (10, 12):
    shutil.rmtree(tmp_path / "checkpoints" / str(step))
  assert loop.train(config, tmp_path) == expected
  assert saved_steps(tmp_path) == [7, 10, 12]


def test_a_checkpoint_is_saved_if_every_other_gradient_is_skipped(
  tmp_path, bad_job
):
  loop.train(bad_job([2, 4, 6, 8], num_steps=9, checkpoint_every=4), tmp_path)
  assert saved_steps(tmp_path) == [6, 9]


@pytest.mark.parametrize("last", [9, pytest.param(40, marks=pytest.mark.slow)])
def test_a_run_of_bad_gradients_resumes_from_before(
  tmp_path, monkeypatch, bad_job, last
):
  config = bad_job(
    range(4, 41),
    num_steps=last,
    max_skipped_in_a_row=6,
    checkpoint_every=1,
    checkpoint_keep=2,
  )
  for _ in range(2):
    sentence = "step 9: the last 6 gradients.* same command resumes at step 3;"
    with pytest.raises(UsageError, match=sentence):
      loop.train(config, tmp_path)
    assert saved_steps(tmp_path) == [2, 3]
  # One that is stopped within them is saved there, and has as many left.
  with monkeypatch.context() as patch:
    agreed = lambda _, step: step == 7
    patch.setattr(loop.processes.Stop, "agreed", agreed)
    loop.train(config, tmp_path)
  config.num_steps = 40
  with pytest.raises(UsageError, match=r"step 13: the last 6.* at step 7;"):
    loop.train(config, tmp_path)


def test_what_was_skipped_before_a_resume_is_not_told_again():
  known = sizes.init(1, jnp.float32)._replace(skipped=jnp.int32(3))
  skips = loop._Skips({"optimizer": {"opt_state": known}}, 0, 4)
  at = lambda skipped: {"skipped": skipped, "skipped_in_a_row": 1}
  told = [list(skips.told(5 + i, at(n))) for i, n in enumerate((3, 4, 4))]
  assert told[:2] == [[], []]
  assert told[2][0].startswith("step 6: skipped")


@pytest.mark.slow
def test_the_command_shows_what_the_guard_saves(capsys):
  method = "--method=adamw: optimizer=adamw learning_rate=0.03"
  gradients.main(["--num_steps=60", "--seeds=1", method])
  worst = lambda row: float(row.split("/")[1].split(" ")[0])
  kinds = [
    {
      row.split("|")[1].strip(): worst(row)
      for row in table.splitlines()
      if "/" in row
    }
    for table in capsys.readouterr().out.split("with the guard:")
  ]
  without, with_guard = kinds
  assert without.keys() == with_guard.keys()
  for kind in ("nan, ten of them", "1e+06, ten of them", "nan, at step 1"):
    assert with_guard[kind] < 2 < without[kind]
