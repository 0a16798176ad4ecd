"""The table of optimizers as fields of a job's config."""

import dataclasses
import inspect
import math
import numbers
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax
from ml_collections import ConfigDict, config_dict

from flax_mechanic.errors import UsageError, did_you_mean
from flax_mechanic.methods import registry, stack

# The fields that hold for every optimizer, and their defaults.
_DEFAULTS = {
  "grad_clip": 0.0,
  "accumulate_steps": 1,
  "guard": bool,
  "freeze": (),
  "no_decay": (),
}

# The new names of old flags that are no option of a method.
_FOR_ALL = ("learning_rate", *_DEFAULTS)

# What a value may be where the default is of this type.
_ACCEPTED = {
  float: numbers.Real,
  int: numbers.Integral,
  tuple: (tuple, list),
}


def add_optimizer_config(
  config: ConfigDict,
  optimizer: str | None = None,
  *,
  old_flags: Sequence[str] | Mapping[str, str] = (),
) -> ConfigDict:
  """Adds the optimizer's fields to a job's config; the job's own fields stay.

  The fields are `config.optimizer`, `config.opt.<name>.<option>` for every
  registered name, `config.grad_clip` (maximum global norm, 0.0 for none),
  `config.accumulate_steps` (batches per update), `config.guard` (whether bad
  gradients are skipped: NaN, Inf, spikes; see `make_optimizer`), and regular
  expressions for parameters' paths: `config.freeze` (frozen parameters) and
  `config.no_decay` (parameters without weight decay). The command line can set
  each of them: `--config.optimizer=mechanic --config.opt.mechanic.base=sgd`.

  Args:
    config: a config. Optimizers that are tuned by hand read its
      `learning_rate`, if it has one.
    optimizer: the job's own, which is the default of `config.optimizer`; by
      default that field if the job has it, else "adamw". If it is named, it is
      the default base of the wrappers that are tuned by hand and can have it
      (schedule_free, sam), since they use its learning rate.
    old_flags: the job's fields that keep their effect, such as
      `["weight_decay", "b2"]`, or old name -> new name, such as `{"lr":
      "learning_rate", "wd": "weight_decay"}`. A new name is `learning_rate`,
      `grad_clip` or another field for all methods, or an option. An option is
      set for every optimizer that is tuned by hand and wraps no other; so
      Mechanic's `weight_decay`, which means something else, is not. A new field
      follows its old flag on the command line too, unless it is set there.
      Warm-up belongs to `make_optimizer`'s schedule.

  Returns:
    `config`.

  Raises:
    UsageError: `config` is of another kind, a field exists already, `optimizer`
      is unknown, or an old flag is missing or has no meaning.

  Example:
    >>> config = ConfigDict({"learning_rate": 1e-3, "weight_decay": 0.1})
    >>> config = add_optimizer_config(config, old_flags=["weight_decay"])
    >>> config.opt.mechanic.base, config.opt.adamw.weight_decay
    ('adamw', 0.1)
  """
  if not isinstance(config, ConfigDict):
    raise UsageError(
      f"add_optimizer_config takes an ml_collections.ConfigDict, not a "
      f"{type(config).__name__}; make one of it, as in ConfigDict(config), or "
      "pass a config of another kind to make_optimizer as it is"
    )
  present = config.get("optimizer")
  if not isinstance(present, str | None):
    raise UsageError(
      f"config.optimizer is there already, a {type(present).__name__}, where "
      "the name of an optimizer goes; rename it before calling "
      "add_optimizer_config"
    )
  own = optimizer or present
  optimizer = own or "adamw"
  registry.get(optimizer, "config.optimizer")
  fields: dict[str, Any] = {
    "opt": {
      name: {
        option: _field(value)
        for option, value in stack.defaults(row, own).items()
      }
      for name, row in registry.methods().items()
    },
    **{field: _field(value) for field, value in _DEFAULTS.items()},
  }
  for old, new in _renaming(old_flags).items():
    _check_old_flag(old, old in config, new, config)
    if new not in _FOR_ALL:
      for row in _rows_with(new):
        fields["opt"][row.name][new] = config.get_oneway_ref(old)
    elif new == old:
      fields.pop(new, None)
    else:
      fields[new] = config.get_oneway_ref(old)
  for field in fields:
    if field in config:
      meant = f', or say old_flags=["{field}"] if it is what is meant'
      raise UsageError(
        f"config.{field} is there already; rename it before calling "
        f"add_optimizer_config{'' if field == 'opt' else meant}"
      )
  with config.unlocked():
    config.update(ConfigDict({"optimizer": optimizer, **fields}))
  return config


