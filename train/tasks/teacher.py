"""Synthetic regression: a network learns another network's noisy outputs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError
from train.tasks import losses
from train.tasks.examples import Drawn, check_noise
from train.tasks.mlp import Mlp, check_widths

_FEATURES = 16
_HIDDEN = 8
_HELD_OUT = 2048
_TEACHERS = 4


class Teacher(Drawn):
  """A number from 16 others, with new examples in every batch.

  target = tanh(x W1) W2 + config.data.noise * e, with x ~ N(0, I_16), e ~
  N(0, 1). W1 [16, 8] and W2 [8, 1] have entries of variance 1/16 and 1/8 and do
  not depend on the seed. Batches are {"features": float32 [B, 16], "target":
  float32 [B]}; 2048 examples are held out.

  With config.data.change_every there are four pairs of W1 and W2, in turn for
  so many steps each. The held-out examples are of the last pair, the one at the
  end of a run of whole turns.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    check_widths(config.model.widths)
    check_noise(config.data.noise)
    self._change_every = config.data.get("change_every", 0)
    if self._change_every < 0:
      raise UsageError(
        f"config.data.change_every={self._change_every} is a number of steps;"
        " type --config.data.change_every=100, or 0 for never"
      )
    count = _TEACHERS if self._change_every else 1
    rngs = [np.random.Generator(np.random.Philox(i)) for i in range(count)]
    self._weights = [
      (
        rng.standard_normal((_FEATURES, _HIDDEN)) / np.sqrt(_FEATURES),
        rng.standard_normal((_HIDDEN, 1)) / np.sqrt(_HIDDEN),
      )
      for rng in rngs
    ]
    self._noise = config.data.noise
    last_step = count * self._change_every - 1
    super().__init__(config, self.draw(rngs[-1], _HELD_OUT, last_step))
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

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean squared error, noise^2 of which is the noise's."""
    return losses.squared_error(model(batch["features"]), batch["target"])

  def draw(
    self, rng: np.random.Generator, count: int, step: int
  ) -> dict[str, np.ndarray]:
    """Returns examples of the pair of weights at a step."""
    turn = step // self._change_every if self._change_every else 0
    w1, w2 = self._weights[turn % len(self._weights)]
    x = rng.standard_normal((count, _FEATURES))
    clean = (np.tanh(x @ w1) @ w2)[:, 0]
    target = clean + self._noise * rng.standard_normal(count)
    return {
      "features": x.astype(np.float32),
      "target": target.astype(np.float32),
    }
