"""`mechanize` against optax's, against NumPy, and on meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic import MechanicState, UsageError, mechanize
from tests import network

# A table, since XLA rounds a schedule's float32 differently in each program.
_SCHEDULE = np.asarray(
  optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 200)(np.arange(400))
)
BASES = {
  "adamw": lambda: optax.adamw(lambda count: jnp.asarray(_SCHEDULE)[count]),
  "sgd": lambda: optax.sgd(1.0, momentum=0.9),
  "lion": lambda: optax.lion(1.0),
}


def relative_error(tree, reference):
  """Returns the largest error of a leaf over the leaf's largest value."""

  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-300)

  return max(jax.tree.leaves(jax.tree.map(leaf, tree, reference)))


def numpy_run(base, tune, x, steps, decays_after_base=False):
  """Mechanic over flat float64 vectors; `tune(h)` returns the new S."""
  lam, eps = 1e-2, 1e-8
  flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
  unflat = ravel_pytree(x)[1]
  base_state, base_update = base.init(x), jax.jit(base.update)
  grad = jax.jit(jax.grad(network.loss))
  x0 = xt = flat(x)
  S = tune(None)
  for t in range(steps):
    gradient = grad(unflat(xt), *network.batch(t, jnp.float64))
    update, base_state = base_update(gradient, base_state, unflat(xt))
    g, u = flat(gradient), flat(update)
    delta = (xt - x0) / (S + eps)
    seen = xt + u if decays_after_base else xt
    norms = np.linalg.norm(g), np.linalg.norm(seen) + eps
    h = delta @ (g + lam * S * norms[0] / norms[1] * seen)
    S = tune(h)
    xt = x0 + S * (delta + u)
  return unflat(xt)


class NumpyTuner:
  """The scalar part of Algorithm 1 as each implementation has it."""

  def __init__(self, variant, s_init, n=6):
    self.variant, self.s_init, self.n = variant, s_init, n
    self.beta = 1 - 10.0 ** -np.arange(1, n + 1)
    self.v = self.r = np.zeros(n)
    self.m = np.full(n, 1e-6 if variant == "pytorch" else 0.0)
    self.s = np.full(n, s_init if variant == "optax" else 0.0)

  def __call__(self, h):
    if h is None:
      return sum(self.s)
    beta, eps = self.beta, 1e-8
    if self.variant == "optax":
      h = -h  # optax's offset points the other way
      self.r = beta * self.r + np.clip(h, -self.m, self.m) * self.s
      self.m = np.maximum(beta * self.m, abs(h) + eps)
    else:
      self.r = np.maximum(0, beta * self.r - self.s * h)
      self.m = np.maximum(beta * self.m, abs(h))
    self.v = beta**2 * self.v + h * h
    wealth = self.s_init / self.n * self.m + np.maximum(self.r, 0)
    self.s = wealth / (np.sqrt(self.v) + eps)
    return sum(self.s)


