"""The registry of optimizers: what a row says, and how to look one up."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import optax

from flax_mechanic.errors import UsageError, did_you_mean

Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A row of the table of optimizers, as `register` returns it.

  Attributes:
    name: what `config.optimizer` says.
    build: `build(learning_rate, **options)`, or for a row that wraps another
      `build(base, learning_rate, **options)`; returns an optax transformation.
    options: option -> its default, or its type where the default is None. The
      option `base` names the wrapped row and makes this row a wrapper; the
      option `learning_rate` is the peak, which a row that is tuned takes from
      `config.learning_rate` by default.
    choices: option -> what it may be, where that is a name.
    tuned: whether the learning rate is tuned by hand. A tuned wrapper leaves it
      to its base; any other wrapper learns its base's learning rate.
    relative_rate: of a tuned row, a learning rate to start from, over adamw's
      in the same job; of a tuned wrapper, over its base's.
    needs: what a step must pass besides the gradient: "value", the loss;
      "grad_fn", parameters -> gradient on the same batch; "per_example", a
      gradient per example in place of the gradient.
    schedule: the schedule that it is meant for, a name for `make_schedule`;
      None for a wrapper that leaves it to its base.
    decay_mask: the argument of `build` that says which leaves are decayed.
    base_options: values that options of its base must have, if it has them.
    refuses: row -> why this wrapper does not work over it.
    cautions: row -> the warning when this wrapper is over it.
    unguarded: arguments of `build` that set off the guard against bad gradients
      that it has itself; without any it is given one.
    rounds_to_nothing: whether its first steps are so small that rounding loses
      them where parameters are narrower than float32, of which it then warns.
    scalars: state type -> what that state has learned; the key "learning_rate"
      is a factor of the effective learning rate.
    eval_params: state type -> (state, params) -> parameters to evaluate.
    summary: one line on what it is.
    advice: one line on when to use it, and with what.
    paper: its source.

  Example:
    >>> prodigy = methods()["prodigy"]
    >>> prodigy.tuned, prodigy.schedule, prodigy.wraps
    (False, 'warmup_cosine', False)
  """

  name: str
  build: Callable[..., optax.GradientTransformation]
  options: Mapping[str, Any]
  choices: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  tuned: bool = True
  relative_rate: float = 1.0
  needs: frozenset[str] = frozenset()
  schedule: str | None = "warmup_cosine"
  decay_mask: str | None = None
  base_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
  cautions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unguarded: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rounds_to_nothing: bool = False
  scalars: Mapping[type, Callable[[Any], Scalars]] = dataclasses.field(
    default_factory=dict
  )
  eval_params: Mapping[type, Callable[[Any, optax.Params], optax.Params]] = (
    dataclasses.field(default_factory=dict)
  )
  summary: str = ""
  advice: str = ""
  paper: str = ""

  @property
  def wraps(self) -> bool:
    """Whether it wraps another row."""
    return "base" in self.options

  @property
  def rate(self) -> str:
    """Its learning rate where adamw's is 0.001, in words."""
    if not self.tuned:
      return "learned"
    if not self.wraps:
      return f"{1e-3 * self.relative_rate:g}"
    times = f"{self.relative_rate:g} times " if self.relative_rate != 1 else ""
    return f"{times}its base's"

  @property
  def replaces_gradient(self) -> bool:
    """Whether it makes its own gradient, so that it must be outermost."""
    return "per_example" in self.needs or (
      self.wraps and "grad_fn" in self.needs
    )


_TABLE: dict[str, Method] = {}
# What is not in the table: name -> why, and what to type instead.
_LEFT_OUT: dict[str, str] = {}


def methods() -> Mapping[str, Method]:
  """Returns the table, name -> row, as a live read-only view.

  Example:
    >>> methods()["momo"].needs
    frozenset({'value'})
  """
  return MappingProxyType(_TABLE)


