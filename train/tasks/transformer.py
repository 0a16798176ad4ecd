"""A decoder-only transformer over bytes or other tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from flax_mechanic.errors import UsageError, did_you_mean
from train import mesh
from train.tasks import kinds

BYTES = 256

_SIZES = ("num_layers", "num_heads", "embed_dim", "mlp_dim", "context_length")
FIELDS = (*_SIZES, "positions", "mlp", "dropout", "scan_layers", "remat")
OPTIONAL = ("lora_rank",)

# (logical axis of the inputs, of the outputs) -> layer.
Linear = Callable[..., nnx.Linear]


# The axis of layers, along which blocks are stacked, is not split.
_LAYERS = {nnx.PARTITION_NAME: None}


def _linear(
  model: ml_collections.ConfigDict,
  vocabulary: int,
  dtype: jax.typing.DTypeLike,
  rngs: nnx.Rngs,
) -> Linear:
  sizes = {
    "embed": model.embed_dim,
    "heads": model.embed_dim,
    "mlp": model.mlp_dim,
    "vocab": vocabulary,
  }
  rank = model.get("lora_rank", 0)
  layer = (
    functools.partial(nnx.LoRALinear, lora_rank=rank, lora_dtype=dtype)
    if rank
    else nnx.Linear
  )

  def linear(inputs: str, outputs: str, **options: Any) -> nnx.Linear:
    return layer(
      sizes[inputs],
      sizes[outputs],
      use_bias=False,
      dtype=dtype,
      kernel_metadata=mesh.logical(inputs, outputs),
      rngs=rngs,
      **options,
    )

  return linear


class SwiGlu(nnx.Module):
  """down(silu(gate(x)) * up(x)), from https://arxiv.org/abs/2002.05202."""

  def __init__(self, linear: Linear):
    self.gate = linear("embed", "mlp")
    self.up = linear("embed", "mlp")
    self.down = linear("mlp", "embed")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, embed_dim] to the same."""
    return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Gelu(nnx.Module):
  """down(gelu(up(x)))."""

  def __init__(self, linear: Linear):
    self.up = linear("embed", "mlp")
    self.down = linear("mlp", "embed")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, embed_dim] to the same."""
    return self.down(nnx.gelu(self.up(x)))


_MLPS = {"swiglu": SwiGlu, "gelu": Gelu}
_POSITIONS = ("rotary", "learned")


def rotate(x: jax.Array) -> jax.Array:
  """Rotary positions, https://arxiv.org/abs/2104.09864.

  Args:
    x: queries or keys [B, T, heads, D], D even.

  Returns:
    `x`, at time t the pair (i, i + D/2) turned by t * 10000^(-2i/D) radians.
  """
  _, length, _, dim = x.shape
  frequency = 10_000.0 ** -(jnp.arange(0, dim, 2) / dim)
  angle = jnp.arange(length)[:, None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x.dtype)


class Attention(nnx.Module):
  """Causal multi-head self-attention."""

  def __init__(self, num_heads: int, rotary: bool, linear: Linear):
    self.num_heads = num_heads
    self.rotary = rotary
    self.query = linear("embed", "heads")
    self.key = linear("embed", "heads")
    self.value = linear("embed", "heads")
    self.out = linear("heads", "embed")

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps [B, T, embed_dim] to the same.

    Args:
      x: the activations.
      mask: which earlier positions each one sees, bool [B, 1, T, T]; None for
        all.
    """
    heads = (*x.shape[:2], self.num_heads, -1)
    q, k, v = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
    if self.rotary:
      q, k = rotate(q), rotate(k)
    attend = functools.partial(
      jax.nn.dot_product_attention, mask=mask, is_causal=True
    )
    if q.dtype == jnp.float16:
      # Its products, which are summed in float32, are not for the CPU.
      wide = lambda *qkv: attend(*(a.astype(jnp.float32) for a in qkv))
      narrow = lambda *qkv: wide(*qkv).astype(jnp.float16)
      y = jax.lax.platform_dependent(q, k, v, cpu=narrow, default=attend)
    else:
      y = attend(q, k, v)
    return self.out(y.reshape(x.shape))


class Embed(nnx.Embed):
  """An embedding that gathers its table instead of what is looked up in it."""

  def __call__(self, index: jax.Array) -> jax.Array:
    """Maps integers of any shape to vectors, along a new last axis."""
    table = mesh.constrain(self.embedding.get_value(), None, None)
    return jnp.take(table.astype(self.dtype), index, axis=0)


class Block(nnx.Module):
  """x += attention(norm(x)), then x += mlp(norm(x)), dropout on both."""

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    linear = _linear(model, BYTES, dtype, rngs)
    norm = functools.partial(nnx.RMSNorm, dtype=dtype, rngs=rngs)
    self.attention_norm = norm(model.embed_dim)
    self.attention = Attention(
      model.num_heads, model.positions == "rotary", linear
    )
    self.mlp_norm = norm(model.embed_dim)
    self.mlp = _MLPS[model.mlp](linear)
    self.dropout = (
      nnx.Dropout(model.dropout, rngs=rngs) if model.dropout else None
    )

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps [B, T, embed_dim] to the same; see `Attention` for the mask."""
    x = x + self._drop(self.attention(self.attention_norm(x), mask))
    x = x + self._drop(self.mlp(self.mlp_norm(x)))
    return mesh.constrain(x, "batch", None, None)

  def _drop(self, x: jax.Array) -> jax.Array:
    return x if self.dropout is None else self.dropout(x)