@pytest.mark.parametrize(
  ("base", "dtype", "tolerance"),
  [
    *((base, jnp.float64, 1e-10) for base in BASES),
    # Another order of summation moves optax's own float32 result as much.
    ("adamw", jnp.float32, 3e-3),
  ],
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
@pytest.mark.parametrize("variant", ["optax", "pytorch"])
def test_equals_numpy(base, variant):
  s_init = 1e-6 if variant == "optax" else 1e-5
  with jax.enable_x64(True):
    tx = mechanize(BASES[base](), s_init=s_init, variant=variant)
    x, state, _ = network.train(tx, 200, jnp.float64)
    tuner = NumpyTuner(variant, s_init)
    reference = numpy_run(
      BASES[base](),
      tuner,
      network.params(jnp.float64),
      200,
      decays_after_base=variant == "pytorch",
    )
    ours = (x, state.m, state.v, state.r, state.s)
    theirs = (reference, tuner.m, tuner.v, tuner.r, tuner.s)
    assert relative_error(ours, theirs) < 1e-9
    assert float(jnp.sum(state.s)) > 1e-4


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_low_precision_x0_is_the_same_sequence(base):
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(x.dtype), network.params()
  )
  half = mechanize(BASES[base](), x0_dtype="bfloat16")
  # From parameters that are not rounded yet, and replaced after `init`.
  state = half.init(jax.tree.map(jnp.zeros_like, rounded))
  step, x = network.make_step(half), network.params()
  whole_tx = mechanize(BASES[base]())
  whole, whole_x = whole_tx.init(rounded), rounded
  gradient, whole_update = map(
    jax.jit, (jax.grad(network.loss), whole_tx.update)
  )
  for i in range(100):
    # The first gradient is taken where the parameters are not rounded yet.
    g = gradient(x, *network.batch(i))
    x, state, _ = step(x, state, *network.batch(i))
    updates, whole = whole_update(g, whole, whole_x)
    whole_x = optax.apply_updates(whole_x, updates)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.x0))
  assert relative_error(state.x0, rounded) == 0
  assert relative_error(x, whole_x) < 1e-3


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


@pytest.mark.parametrize(
  "chain",
  [
    lambda tx: optax.chain(tx, optax.ema(0.9)),
    lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx), optax.ema(0.9)),
    lambda tx: optax.chain(optax.chain(tx, optax.identity()), optax.ema(0.9)),
    lambda tx: optax.named_chain(("mechanic", tx), ("ema", optax.ema(0.9))),
    lambda tx: optax.chain(optax.MultiSteps(tx, 2), optax.ema(0.9)),
    lambda tx: optax.chain(optax.masked(tx, True), optax.ema(0.9)),
  ],
)
@pytest.mark.parametrize("wrap", [jax.jit, lambda update: update])
def test_what_would_follow_in_a_chain_is_refused(chain, wrap):
  tx = chain(mechanize(optax.sgd(1.0)))
  x = network.params()
  state, update = tx.init(x), wrap(tx.update)
  with pytest.raises(UsageError, match=r"^ema follows mechanic .* base, where"):
    update(x, state, x)


@pytest.mark.parametrize(
  "chain",
  [
    lambda tx: optax.chain(optax.clip(1e6), tx),
    lambda tx: optax.chain(tx, optax.identity()),
    lambda tx: optax.chain(tx, optax.masked(optax.scale(0.5), lambda _: False)),
    lambda tx: optax.named_chain(("clip", optax.clip(1e6)), ("mechanic", tx)),
    lambda tx: optax.chain(optax.clip(1e6), optax.chain(optax.identity(), tx)),
  ],
)
def test_a_chain_that_ends_with_mechanic_is_mechanic(chain):
  base = optax.chain(optax.sgd(1.0), optax.ema(0.9), optax.scale(0.5))
  alone = network.train(mechanize(base), 20)
  chained = network.train(chain(mechanize(base)), 20)
  np.testing.assert_array_equal(alone[2], chained[2])


def test_shapes_are_taken():
  params = network.params()
  shapes = jax.eval_shape(lambda: params)
  for tx in (
    mechanize(optax.adamw(1.0), x0_dtype="bfloat16"),
    flax_mechanic.make_optimizer(
      flax_mechanic.add_optimizer_config(ConfigDict(), "mechanic")
    ),
  ):
    assert jax.eval_shape(tx.init, params) == tx.init(shapes)


def test_options_are_hyperparameters_that_can_be_injected():
  rho = 0.003
  base = optax.adamw(1.0)
  inject = optax.inject_hyperparams(mechanize, static_args="num_betas")
  options = {"relative_s_init": rho, "weight_decay": 1e-4, "eps": 1e-20}
  direct = network.train(mechanize(base, **options), 50)
  injected = network.train(inject(base, **options), 50)
  np.testing.assert_allclose(injected[2], direct[2], rtol=1e-4)
  scheduled = inject(
    base, **options | {"relative_s_init": lambda count: jnp.float32(rho)}
  )
  np.testing.assert_allclose(
    network.train(scheduled, 50)[2], direct[2], rtol=1e-4
  )