def make_optimizer(
  config: Any,
  schedule: optax.Schedule | None = None,
  *,
  peak: float | None = None,
  old_flags: Sequence[str] | Mapping[str, str] = (),
) -> optax.GradientTransformation:
  """Returns the optax transformation that the config names.

  Args:
    config: a config that went through `add_optimizer_config`; or a dict or any
      object, such as a dataclass, with a field `optimizer`. Its other fields
      are optional: `learning_rate`, `grad_clip`, `accumulate_steps`, `guard`,
      `freeze`, `no_decay`, and `opt`, a dict or a dataclass, name -> option ->
      value. `opt.<name>.learning_rate` takes the place of `learning_rate` for
      that optimizer. A field that is missing or None has its default. The
      default of a dataclass's field `optimizer` is the job's own, as in
      `add_optimizer_config`.
    schedule: update count -> learning rate; None is constant. Without `peak`
      its peak is 1.0: optimizers tuned by hand use `config.learning_rate` times
      the schedule, and learning-rate-free ones, which do not read that field,
      the schedule. The present rate can be read in the state, and without a
      schedule also set: `optax.tree.set(state, learning_rate=...)`.
    peak: the largest value of a schedule that the job made for its old
      optimizer. Optimizers tuned by hand then use `schedule` as it is, unless
      `config.opt.<name>.learning_rate` is set, and do not read
      `config.learning_rate`, and bad gradients are not skipped unless
      `config.guard` is True: an unflipped run is the job's own, bit for bit.
      Learning-rate-free ones use `schedule / peak`.
    old_flags: as for `add_optimizer_config`, for a config that did not go
      through it. An option that `config.opt` sets to another value than its
      default has that value.

  Returns:
    A transformation, to be used like any of optax's.

  Raises:
    UsageError: an unknown name, rows that do not go together, a value out of
      range, or an old flag that is missing or has no meaning.

  Example:
    >>> config = add_optimizer_config(ConfigDict(), optimizer="mechanic")
    >>> tx = make_optimizer(config, optax.cosine_decay_schedule(1.0, 100))

    >>> @dataclasses.dataclass(slots=True)
    ... class Config:
    ...   optimizer: str = "mechanic"
    >>> tx = make_optimizer(Config(), optax.cosine_decay_schedule(1.0, 100))
  """
  config, renaming = _readable(config), _renaming(old_flags)
  for old, new in renaming.items():
    present = getattr(config, old, None) is not None
    _check_old_flag(old, present, new, _names(config))
  rows, options = _stack(config, renaming)
  former = {new: old for old, new in renaming.items() if new in _FOR_ALL}
  read = lambda field, default: _read(config, former.get(field, field), default)
  learning_rate = _learning_rate(
    rows, options, read("learning_rate", float), schedule, peak
  )
  fields = {field: read(field, default) for field, default in _DEFAULTS.items()}
  _check_fields(fields)
  if fields["guard"] is None:
    is_own = peak is not None and all(row.tuned for row in rows)
    fields["guard"] = not is_own
  return stack.build(rows, options, learning_rate, **fields)