class Transformer(nnx.Module):
  """A pre-norm decoder over bytes or other tokens.

  With model.lora_rank each linear layer also has two matrices of that rank,
  https://arxiv.org/abs/2106.09685. At first their product is 0.

  Args:
    model: the sizes, `config.model` of configs/text.py.
    vocabulary: how many tokens there are.
    dtype: of the computation; the logits are always float32.
    rngs: streams "params" and, if model.dropout > 0, "dropout".
  """

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    *,
    vocabulary: int = BYTES,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    def embed(count: int, axis: str | None) -> Embed:
      return Embed(
        count,
        model.embed_dim,
        embedding_init=nnx.initializers.normal(0.02),
        dtype=dtype,
        embedding_metadata=mesh.logical(axis, "embed"),
        rngs=rngs,
      )

    def block(rngs: nnx.Rngs) -> Block:
      return Block(model, dtype, rngs)

    self.embed = embed(vocabulary, "vocab")
    self.positions = (
      embed(model.context_length, None)
      if model.positions == "learned"
      else None
    )
    self.blocks = (
      nnx.split_rngs(splits=model.num_layers)(
        nnx.vmap(block, transform_metadata=_LAYERS)
      )(rngs)
      if model.scan_layers
      else nnx.List(block(rngs) for _ in range(model.num_layers))
    )
    self.remat = model.remat
    self.norm = nnx.RMSNorm(model.embed_dim, dtype=dtype, rngs=rngs)
    self.head = _linear(model, vocabulary, dtype, rngs)(
      "embed", "vocab", kernel_init=nnx.initializers.normal(0.02)
    )

  def __call__(
    self, tokens: jax.Array, documents: jax.Array | None = None
  ) -> jax.Array:
    """Returns the logits of the next token, float32 [B, T, vocabulary].

    Args:
      tokens: integers [B, T], T at most context_length.
      documents: the number of each token's document, integers [B, T]; a token
        sees those of its own. None if all are of one.
    """
    mask, index = None, jnp.arange(tokens.shape[1])
    if documents is not None:
      mask = documents[:, None, :, None] == documents[:, None, None, :]
      index = _since_start(documents)
    x = self.embed(tokens)
    if self.positions is not None:
      x = x + self.positions(index)
    x = mesh.constrain(x, "batch", None, None)
    run = nnx.remat(Block.__call__) if self.remat else Block.__call__
    if isinstance(self.blocks, Block):
      scan = nnx.scan(
        run,
        in_axes=(0, nnx.Carry, None),
        out_axes=nnx.Carry,
        transform_metadata=_LAYERS,
      )
      x = scan(self.blocks, x, mask)
    else:
      for block in self.blocks:
        x = run(block, x, mask)
    return self.head(self.norm(x)).astype(jnp.float32)


def starts(documents: jax.Array) -> jax.Array:
  """Returns where the document is another than before, bool [B, T]."""
  return jnp.diff(documents, axis=1, prepend=documents[:, :1]) != 0


def _since_start(documents: jax.Array) -> jax.Array:
  """Returns how far each token is from its document's first, [B, T]."""
  index = jnp.arange(documents.shape[1])
  first = jnp.where(starts(documents), index, 0)
  return index - jax.lax.cummax(first, axis=1)


def check(model: ml_collections.ConfigDict) -> None:
  """Raises a UsageError for invalid fields."""
  for field, names in (("positions", _POSITIONS), ("mlp", _MLPS)):
    if model[field] not in names:
      raise UsageError(
        f"config.model.{field}={model[field]!r} is unknown"
        f"{did_you_mean(model[field], names)}"
      )
  kinds.check_sizes(model, _SIZES)
  step = model.num_heads * (2 if model.positions == "rotary" else 1)
  if model.embed_dim % step:
    raise UsageError(
      f"config.model.embed_dim={model.embed_dim} must be a multiple of {step}:"
      f" {model.num_heads} heads"
      f"{', each of an even width' if model.positions == 'rotary' else ''}"
    )
  if "lora_rank" in model and model.lora_rank < 0:
    raise UsageError(
      f"config.model.lora_rank={model.lora_rank} must be 0, for none, or more"
    )
  if not 0 <= model.dropout < 1:
    raise UsageError(
      f"config.model.dropout={model.dropout} must be from 0 to below 1"
    )