def test_params_are_asked_for():
  tx = mechanize(optax.sgd(1.0))
  state = tx.init(network.params())
  with pytest.raises(ValueError, match="needs params"):
    tx.update(network.params(), state)


@pytest.mark.parametrize(
  "axis_type",
  [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
)
def test_sharded_equals_one_device(axis_type):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  place = lambda tree: network.place(tree, mesh)
  tx = mechanize(optax.adamw(1.0))
  with jax.set_mesh(mesh), jax.enable_x64(True):
    x = network.params(jnp.float64)
    gradient = jax.jit(jax.grad(network.loss))
    grads = [gradient(x, *network.batch(i, jnp.float64)) for i in range(20)]
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
      jax.tree.leaves(many_state.x0),
      jax.tree.leaves(network.SPECS),
      strict=True,
    ):
      assert leaf.sharding.is_equivalent_to(
        NamedSharding(mesh, spec), leaf.ndim
      )
    hlo = update.lower(place(g), many_state, many).compile().as_text()
    assert not re.search(r"all-gather", hlo)


def poison(grads, value):
  """Puts `value` into one entry of one leaf."""
  head = grads["head"].at[0, 0].set(value)
  return grads | {"head": head}


def run_with(tx, bad_steps, steps=300):
  """Trains with gradients that are changed at some steps.

  Args:
    tx: the transformation.
    bad_steps: step -> function of the gradient.
    steps: how many.

  Returns:
    The losses and the states after each step.
  """
  gradient = jax.jit(jax.value_and_grad(network.loss))

  @jax.jit
  def update(grads, state, x):
    updates, state = tx.update(grads, state, x)
    return optax.apply_updates(x, updates), state

  x = network.params()
  state = tx.init(x)
  losses, states = [], []
  for i in range(steps):
    value, grads = gradient(x, *network.batch(i))
    grads = bad_steps.get(i, lambda grads: grads)(grads)
    x, state = update(grads, state, x)
    losses.append(value)
    states.append((x, state))
  return np.asarray(losses), states


@functools.cache
def good_run(base):
  return run_with(mechanize(BASES[base]()), {})


# Each base meets each value, and each value comes at each step.
@pytest.mark.parametrize(
  ("base", "values"),
  [
    ("adamw", (np.nan, np.inf, 1e30, np.nan)),
    ("sgd", (np.inf, 1e30, np.nan, np.inf)),
    ("lion", (1e30, np.nan, np.inf, 1e30)),
  ],
)
def test_a_bad_gradient_costs_its_step_and_nothing_else(base, values):
  tx = mechanize(BASES[base]())
  bad = {
    step: functools.partial(poison, value=value)
    for step, value in zip((0, 1, 50, 51), values, strict=True)
  }
  losses, states = run_with(tx, bad)
  before, after = states[49], states[51]
  unchanged = jax.tree.map(np.array_equal, before, after)
  assert all(jax.tree.leaves(unchanged[0]))
  is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
  changes = [
    type(node)
    for node in jax.tree.leaves(
      unchanged[1]._replace(sizes=True), is_leaf=is_schedule
    )
    if not all(jax.tree.leaves(node))
  ]
  # A schedule follows the job's steps.
  assert set(changes) <= {optax.ScaleByScheduleState}
  assert states[-1][1].skipped == 4
  assert states[-1][1].count == 296
  good, _ = good_run(base)
  assert losses[-1] < 1.1 * good[-1]


@pytest.mark.parametrize("base", BASES)
def test_a_finite_spike_costs_a_few_steps(base):
  tx = mechanize(BASES[base]())
  spike = {150: lambda g: jax.tree.map(lambda leaf: 1e6 * leaf, g)}
  losses, states = run_with(tx, spike)
  good, good_states = good_run(base)
  assert states[-1][1].skipped == 1
  assert good_states[-1][1].skipped == 0
  scale = lambda state: state[1].s.sum()
  assert scale(states[160]) > 0.5 * scale(good_states[160])
  assert np.mean(losses[-20:]) < 1.1 * np.mean(good[-20:])


