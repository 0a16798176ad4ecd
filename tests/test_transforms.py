"""The adapters of `transforms`, one by one."""

import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax import contrib
from optax.tree_utils import _tree_math

from flax_mechanic import UsageError
from flax_mechanic.extra_args import accepted
from flax_mechanic.methods import features, repairs
from flax_mechanic.paths import check_found, matching


class Pair(NamedTuple):
  left: jax.Array
  right: jax.Array


def params():
  return {"a": jnp.array([1.0, -2.0]), "b": [jnp.array(3.0)]}


def zeros():
  return jax.tree.map(jnp.zeros_like, params())


def pointers(tree):
  leaves = jax.tree.leaves(tree)
  raw = lambda x: (
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
  )
  return [raw(leaf).unsafe_buffer_pointer() for leaf in leaves]


def recorder():
  """A transformation that takes `value` and records what it was given."""
  seen = []

  def update(updates, state, params=None, *, value=None):
    seen.append(value)
    return updates, state

  return optax.GradientTransformation(lambda params: (), update), seen


def test_accepted_reads_the_signature():
  extra = {"value": 1.0, "grad_fn": 2.0, "other": 3.0}
  tx, _ = recorder()
  assert accepted(tx, extra) == {"value": 1.0}
  assert accepted(tx, {"other": 3.0}) == {}
  assert accepted(optax.sgd(0.1), extra) == extra
  without = optax.GradientTransformation(lambda p: (), lambda u, s, p=None: u)
  assert accepted(without, extra) == {}
  sam = contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True)
  assert accepted(sam, extra) == {"grad_fn": 2.0}


