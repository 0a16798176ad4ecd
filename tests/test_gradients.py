"""Methods that make a gradient of their own: per example, and SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib

from flax_mechanic import Optimizer, TrainState, UsageError
from tests import network
from tests.by_hand import (
  AGGREGATE,
  CLIP,
  RATE,
  SHAPE,
  LinenRun,
  NnxRun,
  add,
  assert_close,
  assert_equal,
  batch,
  build,
  fed,
  flat,
  in_nnx_and_linen,
  initial,
  measure,
  minimize,
  minimize_model,
  norm,
  numpy_aggregate,
  numpy_grad,
  numpy_sam_grad,
  numpy_value_and_grad,
  scheduled,
  under,
)

# Per-example gradients.


@pytest.mark.parametrize(
  ("run", "momentum"),
  [
    pytest.param(NnxRun, None, marks=pytest.mark.slow),
    (LinenRun, None),
    (LinenRun, 0.9),
  ],
)
def test_dpsgd_clips_each_example_and_averages(x64, run, momentum):
  options = {"l2_norm_clip": CLIP, "noise_multiplier": 0.0}
  tx = build("dpsgd", SHAPE, **under("dpsgd", momentum=momentum, **options))
  job = run(tx, initial())
  expected = initial()
  trace = jax.tree.map(np.zeros_like, expected)
  for i in range(3):
    job.step(*batch(i))
    aggregate, clipped = numpy_aggregate(expected, *batch(i))
    assert 0 < clipped < len(batch(i)[0])
    trace = add(aggregate, trace, momentum or 0.0)
    expected = add(expected, trace, -scheduled(i))
    assert_close(job.params, expected)


@pytest.mark.parametrize("name", ["dpsgd", AGGREGATE])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_gradients_are_clipped_as_they_are_in_float32(name, dtype):
  grads = np.random.default_rng(0).normal(size=(8, 100), scale=60)
  grads = jnp.asarray(grads, dtype)

  def aggregate(tx, dtype):
    x = {"kernel": jnp.zeros(100, dtype)}
    g = {"kernel": grads.astype(dtype)}
    updates, _ = tx.update(g, tx.init(x), x)
    return updates["kernel"]

  fields = under(name, noise_multiplier=0.0) | under("sgd", momentum=None)
  if name == AGGREGATE:
    fields |= under(name, base="sgd")
  tx = build(name, learning_rate=1.0, **fields)
  theirs = contrib.differentially_private_aggregate(1.0, 0.0, key=0)
  expected = -aggregate(theirs, jnp.float32)
  assert_equal(aggregate(tx, dtype), expected.astype(dtype))
  # Once this fails for both types, `repairs.in_float32` can go.
  assert np.any(-aggregate(theirs, dtype) != expected.astype(dtype))


@in_nnx_and_linen
def test_an_aggregate_over_adamw_is_adamw_on_the_aggregate(x64, run):
  options = {"l2_norm_clip": CLIP, "noise_multiplier": 0.0}
  job = run(build(AGGREGATE, SHAPE, **under(AGGREGATE, **options)), initial())
  for i in range(5):
    job.step(*batch(i))
  expected = fed(
    optax.adamw(scheduled),
    initial(),
    lambda *args: (0.0, numpy_aggregate(*args)[0]),
    5,
  )
  assert_close(job.params, expected, 1e-7)


@pytest.mark.parametrize(
  ("run", "name"),
  [
    (NnxRun, AGGREGATE),
    pytest.param(LinenRun, AGGREGATE, marks=pytest.mark.slow),
    pytest.param(NnxRun, "dpsgd", marks=pytest.mark.slow),
  ],
)
def test_the_noise_has_the_deviation_that_was_asked_for(run, name):
  # The clipped gradients are lost in it.
  fields = under(name, l2_norm_clip=1e-3, noise_multiplier=3e3)
  if name != "dpsgd":
    fields |= under(name, base="sgd") | under("sgd", momentum=None)
  job = run(build(name, learning_rate=2.0, **fields), initial(2000))
  points = [flat(job.params)]
  for i in range(2):
    job.step(*batch(i))
    points.append(flat(job.params))
  noise = np.diff(points, axis=0) / 2.0
  assert noise.size > 20_000
  np.testing.assert_allclose(noise.std(), 1e-3 * 3e3 / 8, rtol=0.02)
  np.testing.assert_allclose(noise.mean(), 0.0, atol=0.01)
  assert abs(np.corrcoef(noise)[0, 1]) < 0.03


@in_nnx_and_linen
def test_per_example_outputs_are_the_batch_s(x64, run):
  job = run(build("dpsgd"), initial())
  forward = lambda x: (
    np.tanh(x @ initial()["hidden"]["kernel"] + initial()["hidden"]["bias"])
    @ initial()["head"]["kernel"]
    + initial()["head"]["bias"]
  )
  inputs, targets = batch(0)
  loss, aux = job.step(inputs, targets)
  errors = forward(inputs) - targets
  assert loss.shape == aux["error"].shape == ()
  np.testing.assert_allclose(loss, np.mean(errors**2))
  np.testing.assert_allclose(aux["error"], np.mean(np.abs(errors)))
  np.testing.assert_allclose(aux["outputs"], forward(inputs))


class NnxDropout(nnx.Module):
  def __init__(self, rngs):
    self.scale = nnx.Param(jnp.ones(64))
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, inputs):
    return self.dropout(self.scale * inputs)


def test_each_example_has_its_own_nnx_mask():
  model = NnxDropout(nnx.Rngs(0))
  key = model.dropout.rngs.key[...]
  optimizer = Optimizer(model, build("dpsgd", learning_rate=0.0))
  inputs = jnp.ones((4, 64))

  @nnx.jit
  def minimize(model, optimizer):
    return optimizer.minimize(
      model,
      lambda model, inputs: (jnp.mean(model.scale), model(inputs)),
      inputs,
      has_aux=True,
    )

  @nnx.jit
  def alone(key, count, inputs):
    model = NnxDropout(nnx.Rngs(0))
    model.dropout.rngs.key[...] = key
    model.dropout.rngs.count[...] = count
    return model(inputs)

  for step in range(2):
    _, outputs = minimize(model, optimizer)
    for i in range(4):
      mine = alone(jax.random.fold_in(key, i), jnp.uint32(step), inputs[i])
      np.testing.assert_array_equal(outputs[i], mine)
    assert len(np.unique(outputs, axis=0)) == 4
    assert model.dropout.rngs.count[...] == step + 1
  assert model.dropout.rngs.key[...] == key


def test_each_example_has_its_own_linen_mask():
  dropout = linen.Dropout(0.5, deterministic=False)

  def loss_fn(params, inputs, rate, key):
    scaled = rate * params["scale"] * inputs
    outputs = dropout.apply({}, scaled, rngs={"dropout": key})
    return jnp.mean(outputs), outputs

  state = TrainState.create(
    apply_fn=None, params={"scale": jnp.ones(64)}, tx=build("dpsgd")
  )
  inputs, key = jnp.ones((4, 64)), jax.random.key(7)
  # A scalar and a key are shared.
  _, (_, outputs) = state.minimize(
    loss_fn, inputs, jnp.float32(3.0), key, has_aux=True
  )
  for i in range(4):
    _, alone = loss_fn(
      state.params, inputs[i : i + 1], 3.0, jax.random.fold_in(key, i)
    )
    np.testing.assert_array_equal(outputs[i], alone[0])
  assert len(np.unique(outputs, axis=0)) == 4


class Normed(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, inputs):
    return self.head(self.dropout(self.norm(self.hidden(inputs))))


class LinenNormed(linen.Module):
  @linen.compact
  def __call__(self, inputs):
    hidden = linen.BatchNorm(use_running_average=False)(inputs)
    return linen.Dense(2)(hidden)


def linen_normed(tx):
  model = LinenNormed()
  variables = model.init(jax.random.key(0), batch(0)[0])

  def loss_fn(params, inputs, targets, batch_stats):
    outputs, changed = model.apply(
      {"params": params, "batch_stats": batch_stats},
      inputs,
      mutable=["batch_stats"],
    )
    return measure(outputs, targets)[0], (outputs, changed)

  state = TrainState.create(apply_fn=None, params=variables["params"], tx=tx)
  return state, loss_fn, variables["batch_stats"]


@pytest.mark.parametrize("name", ["dpsgd", AGGREGATE])
def test_batch_statistics_are_refused_per_example(name):
  model = Normed(nnx.Rngs(0))
  optimizer = Optimizer(model, build(name))
  with pytest.raises(UsageError, match="mix the examples of a batch"):
    optimizer.minimize(
      model, lambda model, x, y: measure(model(x), y)[0], *batch(0)
    )
  state, loss_fn, stats = linen_normed(build(name))
  with pytest.raises(UsageError, match="mix the examples of a batch"):
    state.minimize(lambda *args: loss_fn(*args, stats), *batch(0), has_aux=True)


def on_explicit_mesh(name, specs, rows):
  """Returns loss and parameters after a step on a mesh of 4x2.

  Args:
    name: of the optimizer.
    specs: of `network.params`; None for no mesh.
    rows: axes over which the loss says that its batch is split.
  """
  split = None if specs is None else P(rows, "model")

  def loss_fn(params, inputs, targets):
    layer = params["hidden"]
    hidden = jnp.matmul(inputs, layer["kernel"], out_sharding=split)
    hidden = jnp.tanh(hidden + layer["bias"])
    rank = None if specs is None else P(rows, None)
    outputs = jnp.matmul(hidden, params["head"], out_sharding=rank)
    return jnp.mean((outputs - targets) ** 2)

  params, batch = network.params(), network.batch(0)
  if specs is not None:
    params = jax.tree.map(jax.device_put, params, specs)
    batch = jax.device_put(batch, P("data"))
  state = TrainState.create(apply_fn=None, params=params, tx=build(name))
  state, loss = jax.jit(lambda state, *batch: state.minimize(loss_fn, *batch))(
    state, *batch
  )
  return loss, state.params


@pytest.mark.parametrize(
  "name", ["dpsgd", pytest.param(AGGREGATE, marks=pytest.mark.slow)]
)
def test_a_gradient_per_example_on_an_explicit_mesh(name):
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2
  )
  specs = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "head": P(None, None),
  }
  expected = on_explicit_mesh(name, None, None)
  with jax.set_mesh(mesh):
    found = on_explicit_mesh(name, specs, None)
    with pytest.raises(UsageError, match="the loss on batches of one"):
      on_explicit_mesh(name, specs, "data")
  assert_close(jax.device_get(found), expected, 1e-5)


# SAM.


@pytest.mark.parametrize(
  ("run", "base", "reference", "tolerance"),
  [
    (LinenRun, "sgd", lambda: optax.sgd(scheduled, momentum=0.9), 1e-10),
    (LinenRun, "adamw", lambda: optax.adamw(scheduled), 1e-7),
    (
      LinenRun,
      "mechanize",
      lambda: contrib.mechanize(optax.adamw(SHAPE)),
      1e-6,
    ),
    (LinenRun, "momo", lambda: contrib.momo(SHAPE), 1e-7),
    # What is handed to the base does not depend on the API.
    (NnxRun, "momo", lambda: contrib.momo(SHAPE), 1e-7),
  ],
)
def test_sam_is_the_paper_s_two_steps(x64, run, base, reference, tolerance):
  options = under("sam", base=base, rho=0.3)
  job = run(build("sam", SHAPE, **options), initial())
  for i in range(4):
    before = job.params
    loss, aux = job.step(*batch(i))
    # Evaluated where the step starts, not where the loss is worst.
    value, _ = numpy_value_and_grad(before, *batch(i))
    np.testing.assert_allclose(loss, value)
    np.testing.assert_allclose(
      np.mean((aux["outputs"] - batch(i)[1]) ** 2), value
    )
  expected = fed(
    reference(), initial(), lambda *args: numpy_sam_grad(*args, 0.3), 4
  )
  assert_close(job.params, expected, tolerance)
  moved = flat(expected) - flat(initial())
  plain = fed(reference(), initial(), numpy_value_and_grad, 4)
  assert norm(flat(plain) - flat(expected)) > 1e-3 * norm(moved)


def test_sam_s_further_ascents_start_from_where_the_last_ended(x64):
  job = LinenRun(
    build("sam", opt__sam__sync_period=3, opt__sgd__momentum=None), initial()
  )
  job.step(*batch(0))
  worst = initial()
  for _ in range(2):
    grads = numpy_grad(worst, *batch(0))
    worst = add(worst, grads, 0.05 / norm(grads))
  expected = add(initial(), numpy_grad(worst, *batch(0)), -RATE)
  assert_close(job.params, expected)


def test_sam_advances_statistics_and_streams_once():
  model, once = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
  optimizer = Optimizer(model, build("sam", learning_rate=0.0))
  forward = nnx.jit(lambda model, inputs: model(inputs))
  for i in range(2):
    _, aux = minimize_model(model, optimizer, *batch(i))
    outputs = forward(once, batch(i)[0])
    np.testing.assert_allclose(aux["outputs"], outputs, rtol=1e-5, atol=1e-6)
    assert model.dropout.rngs.count[...] == i + 1
    stats, expected = (
      nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (model, once)
    )
    assert_close(stats, expected, 1e-6)


def test_sam_evaluates_twice_under_one_mask():
  model = NnxDropout(nnx.Rngs(0))
  optimizer = Optimizer(model, build("sam"))

  @nnx.jit
  def minimize(model, optimizer):
    def loss_fn(model):
      outputs = model(jnp.ones(64))
      return jnp.sum(outputs**2), outputs

    return optimizer.minimize(model, loss_fn, has_aux=True)

  _, outputs = minimize(model, optimizer)
  np.testing.assert_array_equal(model.scale[...] != 1, outputs != 0)


def test_sam_returns_the_statistics_of_the_first_evaluation():
  state, loss_fn, stats = linen_normed(build("sam", opt__sam__rho=10.0))
  _, (outputs, changed) = loss_fn(state.params, *batch(0), stats)
  after, (_, aux) = state.minimize(
    lambda params, x, y: loss_fn(params, x, y, stats), *batch(0), has_aux=True
  )
  assert_close(aux, (outputs, changed), 1e-6)
  assert not np.allclose(loss_fn(after.params, *batch(0), stats)[1][0], outputs)


@pytest.mark.parametrize("base", ["mechanic", "momo", "prodigy"])
def test_sam_trains_over_a_method_without_a_rate(base):
  tx = build("sam", opt__sam__base=base, opt__sam__rho=0.01)
  _, losses = minimize(tx, 300)
  assert np.mean(losses[-10:]) < 0.6 * losses[0]
