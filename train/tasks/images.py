"""Classifiers of 8x8 images."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from train.mesh import logical
from train.tasks import kinds
from train.tasks.mlp import Mlp, check_widths

CLASSES = 10
SIDE = 8
_PATCH = 2
_TOKENS = (SIDE // _PATCH) ** 2


class Cnn(nnx.Module):
  """3x3 convolutions of the given widths, with stride 2 after the first.

  Args:
    widths: how many channels each has.
    batch_norm: whether each is followed by batch normalization.
    dtype: of the computation.
    rngs: stream "params".
  """

  def __init__(
    self,
    widths: Sequence[int],
    batch_norm: bool = False,
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
    self.norms = nnx.List(
      nnx.BatchNorm(width, momentum=0.9, dtype=dtype, rngs=rngs)
      for width in (widths if batch_norm else ())
    )
    side = SIDE
    for _ in widths[1:]:
      side = (side + 1) // 2
    self.head = nnx.Linear(
      side * side * widths[-1],
      CLASSES,
      dtype=dtype,
      kernel_metadata=logical("embed", "mlp"),
      rngs=rngs,
    )

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, 8, 8] to logits [B, 10]."""
    x = images[..., None]
    for layer, norm in itertools.zip_longest(self.hidden, self.norms):
      x = layer(x)
      x = nnx.relu(norm(x) if norm else x)
    return self.head(x.reshape(len(x), -1))


class VitBlock(nnx.Module):
  """x += attention(norm(x)), then x += down(gelu(up(norm(x))))."""

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    dim = model.embed_dim
    self.attention_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      model.num_heads,
      dim,
      decode=False,
      dtype=dtype,
      kernel_metadata=logical("embed", "heads", None),
      out_kernel_metadata=logical("heads", None, "embed"),
      rngs=rngs,
    )
    self.mlp_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
    self.up = nnx.Linear(
      dim,
      model.mlp_dim,
      dtype=dtype,
      kernel_metadata=logical("embed", "mlp"),
      rngs=rngs,
    )
    self.down = nnx.Linear(
      model.mlp_dim,
      dim,
      dtype=dtype,
      kernel_metadata=logical("mlp", "embed"),
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, 16, embed_dim] to the same."""
    x = x + self.attention(self.attention_norm(x))
    return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Vit(nnx.Module):
  """A pre-norm vision transformer, https://arxiv.org/abs/2010.11929.

  A token is a patch of 2x2 pixels; the mean of the last layer's tokens is
  classified.

  Args:
    model: the sizes, `config.model` of configs/digits.py:vit.
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
    self.embed = nnx.Linear(
      _PATCH * _PATCH,
      model.embed_dim,
      dtype=dtype,
      kernel_metadata=logical(None, "embed"),
      rngs=rngs,
    )
    positions = nnx.initializers.normal(0.02)(
      rngs.params(), (_TOKENS, model.embed_dim), jnp.float32
    )
    self.positions = nnx.Param(positions, **logical(None, "embed"))
    self.blocks = nnx.List(
      VitBlock(model, dtype, rngs) for _ in range(model.num_layers)
    )
    self.norm = nnx.LayerNorm(model.embed_dim, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(
      model.embed_dim,
      CLASSES,
      dtype=dtype,
      kernel_metadata=logical("embed", "mlp"),
      rngs=rngs,
    )

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, 8, 8] to logits [B, 10]."""
    side = SIDE // _PATCH
    patches = images.reshape(-1, side, _PATCH, side, _PATCH).swapaxes(2, 3)
    x = self.embed(patches.reshape(-1, _TOKENS, _PATCH * _PATCH))
    x = x + self.positions.get_value().astype(x.dtype)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x).mean(1))


_VIT_SIZES = ("num_layers", "num_heads", "embed_dim", "mlp_dim")


def _check_vit(model: ml_collections.ConfigDict) -> None:
  kinds.check_sizes(model, _VIT_SIZES)
  kinds.check_heads(model)


def _check_widths(model: ml_collections.ConfigDict) -> None:
  check_widths(model.widths, at_least=1)


KINDS = {
  "logistic": kinds.Kind(
    lambda model, **options: Mlp(SIDE * SIDE, (), CLASSES, **options),
    fields=(),
    check=lambda model: None,
    config="configs/digits.py:logistic",
  ),
  "mlp": kinds.Kind(
    lambda model, **options: Mlp(SIDE * SIDE, model.widths, CLASSES, **options),
    fields=("widths",),
    check=_check_widths,
    config="configs/digits.py",
  ),
  "cnn": kinds.Kind(
    lambda model, **options: Cnn(
      model.widths, model.get("batch_norm", False), **options
    ),
    fields=("widths",),
    check=_check_widths,
    config="configs/digits.py:cnn",
    optional=("batch_norm",),
  ),
  "vit": kinds.Kind(
    Vit,
    fields=_VIT_SIZES,
    check=_check_vit,
    config="configs/digits.py:vit",
  ),
}
