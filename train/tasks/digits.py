"""Handwritten digits: 1797 images that come with scikit-learn, 8x8 pixels."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from flax_mechanic.errors import UsageError, did_you_mean
from train.mesh import logical

_CLASSES = 10
_SIDE = 8
_MAX_PIXEL = 16
_HELD_OUT_PER_CLASS = 36  # 360 of 1797 images; 360 divides by 8 devices.


class Mlp(nnx.Module):
  """Fully connected ReLU layers of the given widths."""

  def __init__(
    self,
    widths: Sequence[int],
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    sizes = (_SIDE * _SIDE, *widths, _CLASSES)
    *hidden, head = (
      nnx.Linear(
        m, n, dtype=dtype, kernel_metadata=logical("embed", "mlp"), rngs=rngs
      )
      for m, n in itertools.pairwise(sizes)
    )
    self.hidden = nnx.List(hidden)
    self.head = head

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, 8, 8] to logits [B, 10]."""
    x = images.reshape(len(images), -1)
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    return self.head(x)


class Cnn(nnx.Module):
  """3x3 convolutions of the given widths, all but the first of stride 2."""

  def __init__(
    self,
    widths: Sequence[int],
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.hidden = nnx.List(
      nnx.Conv(
        m,
        n,
        kernel_size=(3, 3),
        strides=1 if i == 0 else 2,
        dtype=dtype,
        kernel_metadata=logical(None, None, "embed", "mlp"),
        rngs=rngs,
      )
      for i, (m, n) in enumerate(itertools.pairwise((1, *widths)))
    )
    side = _SIDE
    for _ in widths[1:]:
      side = (side + 1) // 2
    self.head = nnx.Linear(
      side * side * widths[-1],
      _CLASSES,
      dtype=dtype,
      kernel_metadata=logical("embed", "mlp"),
      rngs=rngs,
    )

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, 8, 8] to logits [B, 10]."""
    x = images[..., None]
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    return self.head(x.reshape(len(x), -1))


_MODELS = {"mlp": Mlp, "cnn": Cnn}


class Digits:
  """Classification of 8x8 digits.

  Batches are {"image": uint8 [B, 8, 8] from 0 to 16, "label": uint8 [B]}. The
  held-out split is 36 images of each digit, whatever the seed.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    try:
      from sklearn import datasets
    except ImportError as e:
      raise UsageError(
        "config.task='digits' reads its images from scikit-learn, which is not"
        ' installed; type pip install "flax_mechanic[train]"'
      ) from e
    if config.model.name not in _MODELS:
      raise UsageError(
        f"config.model.name={config.model.name!r} is not a model for digits"
        f"{did_you_mean(config.model.name, _MODELS)}"
      )
    if not config.model.widths or min(config.model.widths) < 1:
      raise UsageError(
        f"config.model.widths={tuple(config.model.widths)} is not a width for"
        " each hidden layer; type for example --config.model.widths='(64, 64)'"
      )
    self._config = config
    pixels, classes = datasets.load_digits(return_X_y=True)
    images = np.asarray(pixels, np.uint8).reshape(-1, _SIDE, _SIDE)
    labels = np.asarray(classes, np.uint8)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    by_class = [order[labels[order] == c] for c in range(_CLASSES)]
    held_out = np.concatenate([i[:_HELD_OUT_PER_CLASS] for i in by_class])
    train = np.concatenate([i[_HELD_OUT_PER_CLASS:] for i in by_class])
    self._held_out = {"image": images[held_out], "label": labels[held_out]}
    self._train = {"image": images[train], "label": labels[train]}
    self.description = (
      f"digits: {len(train)} images of {_SIDE}x{_SIDE} pixels,"
      f" {len(held_out)} more held out, {_CLASSES} classes"
    )

  def create_model(self, rngs: nnx.Rngs) -> Mlp | Cnn:
    """Returns a new model."""
    return _MODELS[self._config.model.name](
      self._config.model.widths,
      dtype=jnp.dtype(self._config.dtype),
      rngs=rngs,
    )

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns the next images of an endless run of shuffled epochs."""
    batch_size, count = self._config.batch_size, len(self._train["label"])
    number = step * batch_size + np.arange(batch_size)[rows]
    epoch, place = divmod(number, count)
    index = np.empty(len(number), np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
      rng = np.random.Generator(np.random.Philox(key=[self._config.seed, e]))
      index[epoch == e] = rng.permutation(count)[place[epoch == e]]
    return {name: array[index] for name, array in self._train.items()}

  def eval_batches(self) -> list[dict[str, np.ndarray]]:
    """Returns one batch, all 360 held-out images."""
    return [self._held_out]

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean cross-entropy in nats, and the accuracy."""
    images = batch["image"].astype(jnp.float32) / _MAX_PIXEL
    labels = batch["label"].astype(jnp.int32)
    logits = model(images).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    accuracy = jnp.mean(logits.argmax(-1) == labels, dtype=jnp.float32)
    return losses.mean(), {"accuracy": accuracy}

  def report(self, model: nnx.Module) -> str:
    """Returns "": accuracy says it all."""
    del model
    return ""
