"""flax_mechanic: one flag, and a Flax job learns its learning rate.

The rooms, the lowest floor first; each imports from lower ones only:

  errors          the exception that bad input raises
  sharding        where leaves lie: `Shardings`, `state_sharding`
  inner_products  Mechanic's sums: one pass, one all-reduce
  guard           a base optimizer's update that can be held still
  mechanic        `mechanize`: the algorithm, an optax transformation
  registry        what a row of the table of optimizers says; `register`
  schedule        learning rate schedules with peak 1.0
  transforms      adapters around optax's transformations
  evaluation      the parameters to evaluate, out of a state
  mesh            optax's transformations on every mesh
  table           the table: a row for each optimizer
  stack           what wraps what, and the transformation that it builds
  config          the config's face of it: `make_optimizer`
  metrics         what was learned, out of a state: `scalars`
  checksum        checksums of arrays, however they are sharded
  record          what a checkpoint tells beside its arrays
  checkpoint      `Checkpointer`, on Orbax
  adoption        another run's checkpoint as the start: `load_params`, `adopt`
  step            one step of any method, on pure functions
  optimizer       `Optimizer`, for NNX
  train_state     `TrainState`, for Linen
"""

from flax_mechanic import table as _table  # noqa: F401  fills the registry
from flax_mechanic.adoption import Adopted as Adopted
from flax_mechanic.adoption import adopt as adopt
from flax_mechanic.adoption import load_params as load_params
from flax_mechanic.checkpoint import Checkpointer as Checkpointer
from flax_mechanic.checkpoint import Restored as Restored
from flax_mechanic.config import add_optimizer_config as add_optimizer_config
from flax_mechanic.config import make_optimizer as make_optimizer
from flax_mechanic.config import own_schedule as own_schedule
from flax_mechanic.errors import UsageError as UsageError
from flax_mechanic.mechanic import MechanicState as MechanicState
from flax_mechanic.mechanic import mechanize as mechanize
from flax_mechanic.metrics import scalars as scalars
from flax_mechanic.optimizer import Optimizer as Optimizer
from flax_mechanic.registry import Method as Method
from flax_mechanic.registry import describe as describe
from flax_mechanic.registry import methods as methods
from flax_mechanic.registry import register as register
from flax_mechanic.schedule import make_schedule as make_schedule
from flax_mechanic.sharding import Shardings as Shardings
from flax_mechanic.sharding import state_sharding as state_sharding
from flax_mechanic.train_state import TrainState as TrainState

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