def _learning_rate(
  rows: Sequence[registry.Method],
  options: stack.Options,
  given: float | None,
  schedule: optax.Schedule | None,
  peak: float | None,
) -> float | optax.Schedule:
  """Returns a stack's learning rate; the arguments are `make_optimizer`'s.

  Args:
    rows: of the stack.
    options: of all rows.
    given: `config.learning_rate`.
    schedule: the job's, or None.
    peak: the schedule's, or None.
  """
  if schedule is not None and not callable(schedule):
    raise UsageError(
      f"schedule={schedule!r} must be a function of the update count, such as "
      "optax.constant_schedule(1.0); a constant learning rate goes into "
      "config.learning_rate, without a schedule"
    )
  if peak is not None and not _is_positive(peak):
    raise UsageError(
      f"peak={peak!r} must be the largest value of the schedule, a finite "
      "number above 0"
    )
  untouched = peak is not None and all(row.tuned for row in rows)
  own = stack.own_rate(rows, options)
  if schedule is not None and untouched and own is None:
    return schedule
  rate = stack.peak(rows, options, given)
  if not 0 <= rate < math.inf:
    raise UsageError(
      f"the learning rate of config.optimizer={rows[0].name!r} is {rate}; "
      "it must be a finite number of at least 0"
    )
  if schedule is None:
    return float(rate)
  if peak is None:
    return lambda count: rate * schedule(count)
  return lambda count: rate * (schedule(count) / peak)


def _is_positive(number: Any) -> bool:
  """Whether something is a finite number above 0."""
  try:
    return bool(0 < number < math.inf)
  except (TypeError, ValueError):  # A text, or an array of several numbers.
    return False


def _check_fields(fields: Mapping[str, Any]) -> None:
  """Raises where a field that holds for every optimizer is out of range."""
  if not 0 <= fields["grad_clip"] < math.inf:
    raise UsageError(
      f"config.grad_clip={fields['grad_clip']} must be a norm above 0, or 0 "
      "for no clipping"
    )
  for field in ("freeze", "no_decay"):
    for pattern in fields[field]:
      if not isinstance(pattern, str):
        raise UsageError(
          f"config.{field}={pattern!r} must be a text; type "
          f"--config.{field}='/{pattern}/'"
        )
      if not pattern:
        raise UsageError(
          f"config.{field}='' is found in every parameter's path; leave it "
          f"out, or type --config.{field}='.*' to mean them all"
        )
      try:
        re.compile(pattern)
      except re.error as error:
        raise UsageError(
          f"config.{field}={pattern!r} is not a regular expression: {error}"
        ) from None
  if fields["accumulate_steps"] < 1:
    raise UsageError(
      f"config.accumulate_steps={fields['accumulate_steps']} must be at least 1"
    )


def own_schedule(config: Any) -> str:
  """Returns the name of the schedule that the config's optimizer is meant for.

  The name is one for `make_schedule`: "constant" for dog, "warmup" for
  schedule_free, "warmup_cosine" for most.

  Args:
    config: as for `make_optimizer`.

  Raises:
    UsageError: as `make_optimizer`.

  Example:
    >>> own_schedule(add_optimizer_config(ConfigDict(), "dog"))
    'constant'
  """
  rows, _ = _stack(_readable(config), {})
  return stack.schedule_name(rows)


def _readable(config: Any) -> Any:
  """Returns a config whose fields are attributes."""
  if isinstance(config, Mapping) and not isinstance(config, ConfigDict):
    return types.SimpleNamespace(**config)
  return config


def _renaming(
  old_flags: Sequence[str] | Mapping[str, str],
) -> Mapping[str, str]:
  """Returns old name -> new name."""
  if isinstance(old_flags, Mapping):
    return old_flags
  return {name: name for name in old_flags}


def _rows_with(option: str) -> Sequence[registry.Method]:
  """Returns the rows whose option an old flag of that name sets."""
  return [
    row
    for row in registry.methods().values()
    if row.tuned and not row.wraps and option in row.options
  ]


def _check_old_flag(
  old: str, present: bool, new: str, names: Iterable[str]
) -> None:
  """Raises where an old flag is missing or has no meaning.

  Args:
    old: its name.
    present: whether the config has it.
    new: what it is called here.
    names: of the config's fields.
  """
  if not present:
    raise UsageError(
      f"old_flags names {old!r}, which config does not have"
      + did_you_mean(old, names)
    )
  if new not in _FOR_ALL and not _rows_with(new):
    raise UsageError(
      f"old_flags has {new!r}, which no optimizer tuned by hand has as an "
      "option; leave it out, or put it into the schedule for make_optimizer"
    )


def _names(config: Any) -> Iterable[str]:
  """Returns the names of a config's fields, as far as it tells them."""
  if dataclasses.is_dataclass(config):
    return [field.name for field in dataclasses.fields(config)]
  if isinstance(config, ConfigDict):
    return config
  return getattr(config, "__dict__", ())


