"""flax_mechanic: one flag, and a Flax job learns its learning rate.

Each room imports only from the rooms above it:

  errors, paths  the exception for bad input; names of leaves and parameters
  placement      where each leaf of a state is placed: `Shardings`
  extra_args     which extra arguments an update takes
  mechanic       the algorithm: `mechanize`
  methods        the flag: the table of methods and what goes around them
  checkpoints    `Checkpointer`, and other runs' checkpoints as a start
  step           one training step of any method, on pure functions
  optimizer      `Optimizer`, for NNX
  train_state    `TrainState`, for Linen

The names that need Orbax or ml_collections load when they are first used.
"""

import importlib as _importlib
import typing as _typing

from flax_mechanic.errors import UsageError as UsageError
from flax_mechanic.mechanic import MechanicState as MechanicState
from flax_mechanic.mechanic import mechanize as mechanize
from flax_mechanic.methods import table as _table  # noqa: F401  fills the registry
from flax_mechanic.methods.readers import scalars as scalars
from flax_mechanic.methods.registry import Method as Method
from flax_mechanic.methods.registry import describe as describe
from flax_mechanic.methods.registry import methods as methods
from flax_mechanic.methods.registry import register as register
from flax_mechanic.methods.schedule import make_schedule as make_schedule
from flax_mechanic.optimizer import Optimizer as Optimizer
from flax_mechanic.placement import Shardings as Shardings
from flax_mechanic.placement import state_sharding as state_sharding
from flax_mechanic.train_state import TrainState as TrainState

if _typing.TYPE_CHECKING:
  from flax_mechanic.checkpoints.adoption import Adopted as Adopted
  from flax_mechanic.checkpoints.adoption import adopt as adopt
  from flax_mechanic.checkpoints.adoption import load_params as load_params
  from flax_mechanic.checkpoints.checkpointer import (
    Checkpointer as Checkpointer,
  )
  from flax_mechanic.checkpoints.checkpointer import Restored as Restored
  from flax_mechanic.methods.config import (
    add_optimizer_config as add_optimizer_config,
  )
  from flax_mechanic.methods.config import make_optimizer as make_optimizer
  from flax_mechanic.methods.config import own_schedule as own_schedule

__all__ = [
  "Adopted",
  "Checkpointer",
  "MechanicState",
  "Method",
  "Optimizer",
  "Restored",
  "Shardings",
  "TrainState",
  "UsageError",
  "add_optimizer_config",
  "adopt",
  "describe",
  "load_params",
  "make_optimizer",
  "make_schedule",
  "mechanize",
  "methods",
  "own_schedule",
  "register",
  "scalars",
  "state_sharding",
]

__version__ = "0.1.0"

_LAZY = {
  "Adopted": "checkpoints.adoption",
  "Checkpointer": "checkpoints.checkpointer",
  "Restored": "checkpoints.checkpointer",
  "add_optimizer_config": "methods.config",
  "adopt": "checkpoints.adoption",
  "load_params": "checkpoints.adoption",
  "make_optimizer": "methods.config",
  "own_schedule": "methods.config",
}


def __getattr__(name: str) -> _typing.Any:
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  # By its full name: `flax_mechanic.methods` is the function.
  module = _importlib.import_module(f"{__name__}.{_LAZY[name]}")
  return getattr(module, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_LAZY})
