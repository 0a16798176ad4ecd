"""A stack of rows: which row wraps which, and what the stack builds."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_mechanic.errors import UsageError
from flax_mechanic.mechanic.boxes import without_empty_boxes
from flax_mechanic.methods import features, registry, repairs
from flax_mechanic.methods import guard as guard_lib
from flax_mechanic.methods.registry import Method
from flax_mechanic.paths import check_found, matching
from flax_mechanic.placement import is_abstract

Options = Mapping[str, Mapping[str, Any]]


def resolve(name: str, options: Options) -> list[Method]:
  """Returns the rows that `name` names, the outermost wrapper first.

  Args:
    name: the value of `config.optimizer`.
    options: row name -> option -> value, of every row.

  Raises:
    UsageError: an unknown name, or rows that do not go together.
  """
  rows = [registry.get(name, "config.optimizer")]
  while rows[-1].wraps:
    outer = rows[-1]
    field = f"config.opt.{outer.name}.base"
    row = registry.get(options[outer.name]["base"], field)
    _check_pair(rows, row, field)
    rows.append(row)
  return rows


def defaults(row: Method, own: str | None) -> Mapping[str, Any]:
  """Returns a row's options, in a job whose own optimizer is known.

  A wrapper that is tuned by hand leaves the job's learning rate to its base, so
  by default the base is the optimizer that the rate was tuned for, where it can
  be. Mechanic's is as it is registered: it reads no learning rate, and what is
  known about it was measured over that base.

  Args:
    row: of the table.
    own: the row that the job was written for, if that is known.
  """
  base = registry.methods().get(own or "")
  if (
    base is None
    or not (row.wraps and row.tuned and base.tuned)
    or base.wraps
    or base.replaces_gradient
    or base.name in row.refuses
  ):
    return row.options
  return {**row.options, "base": base.name}


def _check_pair(above: Sequence[Method], row: Method, field: str) -> None:
  """Raises where `row` cannot be the base of the rows above it."""
  if row in above:
    raise UsageError(f"{field}={row.name!r} wraps itself; name another base")
  learns = [upper.name for upper in above if not upper.tuned]
  if learns and not row.tuned:
    raise UsageError(
      f"{field}={row.name!r} learns its learning rate itself, and so does "
      f"{learns[0]}; name a base that is tuned by hand, such as 'adamw'"
    )
  reads = {"value": "the loss", "grad_fn": "another gradient"}
  for need in row.needs & reads.keys():
    if "per_example" in above[0].needs and not row.replaces_gradient:
      raise UsageError(
        f"{field}={row.name!r} reads {reads[need]}, which has no noise, so "
        f"under {above[0].name} the run would not be private; name another "
        "base, such as 'adamw'"
      )
  if "per_example" in row.needs and any("value" in r.needs for r in above):
    raise UsageError(
      f"{field}={row.name!r} hides the loss, which {above[0].name} reads; name "
      "another base, such as 'adamw'"
    )
  if row.replaces_gradient and above[0].replaces_gradient:
    raise UsageError(
      f"{field}={row.name!r} makes its own gradient, and so does "
      f"{above[0].name}; name another base, such as 'adamw'"
    )
  if row.replaces_gradient:
    fix = (
      f"--config.optimizer={row.name} --config.opt.{row.name}.base="
      f"{above[-1].name}"
      if row.wraps
      else "--config.optimizer=differentially_private_aggregate "
      "--config.opt.differentially_private_aggregate.base="
      f"{above[-1].name}"
    )
    raise UsageError(
      f"{field}={row.name!r} makes its own gradient, so it must be "
      f"outermost; type {fix}"
    )
  for upper in above:
    if row.name in upper.refuses:
      raise UsageError(
        f"{field}={row.name!r} does not go under {upper.name}: "
        f"{upper.refuses[row.name]}; name another base"
      )
    if row.name in upper.cautions:
      warnings.warn(upper.cautions[row.name], stacklevel=2)


def peak(
  rows: Sequence[Method], options: Options, learning_rate: float | None
) -> float:
  """Returns the peak learning rate: the method's own, or the user's.

  Args:
    rows: of the stack.
    options: row name -> option -> value.
    learning_rate: `config.learning_rate`.

  Raises:
    UsageError: the stack is tuned by hand and `learning_rate` is None.
  """
  for row in rows:
    if not row.tuned:
      return options[row.name].get("learning_rate", 1.0)
  own = own_rate(rows, options)
  if own is not None:
    return own
  if learning_rate is None:
    raise UsageError(
      f"config.optimizer={rows[0].name!r} is tuned by hand and needs "
      "config.learning_rate; set it, or take --config.optimizer=mechanic"
    )
  return learning_rate


def own_rate(rows: Sequence[Method], options: Options) -> float | None:
  """Returns the option `learning_rate` of a row that is tuned, if it is set."""
  if not all(row.tuned for row in rows):
    return None
  return options[rows[-1].name].get("learning_rate")


def relative_rate(rows: Sequence[Method]) -> float:
  """Returns a stack's learning rate to start from, over adamw's."""
  return math.prod(row.relative_rate for row in rows)


def schedule_name(rows: Sequence[Method]) -> str:
  """Returns the name of the schedule that the stack is meant for."""
  names = (row.schedule for row in rows if row.schedule is not None)
  return next(names, "constant")


def build(
  rows: Sequence[Method],
  options: Options,
  learning_rate: float | optax.Schedule,
  *,
  grad_clip: float = 0.0,
  accumulate_steps: int = 1,
  freeze: Sequence[str] = (),
  no_decay: Sequence[str] = (),
  guard: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Builds the transformation of a stack.

  From the outside in: rows that make their own gradient, frozen parameters,
  accumulation, the guard against bad gradients, clipping, the other rows.

  Args:
    rows: the outermost wrapper first.
    options: row name -> option -> value.
    learning_rate: update count -> learning rate; or a number, which can then be
      set in the state.
    grad_clip: maximum global norm, 0 for none.
    accumulate_steps: batches per update.
    freeze: regular expressions; parameters whose path contains a match are
      frozen.
    no_decay: regular expressions; parameters whose path contains a match are
      not decayed.
    guard: whether bad gradients are skipped.

  Raises:
    UsageError: an option that the stack cannot take; by `init`, a pattern that
      matches no parameter's path.
  """
  below = [row for row in rows if not row.replaces_gradient]
  outer = [row for row in rows if row.replaces_gradient]
  if not below and (grad_clip or accumulate_steps > 1):
    field = "grad_clip" if grad_clip else "accumulate_steps"
    raise UsageError(
      f"config.{field} does not go with config.optimizer={rows[0].name!r}, "
      "whose gradients are per example; type --config.optimizer="
      "differentially_private_aggregate "
      "--config.opt.differentially_private_aggregate.base=sgd"
    )
  arguments = {
    row.name: {
      **_arguments(rows[:i], row, options),
      **({} if guard else row.unguarded),
    }
    for i, row in enumerate(rows)
  }

  schedule = (
    learning_rate
    if callable(learning_rate)
    else optax.constant_schedule(learning_rate)
  )
  tx = _build_innermost(rows[-1], arguments, learning_rate, no_decay)
  if below:
    for row in reversed(below[:-1]):
      tx = _build_row(row, tx, schedule, **arguments[row.name])
    judges = any(row.unguarded for row in below)
    if grad_clip:
      clip = repairs.clip_by_global_norm(grad_clip, keep_bad=judges)
      tx = optax.chain(clip, tx)
    if guard and not judges:
      tx = guard_lib.guard(tx)
    if accumulate_steps > 1:
      tx = features.accumulate(tx, accumulate_steps)
  if freeze:
    tx = features.freeze(tx, freeze)
  tx = repairs.on_any_mesh(tx)
  for row in reversed([row for row in outer if row.wraps]):
    tx = _build_row(row, tx, schedule, **arguments[row.name])
    if freeze:
      # Frozen parameters do not count in the norms that the row computes.
      tx = optax.chain(features.zero_gradients(freeze), tx)
  needs = frozenset().union(*(row.needs for row in rows))
  caution = _once_about_rounding(rows)
  tx = without_empty_boxes(repairs.keep_dtypes(repairs.own_buffers(tx)))

  def init(params: optax.Params) -> optax.OptState:
    if is_abstract(params):
      return jax.eval_shape(init, params)
    check_found(freeze, params, "config.freeze")
    check_found(no_decay, params, "config.no_decay")
    caution(params)
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init, _Update(tx.update, needs))