@pytest.mark.parametrize(("size", "skips"), [(1e8, False), (1e9, True)])
def test_products_whose_squares_have_no_sum_are_skipped(size, skips):
  tx = mechanize(optax.sgd(1.0))
  update, x = jax.jit(tx.update), jnp.ones(4)
  state = tx.init(x)
  for g in [size] * 20 + [1.0] * 40:
    updates, state = update(jnp.full(4, g), state, x)
    x = optax.apply_updates(x, updates)
  assert (state.skipped > 0) == skips
  assert np.all(np.isfinite(state.v))
  assert state.scale > 0


def test_parameters_too_large_to_be_squared_stay():
  tx = mechanize(optax.sgd(1.0))
  x = jnp.full(3, 1e20)
  updates, state = jax.jit(tx.update)(jnp.ones(3), tx.init(x), x)
  assert state.skipped == 1
  np.testing.assert_array_equal(updates, 0.0)


def test_spikes_are_let_through_if_asked():
  spike = {50: lambda g: jax.tree.map(lambda leaf: 1e6 * leaf, g)}
  ours, states = run_with(
    mechanize(optax.adamw(1.0), spike_factor=0), spike, 80
  )
  optaxs, _ = run_with(optax.contrib.mechanize(optax.adamw(1.0)), spike, 80)
  np.testing.assert_allclose(ours, optaxs, rtol=1e-3)
  assert states[-1][1].skipped == 0


def test_larger_gradients_for_good_are_accepted_soon():
  tx = mechanize(optax.adamw(1.0))
  larger = {
    t: lambda g: jax.tree.map(lambda leaf: 1e6 * leaf, g)
    for t in range(100, 200)
  }
  _, states = run_with(tx, larger, steps=200)
  assert 0 < states[-1][1].skipped < 25


def test_zero_gradients_are_harmless_at_any_step():
  zero = {t: lambda g: jax.tree.map(jnp.zeros_like, g) for t in (0, 1, 40)}
  for options in ({}, {"variant": "pytorch"}):
    tx = mechanize(optax.adamw(1.0), **options)
    losses, states = run_with(tx, zero)
    finite = jax.tree.map(lambda leaf: np.isfinite(leaf).all(), states[-1])
    assert all(jax.tree.leaves(finite))
    assert losses[-1] < 0.7 * losses[0]
    assert states[-1][1].skipped == 0


def test_edge_cases_of_trees():
  run = jax.jit(mechanize(optax.adamw(1.0)).update)
  for params in (
    {"w": jnp.float32(2.0)},
    {"w": jnp.ones((3,)), "empty": jnp.zeros((0, 4))},
    {"w": jnp.ones((3,)), "none": None},
    {},
  ):
    tx = mechanize(optax.adamw(1.0))
    state, x = tx.init(params), params
    for _ in range(20):
      updates, state = run(x, state, x)
      x = optax.apply_updates(x, updates)
    assert jax.tree.structure(x) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((x, state)))
    if "w" in params:
      assert np.all(np.abs(x["w"]) < np.abs(params["w"]))


def test_a_leaf_without_gradient_stays():
  for dtype in (jnp.float32, jnp.bfloat16):
    tx = mechanize(optax.adamw(1.0))
    params = {"w": jnp.ones(3, dtype), "unused": jnp.ones(2, dtype)}
    state, x, update = tx.init(params), params, jax.jit(tx.update)
    for _ in range(20):
      updates, state = update({"w": x["w"], "unused": None}, state, x)
      x = optax.apply_updates(x, updates)
    assert np.array_equal(x["unused"], params["unused"])
    assert np.all(x["w"] < 1.0)


