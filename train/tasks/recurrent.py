"""A recurrent network over bytes or other tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from train.mesh import logical
from train.tasks import kinds
from train.tasks.transformer import BYTES, Embed, starts

FIELDS = ("embed_dim", "hidden_dim", "context_length")

# Name -> the cell, and zeros -> its first state.
CELLS: Mapping[str, tuple[Any, Callable[[jax.Array], Any]]] = {
  "gru": (nnx.GRUCell, lambda zeros: zeros),
  "lstm": (nnx.OptimizedLSTMCell, lambda zeros: (zeros, zeros)),
}


class Recurrent(nnx.Module):
  """A recurrent layer.

  Its cells are gated recurrent units, https://arxiv.org/abs/1406.1078, or those
  of an LSTM, https://doi.org/10.1162/neco.1997.9.8.1735.

  Args:
    model: the cell and the sizes, `config.model` of configs/text.py:gru.
    vocabulary: how many tokens there are.
    dtype: of the computation; the logits are always float32.
    rngs: stream "params".
  """

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    *,
    vocabulary: int = BYTES,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.embed = Embed(
      vocabulary,
      model.embed_dim,
      dtype=dtype,
      embedding_metadata=logical("vocab", "embed"),
      rngs=rngs,
    )
    cell, self._first = CELLS[model.name]
    self.cell = cell(
      model.embed_dim,
      model.hidden_dim,
      dtype=dtype,
      kernel_metadata=logical("embed", "mlp"),
      recurrent_kernel_metadata=logical("embed", "mlp"),
      rngs=rngs,
    )
    self.head = nnx.Linear(
      model.hidden_dim,
      vocabulary,
      dtype=dtype,
      kernel_metadata=logical("embed", "vocab"),
      rngs=rngs,
    )

  def __call__(
    self, tokens: jax.Array, documents: jax.Array | None = None
  ) -> jax.Array:
    """Returns the logits of the next token, float32 [B, T, vocabulary].

    Args:
      tokens: integers [B, T].
      documents: the number of each token's document, integers [B, T]; None if
        all are of one. Each document starts from a state of zeros.
    """
    x = self.embed(tokens).swapaxes(0, 1)
    zeros = jnp.zeros((len(tokens), self.cell.hidden_features), x.dtype)
    state = self._first(zeros)
    if documents is None:
      _, states = jax.lax.scan(self.cell, state, x)
    else:
      step = lambda state, at: self.cell(
        jax.tree.map(lambda x: jnp.where(at[0][:, None], 0, x), state), at[1]
      )
      fresh = starts(documents).swapaxes(0, 1)
      _, states = jax.lax.scan(step, state, (fresh, x))
    return self.head(states.swapaxes(0, 1)).astype(jnp.float32)


def check(model: ml_collections.ConfigDict) -> None:
  """Raises a UsageError for invalid sizes."""
  kinds.check_sizes(model, FIELDS)
