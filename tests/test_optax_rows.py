"""The rows that are optax's: none is missed, and what they add to optax."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict
from optax import contrib

import flax_mechanic
from flax_mechanic import TrainState, UsageError
from flax_mechanic.methods import registry, table
from tests import network
from tests.by_hand import (
  AGGREGATE,
  RATE,
  SHAPE,
  assert_close,
  assert_equal,
  build,
  by_hand,
  flat,
  minimize,
  under,
)


def optimizers_of(module):
  """Yields the public optimizers, by their arguments and what they return."""
  for name in dir(module):
    function = getattr(module, name)
    if name.startswith(("_", "scale_by_")) or not callable(function):
      continue
    try:
      signature = inspect.signature(function)
    except (TypeError, ValueError):
      continue
    rates = [p for p in signature.parameters if p.endswith("learning_rate")]
    made = "GradientTransformation" in str(signature.return_annotation)
    if made and (rates or module is contrib):
      yield name


# Of optax.contrib, what makes no step.
PARTS = {"normalize", "hutchinson_estimator_diag_hessian"}


def test_every_optimizer_of_optax_has_a_row_or_a_reason():
  found = {*optimizers_of(optax), *optimizers_of(contrib)}
  assert found > {"adamw", "polyak_sgd", "lbfgs", "sophia", "mechanize"}
  known = flax_mechanic.methods().keys() | registry._LEFT_OUT.keys() | PARTS
  assert sorted(found - known) == []


def test_an_optimizer_that_this_optax_lacks_says_so(monkeypatch):
  monkeypatch.setattr(registry, "_LEFT_OUT", {})
  table.register_optax("adamz", "", "", "")
  assert "adamz" not in flax_mechanic.methods()
  words = rf"'adamz' is left out: optax {optax.__version__} does not have it"
  with pytest.raises(UsageError, match=f"{words}; type pip install -U optax$"):
    build("adamz")
  # Unless a job brings its own.
  flax_mechanic.register("adamz", optax.sgd)
  build("adamz")


def test_what_is_left_out_says_what_to_type_instead():
  for name in registry._LEFT_OUT:
    with pytest.raises(UsageError, match=f"'{name}' is left out: ") as error:
      build(name)
    typed = str(error.value).split("--config.")[1:]
    config = ConfigDict({"learning_rate": 1.0})
    flax_mechanic.add_optimizer_config(config)
    config.update_from_flattened_dict(dict(e.strip().split("=") for e in typed))
    flax_mechanic.make_optimizer(config)


@pytest.mark.parametrize("name", ["rprop", "sm3", "noisy_sgd", "polyak_sgd"])
def test_rows_that_are_built_otherwise_compute_optax_s(x64, name):
  options = {
    # In units of the learning rate.
    "rprop": {"min_step_size": 0.5, "max_step_size": 4.0},
    "sm3": {"momentum": 0.5},
    "noisy_sgd": {"eta": 0.1, "seed": 3},
    "polyak_sgd": {"f_min": 0.1, "learning_rate": RATE},
  }[name]
  reference = {
    "rprop": lambda min_step_size, max_step_size: optax.rprop(
      RATE, min_step_size=RATE * min_step_size, max_step_size=RATE * 4.0
    ),
    "sm3": lambda momentum: optax.sm3(RATE, momentum),
    "noisy_sgd": lambda eta, seed: optax.noisy_sgd(RATE, eta, key=seed),
    "polyak_sgd": lambda f_min, learning_rate: optax.polyak_sgd(
      learning_rate, f_min=f_min
    ),
  }[name](**options)
  state, _ = minimize(build(name, **under(name, **options)), 10, jnp.float64)
  expected, _, _ = by_hand(reference, 10)
  assert_close(state.params, expected, 1e-6)


def test_polyak_sgd_tells_its_step(x64):
  tx = build("polyak_sgd", opt__polyak_sgd__learning_rate=100.0)
  x = network.params(jnp.float64)
  value, grads = jax.value_and_grad(network.loss)(
    x, *network.batch(0, jnp.float64)
  )
  state, _ = minimize(tx, 1, jnp.float64)
  found = flax_mechanic.scalars(state.opt_state)
  step = value / np.sum(flat(grads) ** 2)
  np.testing.assert_allclose(found["polyak_sgd/step"], step, rtol=1e-6)
  np.testing.assert_allclose(found["learning_rate/effective"], step, rtol=1e-6)


# Sophia, on a loss whose Hessian is diagonal, so that its estimate is exact.

CURVATURE = {"a": np.array([0.5, 2.0, 8.0]), "b": np.array([[4.0, 1.0]])}


def quadratic(params, scale):
  terms = jax.tree.map(lambda x, c: jnp.sum(c * x**2) / 2, params, CURVATURE)
  return scale * sum(jax.tree.leaves(terms))


@pytest.mark.parametrize(
  ("fields", "frozen"),
  [({}, False), ({"freeze": ("b",)}, True), ({"accumulate_steps": 2}, False)],
)
def test_sophia_knows_a_diagonal_hessian(x64, fields, frozen):
  options = {"b1": 0.5, "b2": 0.9, "gamma": 4.0, "update_interval": 2}
  tx = build(
    "sophia", None, **under("sophia", weight_decay=0.0, **options), **fields
  )
  start = jax.tree.map(jnp.ones_like, CURVATURE)
  state = TrainState.create(apply_fn=None, params=start, tx=tx)
  step = jax.jit(lambda state, scale: state.minimize(quadratic, scale))
  expected = {}
  for key, curvature in CURVATURE.items():
    m, h, x = 0.0, 0.0, np.ones_like(curvature)
    for t in range(6):
      m = 0.5 * m + 0.5 * curvature * x
      move = m / (1 - 0.5 ** (t + 1)) / np.maximum(4.0 * h, 1e-8)
      x = x - RATE * np.clip(move, -1, 1)
      if t % 2 == 0:
        h = 0.9 * h + 0.1 * curvature
    expected[key] = np.ones_like(curvature) if frozen and key == "b" else x
  for _ in range(6 * fields.get("accumulate_steps", 1)):
    state, _ = step(state, 1.0)
  assert_close(state.params, expected, 1e-6)


@pytest.mark.slow
def test_sophia_draws_optax_s_signs():
  ours, _ = minimize(build("sophia"), 3)
  tx = contrib.sophia(RATE)
  x = network.params()
  state = tx.init(x)
  for i in range(3):
    loss = lambda x, i=i: network.loss(x, *network.batch(i))
    updates, state = tx.update(jax.grad(loss)(x), state, x, obj_fn=loss)
    x = optax.apply_updates(x, updates)
  assert_close(ours.params, x, 1e-5)


@pytest.mark.parametrize("name", ["sophia", "reduce_on_plateau", "polyak_sgd"])
def test_what_reads_the_batch_itself_is_not_private(name):
  with pytest.raises(UsageError, match="has no noise, so under"):
    build(AGGREGATE, **under(AGGREGATE, base=name))


def test_a_wrapper_that_reads_the_loss_does_not_go_over_private_gradients():
  for base in ("dpsgd", AGGREGATE):
    with pytest.raises(UsageError, match="hides the loss, which reduce_on_"):
      build("reduce_on_plateau", opt__reduce_on_plateau__base=base)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mechanic over a method")
@pytest.mark.parametrize(
  "wrapper", [n for n, row in flax_mechanic.methods().items() if row.wraps]
)
def test_wrappers_take_every_row_that_they_do_not_refuse(wrapper):
  def step(base):
    tx = build(wrapper, SHAPE, **under(wrapper, base=base))
    state = TrainState.create(apply_fn=None, params=network.params(), tx=tx)
    return state, state.minimize(network.loss, *network.batch(0))

  taken = set()
  for base in flax_mechanic.methods():
    try:
      before, (after, _) = jax.eval_shape(functools.partial(step, base))
    except UsageError:
      continue
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    taken.add(base)
  assert len(taken) > 25


# A plateau.


def flat_loss(params):
  """A loss that stays 100, with a gradient of 1."""
  return jnp.sum(params - jax.lax.stop_gradient(params)) + 100.0


@pytest.mark.parametrize("base", ["sgd", "mechanic", "schedule_free"])
def test_a_plateau_reduces_the_rate_inside_its_base(base):
  options = {"factor": 0.5, "patience": 1, "accumulation_size": 1}
  name = "reduce_on_plateau"
  tx = build(
    name,
    None,
    guard=False,
    **under(name, base=base, **options),
    **under("sgd", momentum=None),
  )
  state = TrainState.create(apply_fn=None, params=jnp.ones(3), tx=tx)
  step = jax.jit(lambda state: state.minimize(flat_loss))
  factors = []
  for _ in range(4):
    state, _ = step(state)
    found = flax_mechanic.scalars(state.opt_state)
    factors.append(float(found["reduce_on_plateau/factor"]))
  assert factors == [1.0, 0.5, 0.25, 0.125]
  assert np.all(np.isfinite(state.params))
  if base == "sgd":
    np.testing.assert_allclose(1 - state.params, RATE * sum(factors), rtol=1e-5)


@pytest.mark.parametrize("base", ["adamw", "mechanic", "schedule_free"])
def test_a_plateau_counts_no_loss_of_a_skipped_gradient(base):
  options = {"patience": 2, "accumulation_size": 1}
  name = "reduce_on_plateau"
  tx = build(
    name,
    **under(name, base=base, **options),
    **under("schedule_free", base="mechanic"),
  )
  update = jax.jit(tx.update)

  def train(factors):
    x = {"w": jnp.ones(4)}
    state = tx.init(x)
    for i, factor in enumerate(factors):
      value = jnp.float32(10.0 - i if factor == 1 else factor)
      g = {"w": jnp.full(4, factor)}
      updates, state = update(g, state, x, value=value)
      x = optax.apply_updates(x, updates)
    return optax.tree.get(state, "best_value"), flax_mechanic.scalars(state)

  best, found = train([1.0] * 5 + [np.nan] * 4 + [1.0] * 2)
  assert found["skipped"] == 4
  assert found["reduce_on_plateau/factor"] == 1.0
  assert best == 0.0
  # The first ones were bad, so their small loss is forgotten.
  best, found = train([-1e6, 1.0, 1.0])
  assert found["skipped"] == 1
  assert best == 8.0


@pytest.mark.slow
def test_a_plateau_over_sgd_is_optax_s_chain(x64):
  options = {"factor": 0.5, "patience": 1, "rtol": 0.3}
  name = "reduce_on_plateau"
  sgd = {"opt__sgd__momentum": 0.0}
  fields = under(name, base="sgd", accumulation_size=1, **options) | sgd
  state, _ = minimize(build(name, SHAPE, **fields), 12, jnp.float64)
  tx = optax.chain(
    optax.sgd(lambda count: RATE * SHAPE(count)),
    contrib.reduce_on_plateau(**options),
  )
  expected, (_, reduced), _ = by_hand(tx, 12)
  assert float(reduced.scale) < 0.5
  assert_close(state.params, expected, 1e-6)


# Matrices.


def test_matrices_follow_from_shapes_and_names():
  attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
  params = {
    "attention": nnx.to_pure_dict(nnx.state(attention)),
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "embedding": jnp.ones((5, 6)),
    "stack": {"kernel": jnp.ones((2, 4, 5))},
  }
  rules = flax_mechanic.methods()["muon"].options["matrices"]
  of = lambda rules: table.features.matrices(rules, lambda *axes: axes)(params)
  found = of(rules)
  for name in ("query", "key", "value"):
    assert found["attention"][name]["kernel"] == ((0,), (1, 2))
    assert found["attention"][name]["bias"] == ((0,), (1,))
  assert found["attention"]["out"]["kernel"] == ((0, 1), (2,))
  assert found["conv"] == {"kernel": ((0, 1, 2), (3,)), "bias": None}
  assert found["embedding"] == ((0,), (1,))
  assert found["stack"]["kernel"] is None
  own = of(
    ("stack/kernel bio", "embedding bb", "bias bb", "kernel oiii", *rules)
  )
  assert own["conv"]["kernel"] == ((1, 2, 3), (0,))
  assert own["stack"]["kernel"] == ((1,), (2,))
  assert own["embedding"] is own["attention"]["query"]["bias"] is None


@pytest.mark.parametrize("name", ["muon", "galore"])
def test_a_kernel_of_many_axes_is_updated_as_a_matrix(x64, name):
  rng = np.random.default_rng(0)
  grads = [jnp.asarray(rng.normal(size=(4, 6))) for _ in range(3)]
  tx = build(name, None, **under(name, rank=2) if name == "galore" else {})

  def train(shape):
    x = {"query": {"kernel": jnp.ones(shape)}}
    state = tx.init(x)
    for g in grads:
      g = {"query": {"kernel": g.reshape(shape)}}
      updates, state = tx.update(g, state, x)
      x = optax.apply_updates(x, updates)
    return x["query"]["kernel"]

  folded = train((4, 2, 3))
  assert_close(folded.reshape(4, 6), train((4, 6)))
  assert np.linalg.matrix_rank(np.asarray(folded - 1).reshape(4, 6)) > 1


def test_galore_keeps_no_empty_arrays():
  params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
  sizes = lambda tx: {leaf.size for leaf in jax.tree.leaves(tx.init(params))}
  assert 0 not in sizes(build("galore", None, **under("galore", rank=2)))
  # Once this fails, `repairs.without_empty_arrays` can go.
  assert 0 in sizes(contrib.galore(1.0, rank=2))


def test_sm3_takes_scalars_as_vectors_of_one_element():
  def train(tx, shape):
    x = {"a": jnp.ones(shape), "b": jnp.ones((2, 3))}
    state = tx.init(x)
    for _ in range(3):
      updates, state = tx.update(x, state, x)
      x = optax.apply_updates(x, updates)
    return x

  tx, bare = build("sm3"), optax.sm3(RATE, 0.9)
  scalar = train(tx, ())
  assert scalar["a"].shape == ()
  assert_equal(jax.tree.map(jnp.atleast_1d, scalar), train(tx, (1,)))
  assert_close(train(tx, (1,)), train(bare, (1,)), 1e-6)
  # Once this fails, `repairs.with_an_axis` can go.
  with pytest.raises(IndexError):
    train(bare, ())


@pytest.mark.parametrize("name", ["muon", "galore"])
def test_a_matrix_without_elements_is_none(name):
  tx = build(name, None, **under(name, rank=2) if name == "galore" else {})
  x = {"kernel": jnp.ones((4, 6)), "none": jnp.ones((0, 6))}
  updates, _ = tx.update(x, tx.init(x), x)
  alone = {"kernel": x["kernel"]}
  expected, _ = tx.update(alone, tx.init(alone), alone)
  assert_equal(updates["kernel"], expected["kernel"])
  assert updates["none"].shape == (0, 6)


@pytest.mark.parametrize("rule", ["kernel", "kernel io1", "a b io", 1])
def test_a_rule_for_matrices_that_is_none(rule):
  words = "config.opt.muon: matrices=.* is not PATTERN AXES; type for example"
  with pytest.raises(UsageError, match=words):
    build("muon", opt__muon__matrices=(rule,))


# Learning rates.


def test_an_optimizer_s_own_learning_rate_comes_first():
  rate = lambda *args, **fields: float(
    flax_mechanic.scalars(build(*args, **fields).init(network.params()))[
      "learning_rate/effective"
    ]
  )
  own = {"opt__lion__learning_rate": 0.25}
  assert rate("lion", **own) == 0.25
  assert rate("adamw", **own) == RATE
  assert rate("sam", opt__sam__base="lion", **own) == 0.25
  # Mechanic's base is scaled by what is learned, from 1.
  base = build("mechanic", opt__mechanic__base="lion", **own)
  found = optax.tree.get(base.init(network.params()), "learning_rate")
  assert float(found) == 1.0


def test_an_optimizer_s_own_learning_rate_takes_the_peak_s_place():
  config = flax_mechanic.add_optimizer_config(ConfigDict(), "sgd")
  config.opt.sgd.learning_rate = 0.25
  tx = flax_mechanic.make_optimizer(config, lambda _: 0.005, peak=0.01)
  found = flax_mechanic.scalars(tx.init(network.params()))
  np.testing.assert_allclose(found["learning_rate/effective"], 0.125)
