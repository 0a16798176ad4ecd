"""Reconstruction of handwritten digits through a narrow layer."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from train.tasks import losses
from train.tasks.digits import load_digits, scale
from train.tasks.examples import Examples
from train.tasks.images import SIDE
from train.tasks.kinds import check_sizes
from train.tasks.mlp import Mlp, check_widths


class AutoencoderModel(nnx.Module):
  """ReLU layers down to a linear code, and up again to a linear output.

  Args:
    model: `config.model` of configs/autoencoder.py.
    dtype: of the computation.
    rngs: stream "params".
  """

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    pixels, widths = SIDE * SIDE, tuple(model.widths)
    self.encoder = Mlp(pixels, widths, model.code, dtype=dtype, rngs=rngs)
    self.decoder = Mlp(model.code, widths[::-1], pixels, dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, 8, 8] to their reconstructions, [B, 64]."""
    return self.decoder(self.encoder(images))


class Autoencoder(Examples):
  """Reconstruction of 8x8 digits.

  Batches are {"image": uint8 [B, 8, 8] from 0 to 16}, split as for `Digits`.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    check_widths(config.model.widths)
    check_sizes(config.model, ["code"])
    train, held_out = load_digits("autoencoder")
    del train["label"], held_out["label"]
    super().__init__(config, train, held_out)
    self.description = (
      f"autoencoder: {len(train['image'])} images of {SIDE}x{SIDE} pixels,"
      f" {len(held_out['image'])} more held out"
    )

  def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a new model."""
    return AutoencoderModel(
      self._config.model, dtype=jnp.dtype(self._config.dtype), rngs=rngs
    )

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean squared error of a pixel, which is from 0 to 1."""
    images = scale(batch["image"])
    return losses.squared_error(model(images), images)
