"""Synthetic regression: a network learns another network's noisy outputs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError
from train.tasks import losses
from train.tasks.mlp import Mlp, check_widths

_FEATURES = 16
_HIDDEN = 8
_HELD_OUT = 2048


class Teacher:
  """A number from 16 others, with new examples in every batch.

  target = tanh(x W1) W2 + config.data.noise * e, with x ~ N(0, I_16), e ~
  N(0, 1). W1 [16, 8] and W2 [8, 1] have entries of variance 1/16 and 1/8 and do
  not depend on the seed. Batches are {"features": float32 [B, 16], "target":
  float32 [B]}; 2048 examples are held out.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    check_widths(config.model.widths)
    if config.data.noise < 0:
      raise UsageError(
        f"config.data.noise={config.data.noise} is a standard deviation and"
        " must be 0 or more; type --config.data.noise=0.3"
      )
    self._config = config
    self.files: Mapping[str, bytes] = {}
    rng = np.random.Generator(np.random.Philox(0))
    self._w1 = rng.standard_normal((_FEATURES, _HIDDEN)) / np.sqrt(_FEATURES)
    self._w2 = rng.standard_normal((_HIDDEN, 1)) / np.sqrt(_HIDDEN)
    self._held_out = self._draw(rng, _HELD_OUT)
    self.description = (
      f"teacher: {_FEATURES} features, new examples in every batch,"
      f" {_HELD_OUT} held out"
    )

  def create_model(self, rngs: nnx.Rngs) -> Mlp:
    """Returns a new model."""
    return Mlp(
      _FEATURES,
      self._config.model.widths,
      1,
      dtype=jnp.dtype(self._config.dtype),
      rngs=rngs,
    )

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns new examples."""
    rng = np.random.Generator(np.random.Philox(key=[self._config.seed, step]))
    batch = self._draw(rng, self._config.batch_size)
    return {name: array[rows] for name, array in batch.items()}

  def eval_batches(self) -> list[dict[str, np.ndarray]]:
    """Returns one batch of all held-out examples."""
    return [self._held_out]

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean squared error, noise^2 of which is the noise's."""
    return losses.squared_error(model(batch["features"]), batch["target"])

  def report(self, model: nnx.Module) -> str:
    """Returns "": the loss says it all."""
    del model
    return ""

  def _draw(
    self, rng: np.random.Generator, count: int
  ) -> dict[str, np.ndarray]:
    x = rng.standard_normal((count, _FEATURES))
    clean = (np.tanh(x @ self._w1) @ self._w2)[:, 0]
    target = clean + self._config.data.noise * rng.standard_normal(count)
    return {
      "features": x.astype(np.float32),
      "target": target.astype(np.float32),
    }
