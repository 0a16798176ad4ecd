"""What the flag adds around any method, and what it lends to a few.

Around any: its rate, averages, accumulation, freezing. To a few: which
parameters are matrices (`muon`), the Hessian's diagonal (`sophia`).
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from optax.schedules import InjectStatefulHyperparamsState

from flax_mechanic.mechanic import MechanicState
from flax_mechanic.mechanic.offset import widen
from flax_mechanic.paths import matching, outermost, parameter_path


def injected(
  build: Callable[[jax.Array], optax.GradientTransformation],
  learning_rate: float | optax.Schedule,
  *,
  rounds: bool,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the learning rate in the state, where it can be read and set.

  `optax.inject_hyperparams` keeps a schedule's count under the same name, so
  that `optax.tree.get` finds two (optax 0.2.8). Here the state has one value
  and is the same with a schedule and without.

  The extra argument `rate_factor` multiplies the rate of one update.

  Args:
    build: learning rate, a float scalar -> the transformation.
    learning_rate: update count -> learning rate; or the first value of one that
      remains until it is set.
    rounds: whether the rate is rounded to the updates' dtype, as optax rounds a
      schedule's, so that the updates are optax's bit for bit. Otherwise it is
      float32, and widens updates that are narrower.
  """
  in_float32 = lambda value: jnp.asarray(value, jnp.float32)

  def rate(count: jax.Array, kept: Any) -> jax.Array:
    if callable(learning_rate):
      return jnp.asarray(learning_rate(count)) * 1.0  # It may be an integer.
    # With 64 bits, the number itself until another one is set.
    exact, kept = jnp.asarray(learning_rate, float), in_float32(kept)
    is_kept = kept == in_float32(learning_rate)
    return jnp.where(is_kept, exact, kept.astype(exact.dtype))

  def given(value: jax.Array) -> jax.Array:
    return _weak(value) if rounds else in_float32(value)

  def init(params):
    count = jnp.zeros([], jnp.int32)
    value = rate(count, learning_rate)
    inner_state = build(given(value)).init(params)
    return InjectStatefulHyperparamsState(
      count, {"learning_rate": in_float32(value)}, {}, inner_state
    )

  def update(updates, state, params=None, *, rate_factor=1.0, **extra_args):
    value = rate(state.count, state.hyperparams["learning_rate"])
    factor = jnp.asarray(rate_factor, value.dtype)
    tx = optax.with_extra_args_support(build(given(value * factor)))
    updates, inner_state = tx.update(
      updates, state.inner_state, params, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, InjectStatefulHyperparamsState(
      count, {"learning_rate": in_float32(value)}, {}, inner_state
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _weak(value: jax.Array) -> jax.Array:
  """Returns a scalar that takes the dtype of what it multiplies."""
  # No public function of jax makes an array weakly typed (0.12).
  return jax.lax.convert_element_type_p.bind(
    value, new_dtype=value.dtype, weak_type=True, sharding=None
  )


def reduce_on_plateau(
  tx: optax.GradientTransformation,
  plateau: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Reduces the learning rate inside `tx` by what `plateau` reduces updates by.

  Reduced updates would differ from what the states of several methods remember
  of them (mechanic's offset, schedule_free's iterates, cocob's positions). The
  loss of a gradient that Mechanic skips does not count.

  Args:
    tx: a transformation around `injected`.
    plateau: `optax.contrib.reduce_on_plateau`.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return tx.init(params), plateau.init(params)

  def update(updates, state, params=None, **extra_args):
    before, plateau_before = state
    factor, reduced = plateau.update(
      jnp.ones([]), plateau_before, value=extra_args["value"]
    )
    extra_args["rate_factor"] = factor
    updates, inner_state = tx.update(updates, before, params, **extra_args)
    choose = _choice(before, inner_state)
    start = plateau.init(updates)
    reduced = jax.tree.map(choose, reduced, plateau_before, start)
    return updates, (inner_state, reduced)

  return optax.GradientTransformationExtraArgs(init, update)


def matrices(
  rules: Sequence[str], numbers: Callable[..., Any]
) -> Callable[[optax.Params], Any]:
  """Says which axes of each parameter are a matrix's rows and columns.

  Args:
    rules: "PATTERN AXES": a regular expression that is searched in a
      parameter's path, and a letter for each of its axes: i, input; o, output;
      b, neither. The first rule that fits a path and its number of axes counts;
      rules without i or o make no matrix. Without a rule, two axes make one.
      What has no elements is none.
    numbers: `numbers(reduction_axis, output_axis)`.

  Returns:
    Parameters -> a tree of `numbers(...)`, with None for what is no matrix.

  Raises:
    ValueError: a rule is not of that form.
  """
  for rule in rules:
    if not re.fullmatch(r"\S+ [iob]+", f"{rule}"):
      raise ValueError(
        f"matrices={rule!r} is not PATTERN AXES; type for example "
        "'kernel iiio', a letter for each axis: i, input; o, output; b, neither"
      )

  def of_leaf(path, leaf):
    if not leaf.size:
      return None
    found = "io" if leaf.ndim == 2 else ""
    for pattern, axes in reversed([rule.split() for rule in rules]):
      if len(axes) == leaf.ndim and re.search(pattern, parameter_path(path)):
        found = axes
    of = lambda letter: tuple(i for i, a in enumerate(found) if a == letter)
    return numbers(of("i"), of("o")) if of("i") and of("o") else None

  return lambda params: jax.tree_util.tree_map_with_path(of_leaf, params)


def hutchinson(seed: int) -> optax.GradientTransformationExtraArgs:
  """Estimates the diagonal of the Hessian as z * H z, with random signs z.

  `optax.contrib.hutchinson_estimator_diag_hessian` differentiates the loss
  itself, which is a device's own under `pmap` and `shard_map` (optax 0.2.8);
  `grad_fn` is that of the whole batch.
  """

  def init(params):
    del params
    return contrib.HutchinsonState(jax.random.PRNGKey(seed))

  def update(
    updates: optax.Updates,
    state: Any,
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, contrib.HutchinsonState]:
    del updates
    grad_fn = extra_args["grad_fn"]
    key, subkey = jax.random.split(state.key)
    signs = optax.tree.random_like(subkey, params, jax.random.rademacher)
    _, products = jax.jvp(grad_fn, (params,), (signs,))
    return jax.tree.map(jnp.multiply, signs, products), state._replace(key=key)

  return optax.GradientTransformationExtraArgs(init, update)


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
  wide = lambda x: widen(x, jnp.float32)

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


def schedule_free(
  base: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  b1: float,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """Returns `optax.contrib.schedule_free`, which goes over Mechanic too.

  Mechanic learns from z - x0, so it is handed z, which its updates move; optax
  hands on y, where the gradient is taken (0.2.8). A gradient that Mechanic
  skips is not averaged either, and where it restarts, so does the average.

  Args:
    base: what moves z.
    learning_rate: update count -> learning rate, whose square is an iterate's
      weight in the average.
    b1: how far y is from z towards the average x.
    **options: optax's others.
  """
  if not 0 < b1 < 1:
    raise ValueError(f"b1={b1} must be above 0 and below 1")
  average = lambda base: contrib.schedule_free(
    base, learning_rate, b1=b1, **options
  )
  base = optax.with_extra_args_support(base)
  plain = average(base)

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    if not _mechanic_counts(state.base_optimizer_state):
      return plain.update(updates, state, params, **extra_args)
    z = state.z

    def update_z(updates, state, params=None, **extra_args):
      del params
      return base.update(updates, state, z, **extra_args)

    moves_z = optax.GradientTransformationExtraArgs(base.init, update_z)
    tx: Any = average(moves_z)
    moved, new = tx.update(updates, state, params, **extra_args)
    choose = _choice(state.base_optimizer_state, new.base_optimizer_state)
    moved = jax.tree.map(
      lambda u, z, y: choose(u, jnp.zeros_like(u), (z - y).astype(u.dtype)),
      *(moved, new.z, params),
    )
    return moved, new._replace(
      step_count=choose(new.step_count, state.step_count, 1),
      weight_sum=choose(new.weight_sum, state.weight_sum, 0),
      max_lr=choose(new.max_lr, state.max_lr, 0),
    )

  return optax.GradientTransformationExtraArgs(plain.init, update)


def _choice(
  before: optax.OptState, after: optax.OptState
) -> Callable[[jax.Array, Any, Any], jax.Array]:
  """Returns what chooses a value around the Mechanic in a state, if any.

  It is `choose(new, old, start)`: the old one where Mechanic has skipped the
  gradient, that of the start where Mechanic has gone back to its own.
  """
  if not _mechanic_counts(before):
    return lambda new, old, start: new
  old_count, new_count = (sum(_mechanic_counts(s)) for s in (before, after))
  return lambda new, old, start: jnp.where(
    new_count > old_count, new, jnp.where(new_count < old_count, start, old)
  )


def _mechanic_counts(state: optax.OptState) -> list[jax.Array]:
  """Returns how many gradients each Mechanic in a state has taken."""
  return [each.count for each in outermost(state, (MechanicState,))]


class MeasuredState(NamedTuple):
  """State of `measured`.

  Attributes:
    inner_state: the wrapped transformation's.
    scalars: name -> float32 scalar, 0 before the first update.
  """

  inner_state: optax.OptState
  scalars: dict[str, jax.Array]


def measured(
  tx: optax.GradientTransformation,
  measure: Callable[..., dict[str, jax.Array]],
) -> optax.GradientTransformationExtraArgs:
  """Keeps scalars of the last update that the state of `tx` does not hold.

  Args:
    tx: the transformation.
    measure: `measure(updates, new_state, params, gradient)` returns name ->
      scalar, of which "factor" multiplies the learning rate. It is not called
      that, so that `optax.tree.get` finds one `learning_rate`.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    inner_state = tx.init(params)
    names = jax.eval_shape(measure, params, inner_state, params, params)
    return MeasuredState(
      inner_state, {name: jnp.zeros([], jnp.float32) for name in names}
    )

  def update(updates, state, params=None, **extra_args):
    moved, inner_state = tx.update(
      updates, state.inner_state, params, **extra_args
    )
    scalars = {
      name: jnp.asarray(value, jnp.float32)
      for name, value in measure(moved, inner_state, params, updates).items()
    }
    return moved, MeasuredState(inner_state, scalars)

  return optax.GradientTransformationExtraArgs(init, update)


def freeze(
  tx: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
  """Freezes the leaves whose path matches a pattern; `tx` sees the others.

  `optax.masked` would return their raw gradient as their update (optax 0.2.8).
  """
  label = lambda params: jax.tree.map(
    lambda frozen: "freeze" if frozen else "train", matching(patterns, params)
  )
  # Shaped like the parameters: a gradient per example has one more axis.
  still = optax.stateless(
    lambda updates, params: jax.tree.map(
      jnp.zeros_like, updates if params is None else params
    )
  )
  parts = optax.partition({"train": tx, "freeze": still}, label)

  def update(
    updates: optax.Updates,
    state: optax.OptState,
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    if "grad_fn" in extra_args:
      extra_args["grad_fn"] = _of_part(extra_args["grad_fn"], params)
    return parts.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(parts.init, update)


def _of_part(
  grad_fn: Callable[[optax.Params], optax.Updates], params: optax.Params
) -> Callable[[optax.Params], optax.Updates]:
  """Returns `grad_fn` for trees that have `optax.MaskedNode`s in the place of
  leaves, which are then those of `params`.
  """
  is_masked = lambda node: isinstance(node, optax.MaskedNode)
  choose = functools.partial(jax.tree.map, is_leaf=is_masked)

  def grad_of_part(part):
    whole = choose(lambda x, fixed: fixed if is_masked(x) else x, part, params)
    return choose(lambda x, g: x if is_masked(x) else g, part, grad_fn(whole))

  return grad_of_part


def zero_gradients(patterns: Sequence[str]) -> optax.GradientTransformation:
  """Sets the gradients of the leaves whose path matches a pattern to 0."""
  return optax.stateless(
    lambda updates, _: jax.tree.map(
      lambda frozen, g: jnp.zeros_like(g) if frozen else g,
      matching(patterns, updates),
      updates,
    )
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
  """Updates once per `every` batches, with the means of gradient and loss.

  `optax.MultiSteps` passes on the last batch's loss, and its
  `gradient_transformation()` none (optax 0.2.8).
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    steps = optax.MultiSteps(tx, every)
    return AccumulatedState(steps.init(params), jnp.zeros([], jnp.float32))

  def update(updates, state, params=None, *, grad_fn=None, **extra_args):
    # MultiSteps updates inside a conditional, whose operands must be arrays, so
    # grad_fn is bound outside.
    given = {} if grad_fn is None else {"grad_fn": grad_fn}
    bound = functools.partial(tx.update, **given)
    steps = optax.MultiSteps(
      optax.GradientTransformationExtraArgs(tx.init, bound), every
    )
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
