"""Tables of measurements in scikit-learn."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError, did_you_mean
from train.tasks import losses
from train.tasks.examples import Examples, add_label_noise, scikit_learn
from train.tasks.mlp import Mlp, check_widths


class Table(NamedTuple):
  """A table that `config.data.name` may name.

  Attributes:
    loader: the function of `sklearn.datasets`.
    classes: of the target; 0 where the target is a number.
  """

  loader: str
  classes: int


_TABLES = {
  "breast_cancer": Table("load_breast_cancer", classes=2),
  "diabetes": Table("load_diabetes", classes=0),
  "iris": Table("load_iris", classes=3),
  "wine": Table("load_wine", classes=3),
}


class Tabular(Examples):
  """A class, or a number, from a row of measurements.

  Batches are {"features": float32 [B, F], "target": uint8 or float32 [B]}. A
  fifth of the rows is held out, whatever the seed. Features, and targets that
  are numbers, have mean 0 and standard deviation 1 in the training rows.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    name, noise = config.data.name, config.data.label_noise
    if name not in _TABLES:
      raise UsageError(
        f"config.data.name={name!r} is not a table{did_you_mean(name, _TABLES)}"
      )
    self._classes = _TABLES[name].classes
    if noise and not self._classes:
      raise UsageError(
        f"config.data.label_noise={noise} is for classes, and the target of"
        f" {name} is a number; type --config.data.label_noise=0.0"
      )
    check_widths(config.model.widths)
    load = getattr(scikit_learn("tabular"), _TABLES[name].loader)
    features, target = load(return_X_y=True)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(target))
    count = len(target) // 40 * 8  # A fifth, as a multiple of 8 devices.
    held_out, train = np.split(order, [count])
    features = _standardize(features, train)
    if self._classes:
      target = target.astype(np.uint8)
      target[train] = add_label_noise(target[train], noise, self._classes)
    else:
      target = _standardize(target, train)
    super().__init__(
      config,
      {"features": features[train], "target": target[train]},
      {"features": features[held_out], "target": target[held_out]},
    )
    self.description = (
      f"{name}: {len(train)} rows of {features.shape[1]} features,"
      f" {len(held_out)} more held out"
    )

  def create_model(self, rngs: nnx.Rngs) -> Mlp:
    """Returns a new model; its outputs are logits or the number."""
    return Mlp(
      self._train["features"].shape[1],
      self._config.model.widths,
      max(self._classes, 1),
      dtype=jnp.dtype(self._config.dtype),
      rngs=rngs,
    )

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean cross-entropy and the accuracy, or the squared error."""
    loss = losses.cross_entropy if self._classes else losses.squared_error
    return loss(model(batch["features"]), batch["target"])


def _standardize(values: np.ndarray, train: np.ndarray) -> np.ndarray:
  """Returns values with mean 0 and deviation 1 in `train`, float32 [N, ...].

  Args:
    values: [N, ...].
    train: indices of the rows that mean and deviation are taken over.
  """
  mean, deviation = values[train].mean(0), values[train].std(0)
  return ((values - mean) / deviation).astype(np.float32)
