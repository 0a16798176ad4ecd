"""Handwritten digits: the 1797 images of 8x8 pixels in scikit-learn."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError
from train.tasks import losses
from train.tasks.examples import Examples, add_label_noise, scikit_learn
from train.tasks.images import CLASSES, KINDS, SIDE
from train.tasks.kinds import find_kind

_MAX_PIXEL = 16
_HELD_OUT_PER_CLASS = 36  # 360 of 1797 images, a multiple of 8 devices.


def load_digits(
  task: str,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the training and the held-out images, always the same.

  Args:
    task: the task that asks, for the error.

  Returns:
    {"image": uint8 [N, 8, 8] from 0 to 16, "label": uint8 [N]} with N = 1437,
    and the same with N = 360, 36 images of each digit.

  Raises:
    UsageError: scikit-learn is not installed.
  """
  pixels, classes = scikit_learn(task).load_digits(return_X_y=True)
  images = np.asarray(pixels, np.uint8).reshape(-1, SIDE, SIDE)
  labels = np.asarray(classes, np.uint8)
  order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
  by_class = [order[labels[order] == c] for c in range(CLASSES)]
  held_out = np.concatenate([i[:_HELD_OUT_PER_CLASS] for i in by_class])
  train = np.concatenate([i[_HELD_OUT_PER_CLASS:] for i in by_class])
  return (
    {"image": images[train], "label": labels[train]},
    {"image": images[held_out], "label": labels[held_out]},
  )


def scale(images: jax.Array) -> jax.Array:
  """Returns images, integers from 0 to 16, as float32 from 0 to 1."""
  return images.astype(jnp.float32) / _MAX_PIXEL


class Digits(Examples):
  """Classification of 8x8 digits.

  Batches are {"image": uint8 [B, 8, 8] from 0 to 16, "label": uint8 [B]}. The
  held-out split is 36 images of each digit, whatever the seed. Training images
  are moved by up to config.data.shift pixels along both axes, 0 by default.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    train, held_out = load_digits("digits")
    self._kind = find_kind(config.model, KINDS, "digits")
    train["label"] = add_label_noise(
      train["label"], config.data.label_noise, CLASSES
    )
    self._shift = config.data.get("shift", 0)
    if not 0 <= self._shift < SIDE:
      raise UsageError(
        f"config.data.shift={self._shift} must be from 0 to {SIDE - 1} pixels;"
        " type --config.data.shift=1"
      )
    super().__init__(config, train, held_out)
    self.description = (
      f"digits: {len(train['label'])} images of {SIDE}x{SIDE} pixels,"
      f" {len(held_out['label'])} more held out, {CLASSES} classes"
    )

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns the examples of a step, moved at random."""
    batch = super().train_batch(step, rows)
    if self._shift:
      # Other numbers than those that shuffle an epoch.
      bits = np.random.Philox(key=[self._config.seed, step]).jumped()
      by = np.random.Generator(bits).integers(
        -self._shift, self._shift + 1, size=(self._config.batch_size, 2)
      )
      batch["image"] = _moved(batch["image"], by[rows])
    return batch

  def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a new model."""
    return self._kind.create(
      self._config.model, dtype=jnp.dtype(self._config.dtype), rngs=rngs
    )

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean cross-entropy in nats, and the accuracy."""
    return losses.cross_entropy(model(scale(batch["image"])), batch["label"])


def _moved(images: np.ndarray, by: np.ndarray) -> np.ndarray:
  """Returns images that are moved down and to the right; zeros follow.

  Args:
    images: [N, 8, 8].
    by: pixels, integers [N, 2] from -7 to 7.
  """
  padded = np.pad(images, ((0, 0), (SIDE, SIDE), (SIDE, SIDE)))
  crops = np.lib.stride_tricks.sliding_window_view(
    padded, (SIDE, SIDE), axis=(1, 2)
  )
  return crops[np.arange(len(images)), SIDE - by[:, 0], SIDE - by[:, 1]]
