"""flax_mechanic: one flag, and a Flax job learns its learning rate."""

from flax_mechanic import table as _table  # noqa: F401  fills the registry
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
from flax_mechanic.registry import describe as describe
from flax_mechanic.registry import methods as methods
from flax_mechanic.registry import register as register
from flax_mechanic.schedule import make_schedule as make_schedule
from flax_mechanic.train_state import TrainState as TrainState

__version__ = "0.1.0"