def test_betas_are_options():
  run = lambda **options: network.train(
    mechanize(optax.sgd(0.1), **options), 20
  )[0]
  for betas in ([0.9, 0.99], np.array([0.9, 0.99])):
    assert relative_error(run(betas=betas), run(num_betas=2)) == 0
  assert relative_error(run(weight_decay=0.0), run()) > 0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"variant": "torch"}, "'torch' is not one of 'optax'"),
    ({"x0_dtype": "bf16"}, "'bf16' must be a type of floats"),
    ({"x0_dtype": "int8"}, "'int8' must be a type of floats"),
    ({"x0_dtype": "float8_e4m3fn"}, "a type of floats of 16 bits or more"),
    ({"s_init": 0.0}, "s_init=0.0 must be above 0"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0 must be .*, or 0 for no decay"),
    ({"weight_decay": np.nan}, "weight_decay=nan must be above 0"),
    ({"eps": np.inf}, "eps=inf must be above 0 and finite$"),
    ({"eps": np.float32(0)}, "eps=0.0 must be above 0"),
    ({"spike_factor": -1}, "spike_factor=-1 must be .*, or 0 for no spikes"),
    ({"spike_factor": np.nan}, "spike_factor=nan must be above 0"),
    ({"betas": [0.9, 1.0]}, "must be numbers above 0 and below 1"),
    ({"betas": 0.9}, "betas=0.9 must be numbers .* such as"),
    ({"num_betas": 20}, "num_betas=20 must be a whole number from 1 to 16"),
    ({"num_betas": 2.5}, "num_betas=2.5 must be a whole number"),
    ({"groups": 3}, "groups=3 must be a regular expression"),
    ({"schedule": 1.0}, "schedule=1.0 must be the base's schedule, a function"),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    mechanize(optax.sgd(0.1), **options)


@pytest.mark.parametrize("base", [None, optax.adamw])
def test_a_base_that_is_no_transformation_is_refused(base):
  with pytest.raises(ValueError, match=r"such as optax\.adamw\(1\.0\), not "):
    mechanize(base)


@pytest.mark.parametrize(
  ("leaf", "dtype"),
  [
    (jnp.arange(2), "int32"),
    (jnp.ones(2, jnp.float8_e4m3fn), "float8_e4m3fn"),
    (jax.random.key(0), "key<fry>"),
    (1, "int32"),
  ],
)
def test_parameters_that_cannot_be_trained_are_named(leaf, dtype):
  params = {"a": {"b": leaf}, "w": jnp.ones(2)}
  words = f"and 'a/b' is {dtype}; leave it out by --config.freeze"
  with pytest.raises(ValueError, match=words):
    mechanize(optax.sgd(1.0)).init(params)
  config = ConfigDict({"optimizer": "mechanic", "freeze": ("a/b",)})
  tx = flax_mechanic.make_optimizer(config)
  state = tx.init(params)
  updates, _ = tx.update(params, state, params)
  assert np.all(updates["w"] != 0)


@pytest.mark.parametrize("x0_dtype", [None, "bfloat16"])
def test_complex_parameters(x0_dtype):
  tx = mechanize(optax.sgd(0.1), x0_dtype=x0_dtype)
  x = {"w": jnp.array([1.0 + 1.0j, -2.0j])}
  state, update = tx.init(x), jax.jit(tx.update)
  # No narrow type holds them.
  np.testing.assert_array_equal(state.x0["w"], x["w"])
  for _ in range(100):
    updates, state = update(x, state, x)
    x = optax.apply_updates(x, updates)
  assert np.all(np.abs(x["w"]) < 0.5)
  assert state.s.dtype == jnp.float32


@functools.cache
def in_float32(base):
  return network.train(mechanize(BASES[base]()), 300)


@pytest.mark.parametrize(
  ("base", "dtype"),
  [
    *(("adamw", dtype) for dtype in (jnp.bfloat16, "mixed")),
    pytest.param("adamw", jnp.float16, marks=pytest.mark.slow),
    pytest.param("sgd", jnp.bfloat16, marks=pytest.mark.slow),
    ("lion", jnp.float16),
  ],
)
def test_low_precision_trains_like_float32(base, dtype):
  tx = mechanize(BASES[base]())
  step = network.make_step(tx)
  if dtype == "mixed":
    x = network.params(jnp.bfloat16) | {"head": network.params()["head"]}
  else:
    x = network.params(dtype)
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(x)]
  state = tx.init(x)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.delta))
  losses = []
  for i in range(300):
    x, state, value = step(x, state, *network.batch(i))
    losses.append(value)
  _, exact, expected = in_float32(base)
  # The loss is taken at rounded parameters; without Delta in float32 it stays
  # where it began (bfloat16) or is NaN (float16).
  assert np.mean(losses[-30:]) < 1.05 * np.mean(expected[-30:])
  assert [leaf.dtype for leaf in jax.tree.leaves(x)] == dtypes
  assert [leaf.dtype for leaf in jax.tree.leaves(state.x0)] == dtypes
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.delta))
  assert state.s.dtype == jnp.float32
  assert 0.7 < jnp.sum(state.s) / jnp.sum(exact.s) < 1.4
  moments = optax.tree.get_all_with_path(state.base_optimizer_state, "mu")
  for _, tree in moments:
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))


