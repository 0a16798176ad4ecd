"""The ml_collections face of the table of optimizers."""

import math
import re
from typing import Any

import optax
from ml_collections import ConfigDict, config_dict

from flax_mechanic import registry, stack
from flax_mechanic.errors import UsageError


def add_optimizer_config(
  config: ConfigDict, optimizer: str = "adamw"
) -> ConfigDict:
  """Adds the optimizer's fields to a job's config.

  The fields are `config.optimizer`, `config.opt.<name>.<option>` for every
  registered name, `config.grad_clip` (maximum global norm, 0.0 for none),
  `config.accumulate_steps` (batches an update), and regular expressions of
  parameters' paths: `config.freeze` (parameters that stay as they are) and
  `config.no_decay` (that are not decayed). Every one is settable from the
  command line: `--config.optimizer=mechanic --config.opt.mechanic.base=sgd`.

  Args:
    config: a config whose `learning_rate`, if there is one, is the one that
      optimizers tuned by hand shall read.
    optimizer: the default, the job's present optimizer.

  Returns:
    `config`.

  Raises:
    UsageError: one of the fields is there already, or `optimizer` is unknown.

  Example:
    >>> config = add_optimizer_config(ConfigDict({"learning_rate": 1e-3}))
    >>> config.opt.mechanic.base
    'adamw'
  """
  registry.get(optimizer, "optimizer")
  fields = {
    "optimizer": optimizer,
    "opt": {
      name: {option: _field(value) for option, value in row.options.items()}
      for name, row in registry.methods().items()
    },
    "grad_clip": 0.0,
    "accumulate_steps": 1,
    "freeze": (),
    "no_decay": (),
  }
  taken = [field for field in fields if field in config]
  if taken:
    raise UsageError(
      f"config.{taken[0]} is there already; rename it before calling "
      "add_optimizer_config"
    )
  with config.unlocked():
    config.update(ConfigDict(fields))
  return config


def make_optimizer(
  config: ConfigDict, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
  """Returns the optax transformation that the config names.

  Args:
    config: a config that went through `add_optimizer_config`.
    schedule: update count -> learning rate, a shape with peak 1.0; None is
      constant. Optimizers tuned by hand multiply it by `config.learning_rate`;
      learning-rate-free ones do not read that field.

  Raises:
    UsageError: an unknown name, a combination that makes no sense, or a value
      out of range.

  Example:
    >>> config = add_optimizer_config(ConfigDict(), optimizer="mechanic")
    >>> tx = make_optimizer(config, optax.cosine_decay_schedule(1.0, 100))
  """
  options = config.opt.to_dict()
  rows = stack.resolve(config.optimizer, options)
  peak = stack.peak(rows, options, config.get("learning_rate"))
  if not 0 <= peak < math.inf:
    raise UsageError(
      f"the learning rate of config.optimizer={config.optimizer!r} is {peak}; "
      "it must be a finite number of at least 0"
    )
  if not 0 <= config.grad_clip < math.inf:
    raise UsageError(
      f"config.grad_clip={config.grad_clip} must be a norm above 0, or 0 for "
      "no clipping"
    )
  for field in ("freeze", "no_decay"):
    for pattern in config[field]:
      if not isinstance(pattern, str):
        raise UsageError(
          f"config.{field}={pattern!r} must be a text; type "
          f"--config.{field}='/{pattern}/'"
        )
      try:
        re.compile(pattern)
      except re.error as error:
        raise UsageError(
          f"config.{field}={pattern!r} is not a regular expression: {error}"
        ) from None
  if config.accumulate_steps < 1:
    raise UsageError(
      f"config.accumulate_steps={config.accumulate_steps} must be at least 1"
    )
  shape = schedule or optax.constant_schedule(1.0)
  return stack.build(
    rows,
    options,
    lambda count: peak * shape(count),
    grad_clip=config.grad_clip,
    accumulate_steps=config.accumulate_steps,
    freeze=config.freeze,
    no_decay=config.no_decay,
  )


def own_schedule(config: ConfigDict) -> str:
  """Returns the name of the schedule that the config's optimizer was made for.

  A name that `make_schedule` knows; "constant" for dog, "warmup" for
  schedule_free, "warmup_cosine" for most.

  Raises:
    UsageError: as `make_optimizer`.
  """
  rows = stack.resolve(config.optimizer, config.opt.to_dict())
  return stack.schedule_name(rows)


def _field(default: Any) -> Any:
  """Makes a typed placeholder of an option whose default is None."""
  if isinstance(default, type):
    return config_dict.placeholder(default)
  return default
