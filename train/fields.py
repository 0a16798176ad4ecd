"""The fields that every job has: their types and ranges."""

import numbers
from typing import Any

from ml_collections import ConfigDict

from configs import default
from flax_mechanic.errors import UsageError

# Field -> the least value, and the limit below which it has to be.
_RANGES = {
  "accumulate_steps": (1, 2**31),
  "num_steps": (1, 2**31),
  "batch_size": (1, 2**31),
  "log_every": (1, 2**31),
  "eval_every": (1, 2**31),
  "checkpoint_every": (1, 2**31),
  "checkpoint_keep": (1, 2**31),
  "checkpoint_keep_every": (0, 2**31),
  "max_skipped_in_a_row": (0, 2**31),
  "seed": (0, 2**32),
}

# What a value may be where the default is of this type.
_ACCEPTED = {float: numbers.Real, int: numbers.Integral}


def check_fields(config: ConfigDict) -> None:
  """Checks a job's config against `configs.default`.

  A config file may set a field to None, an int to a bool, or delete a field;
  ml_collections lets them pass.

  Raises:
    UsageError: a field is missing, of another type, or out of range.
  """
  expected = default.get_config()
  # `make_optimizer` checks the methods' options.
  expected.opt = ConfigDict()
  if config.get("learning_rate") is None:  # If nothing is tuned.
    del expected.learning_rate
  _check_types(config, expected, "config")
  for field, (low, limit) in _RANGES.items():
    if not low <= config[field] < limit:
      raise UsageError(
        f"config.{field}={config[field]} must be at least {low}, and below "
        f"{limit}"
      )
  if config.num_steps < config.accumulate_steps:
    raise UsageError(
      f"config.num_steps={config.num_steps} must be at least "
      f"config.accumulate_steps={config.accumulate_steps}, the batches of one "
      "update"
    )


def _check_types(config: Any, expected: ConfigDict, path: str) -> None:
  for name, example in expected.items():
    field = f"{path}.{name}"
    if name not in config:
      raise UsageError(
        f"{field} is missing; start the config file from "
        "configs.default.get_config(), and leave the field there"
      )
    value = config[name]
    kind = expected.get_type(name)
    if value is None and example is None:
      continue
    if not isinstance(value, _ACCEPTED.get(kind, kind)) or (
      isinstance(value, bool) and kind is not bool
    ):
      has_example = kind is not ConfigDict and example is not None
      such = f", such as {example!r}" if has_example else ""
      raise UsageError(
        f"{field} is of type {type(value).__name__}; it must be of type "
        f"{kind.__name__}{such}"
      )
    if kind is ConfigDict:
      _check_types(value, example, field)