def test_bfloat16_parameters_are_the_rounded_sum_of_x0_and_delta():
  tx = mechanize(optax.adamw(1.0))
  x = network.params(jnp.bfloat16)
  state = tx.init(x)
  step = network.make_step(tx)
  for i in range(100):
    x, state, _ = step(x, state, *network.batch(i))
  exact = jax.tree.map(
    lambda x0, delta: x0.astype(jnp.float32) + jnp.sum(state.s) * delta,
    state.x0,
    state.delta,
  )
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
  assert relative_error(x, rounded) < 2**-8


def test_a_delta_that_is_kept_shrinks_like_one_that_is_recovered():
  # By S / (S + eps), of which an eps as large as S leaves half.
  eps = 0.1
  tx = mechanize(optax.sgd(1.0), eps=eps, s_init=0.1)
  update, x = jax.jit(tx.update), {"w": jnp.ones(4, jnp.bfloat16)}
  state, delta = tx.init(x), 0.0
  for g in (0.5, 0.5, np.nan, 0.5, 0.5):
    if np.isfinite(g):
      delta = delta * state.scale / (state.scale + eps) - g
    updates, state = update({"w": jnp.full(4, g, jnp.bfloat16)}, state, x)
    x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(state.delta["w"], delta, rtol=1e-5)


@pytest.mark.parametrize("groups", ["", ".*"])
def test_ranks_need_no_promotion(groups):
  tx = mechanize(optax.adamw(1.0), groups=groups, relative_s_init=0.01)
  params = network.params()
  with jax.numpy_rank_promotion("raise"):
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize(
  "options",
  [
    {"groups": ".*", "relative_s_init": 0.01, "mean_decay": True},
    {"variant": "pytorch"},
    {"schedule": optax.linear_schedule(1.0, 0.0, 9)},
  ],
)
def test_dtypes_need_no_promotion(options):
  base = optax.sgd(options.get("schedule", 1.0), momentum=0.9)
  tx = mechanize(base, **options)
  for dtype in (jnp.float32, jnp.bfloat16):
    params = network.params(dtype)
    with jax.numpy_dtype_promotion("strict"):
      state = jax.eval_shape(tx.init, params)
      jax.eval_shape(tx.update, params, state, params)


def test_parameters_may_be_numbers():
  params = {"a": 1.0, "b": -2.0}
  grad = jax.grad(lambda p: jnp.square(p["a"] - 3) + jnp.square(p["b"]))

  def trained(tx):
    x = params
    state = tx.init(x)
    for _ in range(20):
      updates, state = tx.update(grad(x), state, x)
      x = optax.apply_updates(x, updates)
    return x

  base = optax.adamw(1.0)
  expected = trained(optax.contrib.mechanize(base))
  assert relative_error(trained(mechanize(base)), expected) < 1e-4
