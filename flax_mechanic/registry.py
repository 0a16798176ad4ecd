"""The table of optimizers: a row for each name that the flag accepts."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_mechanic.errors import UsageError, did_you_mean
from flax_mechanic.mechanic import MechanicState, mechanize

Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A row of the table.

  Attributes:
    name: what `config.optimizer` says.
    build: `build(learning_rate, **options)`, or for a row that wraps another
      `build(base, learning_rate, **options)`; returns an optax transformation.
    options: option -> its default, or its type where the default is None. The
      option `base` names the wrapped row and is what makes a row a wrapper.
    tuned: whether the learning rate is tuned by hand. A wrapper that is tuned
      leaves that to its base; one that is not learns the base's learning rate.
    summary: one line on what it is and when to take it.
    paper: where it comes from.
    scalars: state type -> what that state has learned; the key "learning_rate"
      is a factor of the effective learning rate.
  """

  name: str
  build: Callable[..., optax.GradientTransformation]
  options: Mapping[str, Any]
  tuned: bool
  summary: str
  paper: str
  scalars: Mapping[type, Callable[[Any], Scalars]]


_TABLE: dict[str, Method] = {}


def methods() -> Mapping[str, Method]:
  """Returns the table, name -> row, a live read-only view."""
  return MappingProxyType(_TABLE)


def default_options(
  build: Callable[..., Any], **overrides: Any
) -> dict[str, Any]:
  """Returns the defaults in `build`'s signature that a command line can set.

  Those are its bools, numbers, strings and tuples, except `learning_rate`.

  Args:
    build: a function that makes a transformation.
    **overrides: defaults that differ from the signature's, or the type of an
      option whose default is None.

  Example:
    >>> default_options(optax.lion, mu_dtype=str)
    {'b1': 0.9, 'b2': 0.99, 'weight_decay': 0.001, 'mu_dtype': <class 'str'>}
  """
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(build).parameters.items()
    if isinstance(parameter.default, bool | int | float | str | tuple)
  }
  defaults.pop("learning_rate", None)
  return defaults | overrides


def register(
  name: str,
  build: Callable[..., optax.GradientTransformation],
  *,
  options: Mapping[str, Any] | None = None,
  tuned: bool = True,
  summary: str = "",
  paper: str = "",
  scalars: Mapping[type, Callable[[Any], Scalars]] | None = None,
) -> Method:
  """Adds a transformation to the flag.

  Call it before `add_optimizer_config`, which then adds `config.opt.<name>`.

  Args:
    name: what `config.optimizer` shall say.
    build: `build(learning_rate, **options)`, where `learning_rate` is a float32
      scalar; or, if `options` has a `base`, `build(base, learning_rate,
      **options)`, where `learning_rate` is a schedule.
    options: option -> default, or -> type where the default is None; by default
      what `build`'s signature says.
    tuned: whether `config.learning_rate` multiplies the schedule.
    summary: one line on what it is and when to take it.
    paper: where it comes from.
    scalars: state type -> function from such a state to what it has learned.

  Returns:
    The new row.

  Raises:
    UsageError: the name is taken or is not an identifier.

  Example:
    >>> def signum(learning_rate, beta=0.9):
    ...   return optax.chain(
    ...     optax.trace(beta),
    ...     optax.scale_by_sign(),
    ...     optax.scale_by_learning_rate(learning_rate),
    ...   )
    >>> register("signum", signum, summary="sign of momentum").options
    {'beta': 0.9}
  """
  if not name.isidentifier():
    raise UsageError(f"optimizer name {name!r} must be a Python identifier")
  if name in _TABLE:
    raise UsageError(f"optimizer {name!r} is registered already; rename yours")
  options = default_options(build) if options is None else dict(options)
  row = Method(
    name=name,
    build=build,
    options=options,
    tuned=tuned,
    summary=summary,
    paper=paper,
    scalars=scalars or {},
  )
  _TABLE[name] = row
  return row