@pytest.mark.parametrize(
  "tx", [contrib.cocob(), contrib.prodigy(), contrib.dog()]
)
def test_own_buffers_shares_none(tx):
  x = params()
  raw = pointers([x, tx.init(x)])
  assert len(set(raw)) < len(raw)
  own = repairs.own_buffers(tx)
  state = own.init(x)
  owned = pointers([x, state, own.init(x)])
  assert len(set(owned)) == len(owned)
  for ours, theirs in zip(
    jax.tree.leaves(state), jax.tree.leaves(tx.init(x)), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_own_buffers_copies_an_array_that_every_init_hands_out():
  tx = contrib.differentially_private_aggregate(1.0, 1.0, key=0)
  shared = [tx.init(params()) for _ in range(2)]
  assert len(set(pointers(shared))) == 1
  own = repairs.own_buffers(tx)
  assert len(set(pointers([own.init(params()) for _ in range(2)]))) == 2
  jax.jit(lambda state: state, donate_argnums=0)(own.init(params()))
  own.init(params())


def test_own_buffers_hands_extra_arguments_on():
  own = repairs.own_buffers(contrib.momo())
  x = params()
  ones = jax.tree.map(jnp.ones_like, x)
  ours, _ = own.update(ones, own.init(x), x, value=2.0, unknown=1)
  tx = contrib.momo()
  theirs, _ = tx.update(ones, tx.init(x), x, value=2.0)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_hand_on_gives_the_base_what_it_accepts():
  base, seen = recorder()
  wrap = lambda tx: contrib.sam(
    tx, optax.sgd(0.1), sync_period=2, opaque_mode=True
  )
  tx = repairs.hand_on(wrap, base)
  x = params()
  grad_fn = lambda params, _: params
  state = tx.init(x)
  updates, state = tx.update(x, state, x, value=5.0, grad_fn=grad_fn, unknown=1)
  assert seen == [5.0]
  # The gradient at x + 0.1 x.
  np.testing.assert_allclose(updates["a"], 1.1 * x["a"], rtol=1e-6)
  assert isinstance(state, contrib.SAMState)


def test_hand_on_under_a_wrapper_that_takes_nothing():
  base, seen = recorder()
  tx = repairs.hand_on(contrib.split_real_and_imaginary, base)
  x = params()
  tx.update(x, tx.init(x), x, value=5.0, grad_fn=None)
  tx.update(x, tx.init(x), x)
  assert seen == [5.0, None]


KINDS = (nn.Partitioned, nnx.Param)
BOXES = {
  "linen": lambda kernel: nn.Partitioned(kernel, ("data", "model")),
  "nnx": nnx.Param,
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_a_box_holds_what_its_annotation_fits(box):
  optax_s = optax.adafactor(0.1, momentum=0.9, min_dim_size_to_factor=4)
  tx = repairs.box_what_fits(optax_s)
  bare = {"kernel": jnp.arange(24.0).reshape(4, 6), "bias": jnp.ones(6)}
  boxed = bare | {"kernel": box(bare["kernel"])}
  state, expected_state = tx.init(boxed), optax_s.init(bare)
  kernels = [
    jax.tree.leaves(leaf)[0].shape
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: type(x) in KINDS)
    if type(leaf) in KINDS
  ]
  assert kernels == [(4, 6)]  # Of the momentum.
  for _ in range(2):
    kind = jax.tree.structure((boxed, state))
    updates, state = tx.update(boxed, state, boxed)
    assert jax.tree.structure((updates, state)) == kind
    expected, expected_state = optax_s.update(bare, expected_state, bare)
    for ours, theirs in zip(
      jax.tree.leaves((updates, state)),
      jax.tree.leaves((expected, expected_state)),
      strict=True,
    ):
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_a_box_whose_array_is_masked_stays(box):
  params = {"kernel": box(jnp.ones((4, 6))), "bias": jnp.ones(6)}
  tx = optax.masked(
    repairs.box_what_fits(optax.adafactor(0.1)),
    jax.tree.map(lambda leaf: leaf.ndim == 1, params),
  )
  state = tx.init(params)
  updates, after = tx.update(params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  np.testing.assert_array_equal(jax.tree.leaves(updates["kernel"])[0], 1.0)
  assert np.all(updates["bias"] < 0.0)


@pytest.mark.parametrize(
  ("rate", "gradient", "runs"),
  [
    (1.0, 0.0, False),
    (0.0, 1.0, False),
    (1.0, 1e-30, True),
    (1.0, -1.0, True),
    (1.0, np.nan, True),
  ],
)
def test_skip_zeros_runs_where_something_moves(rate, gradient, runs):
  inner = optax.chain(optax.trace(0.9), optax.scale(-2.0))
  tx = repairs.skip_zeros(inner, rate)
  x = params()
  # One leaf alone decides.
  grads = zeros() | {"a": jnp.array([0.0, gradient], jnp.float32)}
  state = tx.init(x)
  updates, after = jax.jit(tx.update)(grads, state, x)
  expected = inner.update(grads, inner.init(x), x) if runs else (zeros(), state)
  jax.tree.map(np.testing.assert_array_equal, (updates, after), expected)


def test_skip_zeros_keeps_the_updates_dtypes_and_extra_arguments():
  def update(updates, state, params=None, *, value):
    return jax.tree.map(lambda g: (value * g).astype(jnp.float16), updates), ()

  inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
  tx = repairs.skip_zeros(inner, jnp.float32(1.0))
  ones = jax.tree.map(jnp.ones_like, params())
  for grads, expected in ((zeros(), 0.0), (ones, 3.0)):
    updates, _ = tx.update(grads, (), params(), value=jnp.float32(3.0))
    for leaf in jax.tree.leaves(updates):
      assert leaf.dtype == jnp.float16
      np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("gamma", [0.0, 8.0])
def test_average_iterates_is_the_recursion(gamma):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x = {"w": jnp.asarray(rng.normal(size=3))}
    tx = features.average_iterates(optax.sgd(0.1), gamma)
    state = tx.init(x)
    update = jax.jit(tx.update)
    iterate = average = np.asarray(x["w"])
    for t in range(1, 20):
      g = rng.normal(size=3)
      updates, state = update({"w": jnp.asarray(g)}, state, x)
      x = optax.apply_updates(x, updates)
      iterate = iterate - 0.1 * g
      average = average + (1 + gamma) / (t + gamma) * (iterate - average)
      np.testing.assert_allclose(x["w"], iterate, rtol=1e-12)
      np.testing.assert_allclose(state.average["w"], average, rtol=1e-12)
    assert state.count == 19


def test_a_plain_average_is_the_mean():
  tx = features.average_iterates(optax.sgd(1.0), 0.0)
  x = {"w": jnp.zeros(())}
  state = tx.init(x)
  for g in (-1.0, -2.0, -3.0):
    updates, state = tx.update({"w": jnp.array(g)}, state, x)
    x = optax.apply_updates(x, updates)
  # The iterates are 1, 3 and 6.
  np.testing.assert_allclose(state.average["w"], 10 / 3, rtol=1e-6)


def test_average_iterates_accumulates_in_float32():
  tx = features.average_iterates(optax.sgd(2.0**-7), 8.0)
  x = {"w": jnp.ones(2, jnp.bfloat16)}
  state = tx.init(x)
  assert state.average["w"].dtype == jnp.float32
  assert not set(pointers(state.average)) & set(pointers(x))
  for _ in range(3):
    updates, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, x)
    x = optax.apply_updates(x, updates)
  assert state.average["w"].dtype == jnp.float32
  # 1 - 2^-7 (1, 2, 3) averaged with weights 1, 9/10, 9/11, which has more
  # digits than bfloat16 holds.
  expected = 1 - (1 * (0.1 * 2 / 11) + 2 * (0.9 * 2 / 11) + 3 * (9 / 11)) / 128
  np.testing.assert_allclose(state.average["w"], expected, rtol=1e-6)


def test_record_keeps_what_the_update_measured():
  measure = lambda updates, state, x, gradient: {
    "moved": optax.tree.norm(updates) / optax.tree.norm(gradient),
    "first": x["a"].sum() + state.count,
  }
  tx = features.measured(optax.scale_by_schedule(lambda _: 0.5), measure)
  x = params()
  state = tx.init(x)
  assert state.scalars == {"moved": 0, "first": 0}
  updates, state = tx.update(x, state, x)
  jax.tree.map(lambda u, x: np.testing.assert_allclose(u, 0.5 * x), updates, x)
  np.testing.assert_allclose(state.scalars["moved"], 0.5, rtol=1e-6)
  np.testing.assert_allclose(state.scalars["first"], x["a"].sum() + 1)
  assert all(s.dtype == jnp.float32 for s in state.scalars.values())


def test_matching_searches_whole_paths():
  tree = {
    "blocks": [{"bias": 0, "kernel": 1}, {"bias": 2, "kernel": 3}],
    "pair": Pair(4, 5),
  }

  def matched(*patterns):
    matches = matching(patterns, tree)
    return [
      leaf
      for leaf, match in zip(
        jax.tree.leaves(tree), jax.tree.leaves(matches), strict=True
      )
      if match
    ]

  assert matched("bias") == [0, 2]
  assert matched("^blocks/1/") == [2, 3]
  assert matched("^bias") == []
  assert matched("pair/left", "0/kernel$") == [1, 4]
  assert matched() == []


def test_freeze_hides_the_leaves_from_the_transformation():
  x = params()
  tx = features.freeze(optax.adamw(0.1, weight_decay=0.5), ["^a$"])
  state = tx.init(x)
  updates, state = tx.update(x, state, x)
  np.testing.assert_array_equal(updates["a"], 0.0)
  alone = optax.adamw(0.1, weight_decay=0.5)
  expected, _ = alone.update(x["b"], alone.init(x["b"]), x["b"])
  jax.tree.map(np.testing.assert_array_equal, updates["b"], expected)
  assert (2,) not in [leaf.shape for leaf in jax.tree.leaves(state)]


def test_freeze_counts_no_frozen_gradient_and_keeps_nan_out():
  x = params()
  tx = features.freeze(optax.clip_by_global_norm(1.0), ["a"])
  grads = {"a": jnp.array([jnp.nan, 1e6]), "b": [jnp.array(0.5)]}
  updates, _ = tx.update(grads, tx.init(x), x)
  np.testing.assert_array_equal(updates["a"], 0.0)
  np.testing.assert_array_equal(updates["b"][0], 0.5)


def test_freeze_hands_extra_arguments_on():
  x = params()
  tx = features.freeze(contrib.momo(), ["a"])
  updates, _ = tx.update(x, tx.init(x), x, value=jnp.float32(9.0))
  # Polyak's step on b alone: 9 / 3^2 is its cap of 1.
  np.testing.assert_allclose(updates["b"][0], -3.0, rtol=1e-6)


def test_check_found_names_a_pattern_that_is_found_nowhere():
  check_found(["a", "0$"], params(), "config.freeze")
  with pytest.raises(
    UsageError, match=r"config\.freeze='missing' .* some are a, b/0"
  ):
    check_found(["a", "missing"], params(), "config.freeze")


def test_threads_that_trace_at_once_leave_optax_as_it_was():
  original, entered, left = _tree_math._vdot, threading.Event(), []

  def update(updates, state, params=None):
    # The first thread waits inside for the second one, which must not come.
    if entered.is_set():
      left.append("second")
    else:
      entered.set()
      left.append(second_is_in.wait(0.5))
    return updates, state

  second_is_in = threading.Event()
  tx = repairs.on_any_mesh(
    optax.GradientTransformation(lambda params: (), update)
  )

  def run_second():
    entered.wait()
    tx.update(params(), ())
    second_is_in.set()

  second = threading.Thread(target=run_second)
  second.start()
  tx.update(params(), ())
  second.join()
  assert left == ([False, "second"] if repairs.optax_ravels() else left)
  assert _tree_math._vdot is original
