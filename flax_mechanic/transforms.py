"""Adapters that let optax's methods share one flag and one training step."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import meta

from flax_mechanic.errors import UsageError
from flax_mechanic.sharding import parameter_of, parameter_path


def accepted(
  tx: optax.GradientTransformation, extra: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns those extra arguments that `tx.update` takes.

  Example:
    >>> sorted(accepted(optax.contrib.momo(), {"value": 1.0, "grad_fn": None}))
    ['grad_fn', 'value']
    >>> accepted(optax.sgd(0.1), {})
    {}
  """
  parameters = inspect.signature(tx.update).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return dict(extra)
  names = {p.name for p in parameters}
  return {name: value for name, value in extra.items() if name in names}


def own_buffers(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Makes the state of `tx` safe to donate together with the parameters.

  Several of optax's states hold the parameters themselves, one zeros array
  several times, or an array that `init` hands out each time (optax 0.2.8); the
  copies that part them vanish when `init` is compiled.
  """
  tx = optax.with_extra_args_support(tx)
  return optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.copy, tx.init(params)), tx.update
  )


def keep_dtypes(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Keeps each leaf of the state in the dtype that `init` gave it.

  A float32 learning rate widens the state of low-precision parameters where it
  comes before the accumulators (optax 0.2.8: `lars`, `cocob`).
  """
  tx = optax.with_extra_args_support(tx)
  cast = lambda new, old: (
    new if new.dtype == old.dtype else new.astype(old.dtype)
  )

  def update(updates, state, params=None, **extra_args):
    updates, new_state = tx.update(updates, state, params, **extra_args)
    return updates, jax.tree.map(cast, new_state, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def hand_on(
  wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation],
  base: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns `wrap(base)`, where `base` gets the extra arguments it accepts.

  Some of optax's wrappers call `base.update` without them (optax 0.2.8: `sam`,
  `split_real_and_imaginary`).
  """

  def update(updates, state, params=None, **extra_args):
    bound = optax.GradientTransformation(
      base.init,
      lambda updates, state, params=None: base.update(
        updates, state, params, **accepted(base, extra_args)
      ),
    )
    tx = wrap(bound)
    return tx.update(updates, state, params, **accepted(tx, extra_args))

  return optax.GradientTransformationExtraArgs(wrap(base).init, update)


def box_what_fits(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Takes leaves of the state that have a shape of their own out of boxes.

  Adafactor's factors, of one axis each, would stay in the boxes (Linen's
  `Partitioned`, NNX's variables) of kernels of two axes, and no array can be
  placed as they then say (optax 0.2.8, flax 0.12).
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    state = tx.init(params)
    parameters = {
      parameter_path(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    fits = lambda path, shape: parameter_of(path, shape, parameters) is not None
    return jax.tree_util.tree_map_with_path(
      lambda path, box: box if fits(path, _unbox(box).shape) else _unbox(box),
      state,
      is_leaf=_is_box,
    )

  def update(updates, state, params=None, **extra_args):
    bare = lambda tree: jax.tree.map(_unbox, tree, is_leaf=_is_box)
    like = jax.tree.structure((updates, state))
    new = tx.update(bare(updates), bare(state), bare(params), **extra_args)
    return jax.tree.unflatten(like, jax.tree.leaves(new))

  return optax.GradientTransformationExtraArgs(init, update)


def _is_box(node: Any) -> bool:
  """Whether it is a box with an array in it; `optax.masked` leaves others."""
  boxes = meta.AxisMetadata | nnx.Variable
  return isinstance(node, boxes) and bool(jax.tree.leaves(node))


def _unbox(node: Any) -> Any:
  return jax.tree.leaves(node)[0] if _is_box(node) else node


def skip_zeros(
  tx: optax.GradientTransformation, learning_rate: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
  """Skips the updates at which `tx` would divide 0 by 0.

  Prodigy and D-Adaptation divide by the sum of the gradients they have weighted
  with the learning rate (optax 0.2.8): where the schedule or the gradient is
  exactly 0 from the start, their estimate becomes NaN for good.
  """
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    moves = jax.tree.reduce(
      jnp.logical_or,
      jax.tree.map(lambda g: jnp.any(g != 0), updates),
      jnp.zeros([], bool),
    )
    run = lambda: tx.update(updates, state, params, **extra_args)
    like, _ = jax.eval_shape(run)
    skip = lambda: (
      jax.tree.map(lambda g, u: jnp.zeros_like(g, u.dtype), updates, like),
      state,
    )
    return jax.lax.cond(moves & (learning_rate != 0), run, skip)

  return optax.GradientTransformationExtraArgs(tx.init, update)


class AveragedState(NamedTuple):
  """State of `average_iterates`.

  Attributes:
    inner_state: the wrapped transformation's.
    count: int32 scalar, updates so far.
    average: averaged parameters, float32 or wider.
  """

  inner_state: optax.OptState
  count: jax.Array
  average: optax.Params


def average_iterates(
  tx: optax.GradientTransformation, gamma: float
) -> optax.GradientTransformationExtraArgs:
  """Keeps a polynomial-decay average of the parameters that `tx` reaches.

  After update t the average moves by (1 + gamma) / (t + gamma) of the way to
  the new parameters, so that about the last 1 / (1 + gamma) of the run counts
  (Shamir, Zhang 2013, arXiv 1212.1824; with gamma 8 in DoG, arXiv 2302.12022).
  """
  tx = optax.with_extra_args_support(tx)
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))

  def init(params):
    return AveragedState(
      tx.init(params),
      jnp.zeros([], jnp.int32),
      jax.tree.map(lambda x: jnp.copy(wide(x)), params),
    )

  def update(updates, state, params=None, **extra_args):
    updates, inner_state = tx.update(
      updates, state.inner_state, params, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    weight = (1 + gamma) / (count + gamma)
    average = jax.tree.map(
      lambda a, x, u: a + weight * (wide(x) + u - a),
      state.average,
      params,
      updates,
    )
    return updates, AveragedState(inner_state, count, average)

  return optax.GradientTransformationExtraArgs(init, update)


class RecordedState(NamedTuple):
  """State of `record`.

  Attributes:
    inner_state: the wrapped transformation's.
    scalars: name -> float32 scalar, 0 before the first update.
  """

  inner_state: optax.OptState
  scalars: dict[str, jax.Array]


def record(
  tx: optax.GradientTransformation,
  measure: Callable[..., dict[str, jax.Array]],
) -> optax.GradientTransformationExtraArgs:
  """Keeps scalars of the last update that the state of `tx` does not hold.

  Args:
    tx: the transformation.
    measure: `measure(updates, new_state, params)` returns name -> scalar.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    inner_state = tx.init(params)
    names = jax.eval_shape(measure, params, inner_state, params)
    return RecordedState(
      inner_state, {name: jnp.zeros([], jnp.float32) for name in names}
    )

  def update(updates, state, params=None, **extra_args):
    updates, inner_state = tx.update(
      updates, state.inner_state, params, **extra_args
    )
    scalars = {
      name: jnp.asarray(value, jnp.float32)
      for name, value in measure(updates, inner_state, params).items()
    }
    return updates, RecordedState(inner_state, scalars)

  return optax.GradientTransformationExtraArgs(init, update)


def matching(patterns: Sequence[str], params: optax.Params) -> Any:
  """Returns a tree of bools: which leaves a pattern is found in the path of.

  Args:
    patterns: regular expressions, searched in paths such as "blocks/0/bias".
    params: the parameters.

  Example:
    >>> matching(["bias$"], {"head": {"bias": 0, "kernel": 1}})
    {'head': {'bias': True, 'kernel': False}}
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(
      re.search(pattern, parameter_path(path)) for pattern in patterns
    ),
    params,
  )


def freeze(
  tx: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
  """Keeps the leaves whose path a pattern is found in; `tx` sees the others.

  `optax.masked` would hand their raw gradient through as their update (optax
  0.2.8).

  """
  label = lambda params: jax.tree.map(
    lambda frozen: "freeze" if frozen else "train", matching(patterns, params)
  )
  # Zeros like the parameters: a gradient per example has one axis more.
  still = optax.stateless(
    lambda updates, params: jax.tree.map(
      jnp.zeros_like, updates if params is None else params
    )
  )
  return optax.partition({"train": tx, "freeze": still}, label)


def zero_gradients(patterns: Sequence[str]) -> optax.GradientTransformation:
  """Sets the gradients of the leaves to 0 whose path a pattern is found in."""
  return optax.stateless(
    lambda updates, _: jax.tree.map(
      lambda frozen, g: jnp.zeros_like(g) if frozen else g,
      matching(patterns, updates),
      updates,
    )
  )


def check_found(
  patterns: Sequence[str], params: optax.Params, field: str
) -> None:
  """Raises a UsageError for a pattern that is found in no parameter's path.

  Args:
    patterns: as in `matching`.
    params: the parameters.
    field: the config field that holds the patterns.
  """
  paths = [
    parameter_path(path)
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  ]
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in paths):
      raise UsageError(
        f"{field}={pattern!r} is found in no parameter's path; some are "
        + ", ".join(paths[:4])
      )


class AccumulatedState(NamedTuple):
  """State of `accumulate`.

  Attributes:
    steps: that of `optax.MultiSteps`.
    value: float32 scalar, sum of the losses since the last update.
  """

  steps: optax.MultiStepsState
  value: jax.Array


def accumulate(
  tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
  """Updates once in `every` batches, with the means of gradient and loss.

  `optax.MultiSteps` hands on the last batch's loss, and its
  `gradient_transformation()` none (optax 0.2.8).
  """
  steps = optax.MultiSteps(tx, every)

  def init(params):
    return AccumulatedState(steps.init(params), jnp.zeros([], jnp.float32))

  def update(updates, state, params=None, **extra_args):
    value = state.value
    if "value" in extra_args:
      batches = state.steps.mini_step
      value = jnp.where(batches == 0, 0.0, value) + extra_args["value"]
      extra_args["value"] = value / (batches + 1)
      value = value.astype(jnp.float32)
    updates, inner = steps.update(updates, state.steps, params, **extra_args)
    # MultiSteps clears its sum by a product with 0, which keeps a NaN (optax
    # 0.2.8).
    done = steps.has_updated(inner)
    cleared = jax.tree.map(
      lambda g: jnp.where(done, jnp.zeros_like(g), g), inner.acc_grads
    )
    return updates, AccumulatedState(inner._replace(acc_grads=cleared), value)

  return optax.GradientTransformationExtraArgs(init, update)
