"""What wraps what: combinations, accumulation, freezing, decay masks."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax import contrib

import flax_mechanic
from flax_mechanic import TrainState, UsageError
from flax_mechanic.methods import repairs
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
  by_hand,
  flat,
  initial,
  minimize,
  minimize_model,
  norm,
  numpy_aggregate,
  numpy_grad,
  numpy_sam_grad,
  scheduled,
  under,
)

# Combinations.


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (
      {"optimizer": "mechanic", "opt__mechanic__base": "prodigy"},
      "'prodigy' learns its learning rate itself, and so does mechanic",
    ),
    (
      {"optimizer": "mechanic", "opt__mechanic__base": "schedule_free"},
      "'schedule_free' does not go under mechanic: .* type "
      "--config.optimizer=schedule_free "
      "--config.opt.schedule_free.base=mechanic",
    ),
    (
      {"optimizer": "mechanic", "opt__mechanic__base": "sam"},
      "must be outermost; type --config.optimizer=sam "
      "--config.opt.sam.base=mechanic$",
    ),
    (
      {"optimizer": "mechanic", "opt__mechanic__base": "dpsgd"},
      f"must be outermost; type --config.optimizer={AGGREGATE} "
      f"--config.opt.{AGGREGATE}.base=mechanic$",
    ),
    ({"optimizer": "sam", "opt__sam__base": "sam"}, "'sam' wraps itself"),
    (
      {"optimizer": "dpsgd", "grad_clip": 1.0},
      r"config\.grad_clip does not go with .*'dpsgd', whose gradients are per",
    ),
    (
      {"optimizer": "dpsgd", "accumulate_steps": 2},
      r"config\.accumulate_steps does not go with .*'dpsgd', whose gradients",
    ),
    (
      {"optimizer": "prodigy", "no_decay": ("bias",)},
      "does not go with prodigy, which decays every parameter or none",
    ),
    (
      {"freeze": ("^haed",)},
      r"config\.freeze='\^haed' is found in no parameter's path; .* head",
    ),
  ],
)
def test_combinations_that_make_no_sense(fields, words):
  with pytest.raises(UsageError, match=words) as error:
    build(**{"optimizer": "adamw"} | fields).init(network.params())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "box", [nnx.Param, lambda x: nn.Partitioned(x, (None,) * x.ndim)]
)
def test_patterns_are_searched_in_paths_without_boxes(box):
  tx = build("mechanic", freeze=("bias$",), opt__mechanic__groups="kernel$")
  shapes = lambda tree: [x.shape for x in jax.tree.leaves(tx.init(tree))]
  boxed = jax.tree.map(box, network.params())
  assert shapes(boxed) == shapes(network.params())


def test_a_gradient_of_the_whole_batch_is_not_one_per_example():
  # All leaves have as many rows, so that optax would take them for examples.
  params = {"a": jnp.ones((8, 3)), "b": jnp.ones((8, 2))}
  tx = build("dpsgd")
  in_part = params | {"a": jnp.ones((8, 8, 3))}
  for grads in (params, in_part):
    words = "needs a gradient for each example: .* leave the chain out"
    with pytest.raises(ValueError, match=words):
      tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("name", ["sam", AGGREGATE])
def test_what_the_errors_say_to_type_builds(name):
  tx = build(name, **under(name, base="mechanic"))
  assert optax.tree.get(tx.init(network.params()), "s").shape == (3, 6)


def test_lookahead_over_a_method_that_reads_the_loss_says_why_not():
  tx = optax.lookahead(build("momo"), 5, 0.5)
  x = optax.LookaheadParams.init_synced(network.params())
  with pytest.raises(ValueError, match=r"needs value: .* as optax\.lookahead"):
    tx.update(x.fast, tx.init(x), x)


def test_mechanic_over_lamb_warns_once_and_trains():
  with pytest.warns(UserWarning, match="except those") as warned:
    tx = build("mechanic", opt__mechanic__base="lamb")
  assert len(warned) == 1
  _, losses = minimize(tx, 200)
  assert np.mean(losses[-10:]) < 0.6 * losses[0]


@pytest.mark.parametrize("name", ["prodigy", "dog"])
def test_parameters_too_narrow_for_a_method_are_warned_of_once(name):
  mesh = jax.make_mesh((2, 2), ("data", "model"))
  narrow = network.place(network.params(jnp.bfloat16), mesh)
  words = f"^{name} hardly trains bfloat16 parameters, .*param_dtype=float32"
  tx = build(name)
  with pytest.warns(UserWarning, match=words) as warned:
    state = TrainState.create(apply_fn=None, params=narrow, tx=tx)
  assert len(warned) == 1
  with warnings.catch_warnings(action="error"):
    state.reanchor()
    tx.init(network.params(jnp.bfloat16))
    build(name).init(network.params())
    build("mechanic").init(narrow)


@pytest.mark.parametrize("name", ["sam", AGGREGATE])
def test_accumulation_is_the_mean_of_the_method_s_gradients(x64, name):
  fields = {"accumulate_steps": 2} | under(name, base="sgd")
  if name == "sam":
    gradient = lambda *args: numpy_sam_grad(*args, 0.05)[1]
  else:
    gradient = lambda *args: numpy_aggregate(*args)[0]
    fields |= under(name, l2_norm_clip=CLIP, noise_multiplier=0.0)
  job = LinenRun(build(name, SHAPE, **fields), initial())
  tx = optax.sgd(scheduled, momentum=0.9)
  expected = initial()
  state, update = tx.init(expected), jax.jit(tx.update)
  for i in range(3):
    grads = []
    for j in (2 * i, 2 * i + 1):
      assert_close(job.params, expected, 1e-7)
      job.step(*batch(j))
      grads.append(gradient(expected, *batch(j)))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    updates, state = update(mean, state, expected)
    expected = add(expected, updates)
  assert_close(job.params, expected, 1e-7)


@pytest.mark.parametrize(
  "name",
  [
    *("mechanic", "sam", AGGREGATE),
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("schedule_free", "dog")
    ),
  ],
)
def test_frozen_parameters_stay_bit_for_bit(name):
  config = {"opt__adamw__weight_decay": 0.5, "freeze": ("^hidden/kernel$",)}
  tx = build(name, learning_rate=0.1, **config)
  start = network.params()
  state, _ = minimize(tx, 5)
  assert_equal(state.params["hidden"]["kernel"], start["hidden"]["kernel"])
  for moved, before in (
    (state.params["hidden"]["bias"], start["hidden"]["bias"]),
    (state.params["head"], start["head"]),
  ):
    assert np.all(moved != before)
  shape = start["hidden"]["kernel"].shape
  assert shape not in [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
  assert start["head"].shape in [
    leaf.shape for leaf in jax.tree.leaves(state.opt_state)
  ]


@pytest.mark.parametrize("name", ["sam", AGGREGATE])
def test_frozen_gradients_count_in_no_norm(x64, name):
  fields = under(name, base="sgd") | under("sgd", momentum=None)
  if name == AGGREGATE:
    fields |= under(name, l2_norm_clip=CLIP, noise_multiplier=0.0)
  job = LinenRun(build(name, freeze=("^hidden/",), **fields), initial())
  job.step(*batch(0))

  # The same on the head alone, whose inputs are constant.
  hidden, head = initial()["hidden"], initial()["head"]
  inputs, targets = batch(0)

  def grad(head, rows=slice(None)):
    whole = {"hidden": hidden, "head": head}
    return numpy_grad(whole, inputs[rows], targets[rows])["head"]

  if name == "sam":
    expected = grad(add(head, grad(head), 0.05 / norm(grad(head))))
  else:
    expected = jax.tree.map(np.zeros_like, head)
    for i in range(len(inputs)):
      g = grad(head, slice(i, i + 1))
      expected = add(expected, g, min(1, CLIP / norm(g)) / len(inputs))
  assert_close(job.params["head"], add(head, expected, -RATE))
  assert_equal(job.params["hidden"], hidden)


def test_no_decay_is_adamw_s_mask(x64):
  tx = build("adamw", SHAPE, no_decay=("bias",), opt__adamw__weight_decay=0.5)
  start = jax.tree.map(lambda x: x + 0.5, network.params(jnp.float64))
  state, _ = minimize(tx, 10, jnp.float64, start)
  mask = {"hidden": {"kernel": True, "bias": False}, "head": True}
  masked, everywhere = (
    by_hand(optax.adamw(scheduled, weight_decay=0.5, mask=m), 10, start)[0]
    for m in (mask, None)
  )
  assert_close(state.params, masked)
  assert norm(flat(everywhere) - flat(masked)) > 1e-3


@pytest.mark.parametrize("name", ["momo", "momo_adam"])
def test_accumulation_hands_the_loss_on(name):
  tx = build(name, SHAPE, accumulate_steps=2, **under(name, learning_rate=1.0))
  with jax.enable_x64(True):
    state = TrainState.create(
      apply_fn=None, params=network.params(jnp.float64), tx=tx
    )
    step = jax.jit(lambda state, *batch: state.minimize(network.loss, *batch))
    for i in range(5):
      for _ in range(2):
        state, _ = step(state, *network.batch(i, jnp.float64))
    expected, _, _ = by_hand(getattr(contrib, name)(SHAPE), 5)
    assert_close(state.params, expected, 1e-7)


@pytest.mark.parametrize(
  ("upper", "base"), [("sam", AGGREGATE), ("sam", "dpsgd"), (AGGREGATE, "sam")]
)
def test_two_gradients_of_their_own(upper, base):
  with pytest.raises(UsageError, match=f"and so does {upper}; name another"):
    build(upper, **under(upper, base=base))


@pytest.mark.parametrize("name", ["mechanic", "prodigy", "dadapt_adamw"])
def test_everything_may_be_frozen(name):
  state, _ = minimize(build(name, freeze=(".",)), 2)
  jax.tree.map(np.testing.assert_array_equal, state.params, network.params())


@pytest.mark.parametrize("base", ["lars", "muon", "momo", "prodigy", "cocob"])
def test_schedule_free_refuses(base):
  with pytest.raises(UsageError, match="does not go under schedule_free"):
    build("schedule_free", **under("schedule_free", base=base))


@pytest.mark.parametrize("base", ["momo", "momo_adam"])
@pytest.mark.parametrize("between", [None, "split_real_and_imaginary"])
def test_a_private_run_reads_no_loss(base, between):
  options = under(AGGREGATE, base=between or base)
  if between:
    options |= under(between, base=base)
  with pytest.raises(UsageError, match="would not be private"):
    build(AGGREGATE, **options)


def test_accumulation_hands_on_the_mean_loss(x64):
  tx = build("momo", accumulate_steps=3, **under("momo", learning_rate=1.0))
  together = contrib.momo()
  params = network.params(jnp.float64)
  state, x, reference = tx.init(params), params, params
  reference_state = together.init(params)
  value_and_grad = jax.jit(jax.value_and_grad(network.loss))
  update, update_together = jax.jit(tx.update), jax.jit(together.update)
  for i in range(4):
    values, gradients = [], []
    for j in range(3):
      value, grads = value_and_grad(x, *network.batch(3 * i + j, jnp.float64))
      updates, state = update(grads, state, x, value=value)
      x = optax.apply_updates(x, updates)
      values.append(value)
      gradients.append(grads)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *gradients)
    updates, reference_state = update_together(
      mean, reference_state, reference, value=sum(values) / 3
    )
    reference = optax.apply_updates(reference, updates)
    assert_close(x, reference, 1e-6)


@pytest.mark.parametrize("field", ["freeze", "no_decay"])
def test_patterns_that_are_wrong_are_named(field):
  with pytest.raises(UsageError, match=rf"config\.{field}='\(' is not a reg"):
    build("adamw", **{field: ("(",)})
  tx = build("adamw", **{field: ("bias", "missing")})
  with pytest.raises(
    UsageError, match=rf"config\.{field}='missing' is found in no .* some are"
  ):
    tx.init(network.params())


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("schedule_free", {"b1": 0.0}, "b1=0.0 must be above 0"),
    ("sam", {"sync_period": 0}, "config.opt.sam: "),
  ],
)
def test_options_out_of_range_are_named(name, options, words):
  with pytest.raises(UsageError, match=words):
    build(name, **under(name, **options))


@pytest.mark.parametrize("name", ["dpsgd", AGGREGATE])
def test_frozen_parameters_keep_their_shape_per_example(name):
  job = NnxRun(build(name, freeze=("bias",)), initial())
  for i in range(2):
    minimize_model(job.model, job.optimizer, *batch(i))
  assert job.model.hidden.bias.shape == (4,)
  assert_close(job.model.hidden.bias[...], initial()["hidden"]["bias"], 1e-6)


def test_a_bad_batch_costs_its_accumulation_only():
  tx = build("mechanic", accumulate_steps=2)
  x = network.params()
  state, update = tx.init(x), jax.jit(tx.update)
  gradient = jax.jit(jax.grad(network.loss))
  for i in range(20):
    grads = gradient(x, *network.batch(i))
    if i == 3:
      grads = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, state = update(grads, state, x)
    x = optax.apply_updates(x, updates)
  assert flax_mechanic.scalars(state)["skipped"] == 1
  assert np.isfinite(flat(x)).all()
  assert np.any(flat(updates) != 0)


def test_patterns_that_are_no_text_are_named():
  with pytest.raises(UsageError, match=r"config\.freeze=0 must be a text"):
    build("adamw", freeze=(0,))
  with pytest.raises(UsageError, match=r"config\.freeze='' is found in every"):
    build("adamw", freeze=("head", ""))


def test_a_norm_beyond_float16_is_clipped():
  grads = {"kernel": jnp.full(100, 200.0, jnp.float16)}
  clipped, _ = repairs.clip_by_global_norm(1.0).update(
    grads, optax.EmptyState()
  )
  assert clipped["kernel"].dtype == jnp.float16
  np.testing.assert_allclose(clipped["kernel"], 0.1, rtol=1e-3)
  # Once this fails, clipping need not be `repairs.in_float32`.
  clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
  assert not np.any(clipped["kernel"])


def test_gradients_of_float16_are_clipped_by_the_flag():
  tx = build("sgd", grad_clip=1.0, **under("sgd", momentum=None))
  params = {"kernel": jnp.zeros(100, jnp.float16)}
  grads = jax.tree.map(lambda x: x + 200, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.1 * RATE, rtol=1e-3)


@pytest.mark.parametrize(
  ("name", "guard"), [("mechanic", True), ("mechanic", False), ("adamw", True)]
)
def test_what_is_too_large_to_be_squared_is_not_clipped_to_0(name, guard):
  tx = build(name, grad_clip=1.0, guard=guard)
  x = {"kernel": jnp.ones(4)}
  state, update = tx.init(x), jax.jit(tx.update)
  for size in (1.0, 1.0, 1.0, 1e25, 1e25):
    before = x
    updates, state = update({"kernel": jnp.full(4, size)}, state, x)
    x = optax.apply_updates(x, updates)
  assert flax_mechanic.scalars(state)["skipped"] == 2
  assert_equal(x, before)


def test_without_a_guard_clipping_is_optax_s():
  tx = build("adamw", grad_clip=1.0, guard=False)
  bare = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
  x = {"kernel": jnp.ones(4)}
  g = {"kernel": jnp.full(4, 1e25)}
  ours, theirs = (tx.update(g, tx.init(x), x)[0] for tx in (tx, bare))
  assert_equal(ours, theirs)