def get(name: str, field: str) -> Method:
  """Returns a row.

  Args:
    name: the row's name.
    field: the config field that says so, for the error.

  Raises:
    UsageError: there is no such row.
  """
  if name not in _TABLE:
    raise UsageError(
      f"{field}={name!r} is not an optimizer{did_you_mean(name, _TABLE)}"
    )
  return _TABLE[name]


def stack(name: str, options: Mapping[str, Mapping[str, Any]]) -> list[Method]:
  """Returns the rows that `name` names, the outermost wrapper first.

  Args:
    name: the value of `config.optimizer`.
    options: row name -> option -> value, `config.opt`.

  Raises:
    UsageError: an unknown name or option, or a combination that makes no
      sense.
  """
  rows = [get(name, "config.optimizer")]
  while "base" in rows[-1].options:
    outer = rows[-1].name
    field = f"config.opt.{outer}.base"
    row = get(options[outer]["base"], field)
    if row in rows:
      raise UsageError(f"{field}={row.name!r} wraps itself; name another base")
    if not rows[-1].tuned and not row.tuned:
      raise UsageError(
        f"{field}={row.name!r} learns its learning rate itself, and so does "
        f"{outer}; name a base that is tuned by hand, such as 'adamw'"
      )
    rows.append(row)
  for row in rows:
    for option in options[row.name].keys() - row.options.keys():
      raise UsageError(
        f"config.opt.{row.name}.{option} is not an option of {row.name}"
        + did_you_mean(option, row.options)
      )
  return rows


def reads_learning_rate(rows: list[Method]) -> bool:
  """Says whether the learning rate is left to the user."""
  return all(row.tuned for row in rows)


def build(
  rows: list[Method],
  options: Mapping[str, Mapping[str, Any]],
  learning_rate: optax.Schedule,
) -> optax.GradientTransformation:
  """Builds the transformation of a `stack`.

  Args:
    rows: the outermost wrapper first.
    options: row name -> option -> value.
    learning_rate: update count -> learning rate.
  """
  *wrappers, innermost = rows
  arguments = {
    row.name: {k: v for k, v in options[row.name].items() if k != "base"}
    for row in rows
  }
  # The injected state is where `scalars` finds the schedule's present value.
  tx = optax.inject_hyperparams(
    lambda learning_rate: innermost.build(
      learning_rate, **arguments[innermost.name]
    ),
    hyperparam_dtype=jnp.dtype(jnp.float32),
  )(learning_rate=learning_rate)
  for row in reversed(wrappers):
    tx = row.build(tx, learning_rate, **arguments[row.name])
  return tx


register(
  "mechanic",
  lambda base, learning_rate, **options: mechanize(base, **options),
  options={"base": "adamw"} | default_options(mechanize),
  tuned=False,
  summary="learns the learning rate of any tuned optimizer; start here",
  paper="Cutkosky, Defazio, Mehta 2023, arXiv 2306.00144",
  scalars={
    MechanicState: lambda state: {
      "mechanic/scale": jnp.sum(state.s),
      "learning_rate": jnp.sum(state.s),
    }
  },
)
register(
  "adamw",
  optax.adamw,
  options=default_options(optax.adamw, mu_dtype=str),
  summary="Adam with decoupled weight decay; the usual choice for transformers",
  paper="Loshchilov, Hutter 2019, arXiv 1711.05101",
)
register(
  "sgd",
  optax.sgd,
  options=default_options(optax.sgd, momentum=0.9, accumulator_dtype=str),
  summary="SGD with momentum; the usual choice for convolutional networks",
  paper="Sutskever et al. 2013, ICML",
)
register(
  "lion",
  optax.lion,
  options=default_options(optax.lion, mu_dtype=str),
  summary="sign of momentum, half of Adam's state; wants a small learning rate",
  paper="Chen et al. 2023, arXiv 2302.06675",
)
