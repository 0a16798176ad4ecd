"""The tasks: the data, the model and the loss of a job."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import jax
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError, did_you_mean
from train.tasks.autoencoder import Autoencoder
from train.tasks.digits import Digits
from train.tasks.ratings import Ratings
from train.tasks.tabular import Tabular
from train.tasks.teacher import Teacher
from train.tasks.text import Text
from train.tasks.vae import Vae

Batch = Mapping[str, np.ndarray]

_TASKS = {
  "autoencoder": Autoencoder,
  "digits": Digits,
  "ratings": Ratings,
  "tabular": Tabular,
  "teacher": Teacher,
  "text": Text,
  "vae": Vae,
}
_DTYPES = ("float32", "bfloat16", "float16")


class Task(Protocol):
  """The data, the model and the loss of one job.

  A task holds no state that training changes. Batches depend only on the seed
  and the step, so a resumed run sees exactly the batches that it would have
  seen.
  """

  description: str
  """One line about the data, for the log."""

  files: Mapping[str, bytes]
  """What a run keeps of the task and must not change, by file name."""

  def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a new model in training mode; safe to call inside jit.

    It computes in config.dtype. Its parameters are float32 and name their axes
    (`mesh.logical`); the job casts and places them.
    """
    ...

  def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
    """Returns the batch of `step`, a pure function of (config.seed, step).

    Args:
      step: from 0.
      rows: which of the config.batch_size examples, along the leading axis of
        every array; all by default. Each process asks for its own.
    """
    ...

  def eval_batches(self) -> Iterable[Batch]:
    """Returns the held-out split: always the same batches, all of one shape."""
    ...

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the batch's mean loss and its metrics, float32 scalars.

    Called inside jit and under grad. The model is used as it is; the caller
    calls `model.eval()`.
    """
    ...

  def report(self, model: nnx.Module) -> str:
    """Returns a text to show at the end of a run, or ""."""
    ...


def make_task(config: ml_collections.ConfigDict) -> Task:
  """Returns the task that `config.task` names, its data loaded.

  Raises:
    UsageError: no such task or dtype, or the task cannot run as configured.
  """
  if config.task not in _TASKS:
    raise UsageError(
      f"config.task={config.task!r} is not a task"
      f"{did_you_mean(config.task, _TASKS)}"
    )
  for field in ("dtype", "param_dtype"):
    if config[field] not in _DTYPES:
      raise UsageError(
        f"config.{field}={config[field]!r} is not a dtype to train in"
        f"{did_you_mean(config[field], _DTYPES)}"
      )
  return _TASKS[config.task](config)