def _field(default: Any) -> Any:
  """Returns a typed placeholder for an option whose default is None."""
  if isinstance(default, type):
    return config_dict.placeholder(default)
  return default


def _stack(
  config: Any, old_flags: Mapping[str, str]
) -> tuple[list[registry.Method], stack.Options]:
  """Returns the rows that a config names, and every row's options.

  Args:
    config: as for `make_optimizer`.
    old_flags: old name -> new name, checked.
  """
  name = _read(config, "optimizer", str)
  if name is None:
    raise UsageError(
      "config.optimizer is missing; call add_optimizer_config(config), or give "
      'a config of another kind the field optimizer: str = "adamw"'
    )
  methods = registry.methods()
  given = _as_dict(getattr(config, "opt", None), "config.opt")
  for row in given:
    if row not in methods:
      raise UsageError(
        f"config.opt.{row} is not an optimizer{did_you_mean(row, methods)}"
      )
  own = _own_optimizer(config)
  options = {row.name: _options(row, given, own) for row in methods.values()}
  for old, new in old_flags.items():
    for row in () if new in _FOR_ALL else _rows_with(new):
      default = row.options[new]
      if options[row.name][new] == _default(default):
        options[row.name][new] = _read(config, old, default)
  return stack.resolve(name, options), options


def _own_optimizer(config: Any) -> str | None:
  """Returns the default of a dataclass's field `optimizer`, if it has one."""
  if not dataclasses.is_dataclass(config):
    return None
  defaults = {field.name: field.default for field in dataclasses.fields(config)}
  own = defaults.get("optimizer")
  return own if isinstance(own, str) else None


def _options(
  row: registry.Method, given: Mapping[str, Any], own: str | None
) -> dict[str, Any]:
  """Returns a row's options: what `config.opt` gives, over the defaults."""
  group = f"config.opt.{row.name}"
  values = _as_dict(given.get(row.name), group)
  for option in values:
    if option not in row.options:
      raise UsageError(
        f"{group}.{option} is not an option of {row.name}"
        + did_you_mean(option, row.options)
      )
  # To some, such as sgd's momentum, None is a value of its own.
  off = {
    name
    for name, parameter in inspect.signature(row.build).parameters.items()
    if parameter.default is None
  }
  options = {}
  for option, default in stack.defaults(row, own).items():
    value = values.get(option)
    if value is None and not (option in values and option in off):
      options[option] = _default(default)
      continue
    field = f"{group}.{option}"
    options[option] = _checked(value, default, field)
    choices = row.choices.get(option)
    if choices and value is not None and value not in choices:
      raise UsageError(
        f"{field}={value!r} is not one of {', '.join(map(repr, choices))}"
      )
  return options


def _as_dict(group: Any, field: str) -> dict[str, Any]:
  """Returns a group of fields, a dict or a dataclass, as name -> value."""
  if group is None:
    return {}
  if dataclasses.is_dataclass(group):
    names = (each.name for each in dataclasses.fields(group))
    return {name: getattr(group, name) for name in names}
  if isinstance(group, Mapping | ConfigDict):
    return {name: group[name] for name in group}
  raise UsageError(
    f"{field}={group!r} must be a group of fields: a dict or a dataclass"
  )


def _read(config: Any, field: str, default: Any) -> Any:
  """Returns a field of the config, or its default if it is missing or None."""
  value = getattr(config, field, None)
  if value is None:
    return _default(default)
  return _checked(value, default, f"config.{field}")


def _default(default: Any) -> Any:
  """Returns a default; a type stands for None."""
  return None if isinstance(default, type) else default


def _checked(value: Any, default: Any, field: str) -> Any:
  """Returns a value that is None or of the type of the field's default.

  A number is finite, unless it is the default.
  """
  kind = default if isinstance(default, type) else type(default)
  if isinstance(value, float) and not math.isfinite(value) and value != default:
    raise UsageError(f"{field}={value} must be a finite number")
  if value is None or default is None:
    return value
  if isinstance(value, _ACCEPTED.get(kind, kind)):
    return value
  raise UsageError(
    f"{field}={value!r} is of type {type(value).__name__}; it must be of type "
    f"{kind.__name__}"
  )
