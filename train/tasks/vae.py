"""A variational autoencoder of handwritten digits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from flax_mechanic.errors import UsageError
from train.tasks import losses
from train.tasks.autoencoder import Autoencoder
from train.tasks.digits import scale
from train.tasks.images import SIDE
from train.tasks.mlp import Mlp

_PIXELS = SIDE * SIDE


class VaeModel(nnx.Module):
  """ReLU layers to a normal distribution of codes, and from a code back.

  From https://arxiv.org/abs/1312.6114. A code is drawn in training; in
  evaluation it is the mean.

  Args:
    model: `config.model` of configs/autoencoder.py:vae.
    dtype: of the computation.
    rngs: streams "params" and "noise".
  """

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    widths = tuple(model.widths)
    self.encoder = Mlp(_PIXELS, widths, 2 * model.code, dtype=dtype, rngs=rngs)
    self.decoder = Mlp(
      model.code, widths[::-1], _PIXELS, dtype=dtype, rngs=rngs
    )
    self.rngs = rngs.noise.fork()
    self.deterministic = False

  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes images and decodes them.

    Args:
      images: [B, 8, 8].

    Returns:
      The reconstructions [B, 64], and for each the divergence of its codes'
      distribution from N(0, 1), KL(q || p) in nats, float32 [B].
    """
    encoded = self.encoder(images).astype(jnp.float32)
    mean, log_variance = jnp.split(encoded, 2, axis=-1)
    code = mean
    if not self.deterministic:
      noise = jax.random.normal(self.rngs(), mean.shape)
      code += jnp.exp(log_variance / 2) * noise
    divergence = jnp.exp(log_variance) + mean**2 - 1 - log_variance
    return self.decoder(code), divergence.sum(-1) / 2


class Vae(Autoencoder):
  """An autoencoder whose codes have a distribution.

  The batches are those of `Autoencoder`.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    super().__init__(config)
    if config.model.variance <= 0:
      raise UsageError(
        f"config.model.variance={config.model.variance} must be above 0; type"
        " --config.model.variance=0.02"
      )
    self.description = self.description.replace("autoencoder", "vae")

  def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a new model."""
    return VaeModel(
      self._config.model, dtype=jnp.dtype(self._config.dtype), rngs=rngs
    )

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the negative evidence lower bound, and the divergence.

    It is that of pixels of a variance of config.model.variance, without its
    constant and in units of a pixel's squared error: the mean squared error
    plus 2 * variance / 64 of the divergence.
    """
    images = scale(batch["image"])
    restored, divergence = model(images)
    error, _ = losses.squared_error(restored, images)
    mean = divergence.mean()
    weight = 2 * self._config.model.variance / _PIXELS
    return error + weight * mean, {"divergence": mean}