def default_options(
  build: Callable[..., Any], *, without: tuple[str, ...] = (), **overrides: Any
) -> dict[str, Any]:
  """Returns the defaults in `build`'s signature that a command line can set:
  bools, numbers, strings and tuples.

  Args:
    build: a function that makes a transformation.
    without: arguments to leave out.
    **overrides: defaults in place of the signature's, or the type of an option
      whose default is None.

  Example:
    >>> default_options(optax.lion, mu_dtype=str)
    {'b1': 0.9, 'b2': 0.99, 'weight_decay': 0.001, 'mu_dtype': <class 'str'>}
  """
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(build).parameters.items()
    if isinstance(parameter.default, bool | int | float | str | tuple)
    and name not in without
  }
  return defaults | overrides


def register(
  name: str,
  build: Callable[..., optax.GradientTransformation],
  *,
  options: Mapping[str, Any] | None = None,
  **fields: Any,
) -> Method:
  """Adds a transformation to the flag.

  Call it before `add_optimizer_config`, which then adds `config.opt.<name>`.

  Args:
    name: the value of `config.optimizer` that selects it.
    build: `build(learning_rate, **options)`, where `learning_rate` is a float
      scalar; or, if `options` has a `base`, `build(base, learning_rate,
      **options)`, where `learning_rate` is a schedule.
    options: option -> default, or -> type where the default is None; by default
      those of `build`'s signature.
    **fields: further attributes of `Method`, such as `tuned` and `needs`.

  Returns:
    The new row.

  Raises:
    UsageError: the name is taken or is not an identifier, or `build` is a
      transformation.

  Example:
    >>> def half_sign(learning_rate, beta=0.9):
    ...   return optax.chain(
    ...     optax.trace(beta),
    ...     optax.scale_by_sign(),
    ...     optax.scale_by_learning_rate(learning_rate),
    ...   )
    >>> register("half_sign", half_sign, summary="sign of momentum").options
    {'beta': 0.9, 'learning_rate': <class 'float'>}
  """
  if not name.isidentifier():
    raise UsageError(f"optimizer name {name!r} must be a Python identifier")
  if name in _TABLE:
    raise UsageError(f"optimizer {name!r} is registered already; rename yours")
  if not callable(build):
    raise UsageError(
      f"optimizer {name!r} is registered as a {type(build).__name__}, not as a "
      "function that makes one; register build(learning_rate, **options), such "
      "as optax.adam"
    )
  if options is None:
    options = default_options(build)
  if fields.get("tuned", True):
    options = {k: v for k, v in options.items() if k != "learning_rate"}
    if "base" not in options:
      options["learning_rate"] = float
  _TABLE[name] = Method(name=name, build=build, options=options, **fields)
  return _TABLE[name]


def leave_out(name: str, why: str) -> None:
  """Has the flag say why it does not accept a name.

  Args:
    name: of an optimizer of optax.
    why: the reason, and what to type instead; the end of a sentence.
  """
  _LEFT_OUT[name] = why


def describe() -> str:
  """Returns the table as text: for each row a line of facts and what it is.

  Example:
    >>> describe().splitlines()[2].strip()
    'learns the learning rate of any tuned optimizer; start here'
  """
  facts = [("name", "learning rate if adamw's is 0.001", "needs", "schedule")]
  for row in _TABLE.values():
    needs = ", ".join(sorted(row.needs)) or "-"
    schedule = row.schedule or "its base's"
    facts.append((row.name, row.rate, needs, schedule))
  widths = [max(map(len, column)) for column in zip(*facts, strict=True)]
  head, *lines = (
    "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in facts
  )
  return "\n".join(
    [head]
    + [
      f"{line}\n    {row.summary}; {row.advice}\n    {row.paper}"
      for line, row in zip(lines, _TABLE.values(), strict=True)
    ]
  )


def get(name: str, field: str) -> Method:
  """Returns a row.

  Args:
    name: the row's name.
    field: the config field that names it, for the error.

  Raises:
    UsageError: there is no such row.
  """
  if name in _LEFT_OUT and name not in _TABLE:
    raise UsageError(f"{field}={name!r} is left out: {_LEFT_OUT[name]}")
  if name not in _TABLE:
    raise UsageError(
      f"{field}={name!r} is not an optimizer{did_you_mean(str(name), _TABLE)}"
    )
  return _TABLE[name]
