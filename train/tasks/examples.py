"""Tasks over a fixed set of examples, or over new ones in every batch."""

import abc
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError, not_installed

Arrays = Mapping[str, np.ndarray]


class _HeldOut:
  """What tasks whose held-out examples are one batch have in common."""

  def __init__(self, config: ml_collections.ConfigDict, held_out: Arrays):
    self._config = config
    self.files: Mapping[str, bytes] = {}
    self._held_out = held_out

  def eval_batches(self) -> list[Arrays]:
    """Returns one batch of all held-out examples."""
    return [self._held_out]

  def report(self, model: nnx.Module) -> str:
    """Returns "": the metrics say it all."""
    del model
    return ""


class Drawn(_HeldOut, abc.ABC):
  """The batches of a task that draws new examples for each.

  Args:
    config: of the job; `seed` and `batch_size` are read.
    held_out: arrays [N, ...] by name.
  """

  @abc.abstractmethod
  def draw(
    self, rng: np.random.Generator, count: int, step: int
  ) -> dict[str, np.ndarray]:
    """Returns `count` examples as they are at a step."""

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns new examples."""
    rng = np.random.Generator(np.random.Philox(key=[self._config.seed, step]))
    batch = self.draw(rng, self._config.batch_size, step)
    return {name: array[rows] for name, array in batch.items()}


class Examples(_HeldOut):
  """The batches of a task over a fixed set of examples.

  Args:
    config: of the job; `seed` and `batch_size` are read.
    train: arrays [N, ...] by name.
    held_out: the same for other examples.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, train: Arrays, held_out: Arrays
  ):
    super().__init__(config, held_out)
    self._train = train

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns the examples of a step, from shuffled epochs without end."""
    batch_size = self._config.batch_size
    count = len(next(iter(self._train.values())))
    number = step * batch_size + np.arange(batch_size)[rows]
    epoch, place = divmod(number, count)
    index = np.empty(len(number), np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
      rng = np.random.Generator(np.random.Philox(key=[self._config.seed, e]))
      index[epoch == e] = rng.permutation(count)[place[epoch == e]]
    return {name: array[index] for name, array in self._train.items()}


def check_noise(noise: float) -> None:
  """Raises a UsageError if config.data.noise is no standard deviation."""
  if noise < 0:
    raise UsageError(
      f"config.data.noise={noise} is a standard deviation and must be 0 or"
      " more; type --config.data.noise=0.3"
    )


def scikit_learn(task: str) -> Any:
  """Returns the module `sklearn.datasets`.

  Raises:
    UsageError: it is not installed.
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    what = f"config.task={task!r} reads its data from scikit-learn"
    raise not_installed(what, "train") from error
  return datasets


def add_label_noise(
  labels: np.ndarray, fraction: float, classes: int
) -> np.ndarray:
  """Returns labels of which a fraction is replaced by uniform random classes.

  The job's seed does not matter: a fraction always replaces the same labels by
  the same classes, and a larger one replaces those of a smaller one too.

  Args:
    labels: integers [N].
    fraction: config.data.label_noise, from 0 to 1.
    classes: the number of classes.

  Raises:
    UsageError: the fraction is out of range.
  """
  if not 0 <= fraction <= 1:
    raise UsageError(
      f"config.data.label_noise={fraction} must be from 0 to 1, a fraction of"
      " the training labels; type --config.data.label_noise=0.1"
    )
  rng = np.random.Generator(np.random.Philox(1))
  replaced = rng.permutation(len(labels))[: round(fraction * len(labels))]
  drawn = rng.integers(classes, size=len(labels))
  noisy = labels.copy()
  noisy[replaced] = drawn[replaced]
  return noisy