def _once_about_rounding(
  rows: Sequence[Method],
) -> Callable[[optax.Params], None]:
  """Returns what warns once, if the rows train parameters badly."""
  lost = [row.name for row in rows if row.rounds_to_nothing]
  warn = functools.cache(lambda text: warnings.warn(text, stacklevel=4))

  def caution(params: optax.Params) -> None:
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    narrow = sorted(
      dtype.name
      for dtype in dtypes
      if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    )
    if lost and narrow:
      warn(
        f"{lost[0]} hardly trains {' and '.join(narrow)} parameters, since "
        "rounding loses its small first steps; keep the parameters in float32 "
        "(param_dtype=float32), which the model may convert to compute in "
        f"{narrow[0]} (dtype={narrow[0]}), or use mechanic"
      )

  return caution


def needs(tx: optax.GradientTransformation) -> frozenset[str]:
  """Returns what a transformation from `build` needs besides the gradient.

  It is empty for any other transformation; see `Method.needs`.
  """
  return tx.update.needs if isinstance(tx.update, _Update) else frozenset()


@dataclasses.dataclass(frozen=True)
class _Update:
  """An `update` that says what it needs."""

  update: optax.TransformUpdateExtraArgsFn
  needs: frozenset[str]

  def __call__(
    self,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    missing = sorted(self.needs - {"per_example"} - extra_args.keys())
    if missing:
      arguments = ", ".join(f"{name}=..." for name in missing)
      raise ValueError(
        f"this optimizer needs {' and '.join(missing)}: call minimize, or "
        f"update(..., {arguments}); it cannot be under a transformation that "
        "takes no such arguments, as optax.lookahead does not"
      )
    if "per_example" in self.needs and params is not None:
      leaves = zip(
        jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
      )
      if any(jnp.ndim(g) == jnp.ndim(x) for g, x in leaves):
        # Optax would take the rows of a kernel for examples.
        raise ValueError(
          "this optimizer needs a gradient for each example: call minimize, or "
          "update with gradients that have the batch for a first axis; within "
          "optax.chain minimize does not see what it needs, so leave the chain "
          "out"
        )
    if "grad_fn" not in self.needs:
      # MultiSteps and conditionals pass on arrays only, and it is none.
      extra_args.pop("grad_fn", None)
    return self.update(updates, state, params, **extra_args)


def _arguments(
  above: Sequence[Method], row: Method, options: Options
) -> dict[str, Any]:
  """Returns the arguments of a row's `build`, under the rows above it."""
  given = dict(options[row.name])
  for upper in above:
    given |= {k: v for k, v in upper.base_options.items() if k in given}
  return {k: v for k, v in given.items() if k not in ("base", "learning_rate")}


def _build_row(
  row: Method, *args: Any, **options: Any
) -> optax.GradientTransformation:
  try:
    return row.build(*args, **options)
  except (TypeError, ValueError) as error:
    raise UsageError(f"config.opt.{row.name}: {error}") from error


def _build_innermost(
  row: Method,
  arguments: Mapping[str, Mapping[str, Any]],
  learning_rate: float | optax.Schedule,
  no_decay: Sequence[str],
) -> optax.GradientTransformation:
  options = dict(arguments[row.name])
  if no_decay:
    if row.decay_mask is None:
      raise UsageError(
        f"config.no_decay={tuple(no_decay)} does not go with {row.name}, which "
        "decays every parameter or none; leave it empty"
      )
    options[row.decay_mask] = lambda params: jax.tree.map(
      lambda matches: not matches, matching(no_decay, params)
    )
  _build_row(row, 1.0, **options)  # A bad option raises here, not in `init`.
  return repairs.box_what_fits(
    features.injected(
      lambda learning_rate: row.build(learning_rate, **options),
      learning_rate,
      rounds=row.tuned,
    )
  )
