"""A recurrent network over bytes."""

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from train.mesh import logical
from train.tasks import kinds
from train.tasks.transformer import BYTES, Embed

FIELDS = ("embed_dim", "hidden_dim", "context_length")


class Gru(nnx.Module):
  """A layer of gated recurrent units, https://arxiv.org/abs/1406.1078.

  Args:
    model: the sizes, `config.model` of configs/text.py:gru.
    dtype: of the computation; the logits are always float32.
    rngs: stream "params".
  """

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.embed = Embed(
      BYTES,
      model.embed_dim,
      dtype=dtype,
      embedding_metadata=logical("vocab", "embed"),
      rngs=rngs,
    )
    self.cell = nnx.GRUCell(
      model.embed_dim,
      model.hidden_dim,
      dtype=dtype,
      kernel_metadata=logical("embed", "mlp"),
      recurrent_kernel_metadata=logical("embed", "mlp"),
      rngs=rngs,
    )
    self.head = nnx.Linear(
      model.hidden_dim,
      BYTES,
      dtype=dtype,
      kernel_metadata=logical("embed", "vocab"),
      rngs=rngs,
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps bytes, integers [B, T], to logits of the next, float32 [B, T, 256].

    Each example starts from a state of zeros.
    """
    x = self.embed(tokens).swapaxes(0, 1)
    state = jnp.zeros((len(tokens), self.cell.hidden_features), x.dtype)
    _, states = jax.lax.scan(self.cell, state, x)
    return self.head(states.swapaxes(0, 1)).astype(jnp.float32)


def check(model: ml_collections.ConfigDict) -> None:
  """Raises a UsageError for invalid sizes."""
  kinds.check_sizes(model, FIELDS)
