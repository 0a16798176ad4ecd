"""Fully connected layers, for all tasks on vectors."""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from flax_mechanic.errors import UsageError
from train.mesh import logical


class Mlp(nnx.Module):
  """ReLU layers of the given widths, then a linear one.

  Args:
    inputs: size of an example.
    widths: of the hidden layers; () is a linear model.
    outputs: width of the last layer.
    dtype: of the computation.
    rngs: stream "params".
  """

  def __init__(
    self,
    inputs: int,
    widths: Sequence[int],
    outputs: int,
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    *hidden, head = (
      nnx.Linear(
        m, n, dtype=dtype, kernel_metadata=logical("embed", "mlp"), rngs=rngs
      )
      for m, n in itertools.pairwise((inputs, *widths, outputs))
    )
    self.hidden = nnx.List(hidden)
    self.head = head

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps examples [B, ...], of `inputs` numbers each, to [B, outputs]."""
    x = x.reshape(len(x), -1)
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    return self.head(x)


def check_widths(widths: Sequence[int], at_least: int = 0) -> None:
  """Raises a UsageError for invalid or too few widths."""
  if len(widths) < at_least or not all(
    isinstance(width, int) and width > 0 for width in widths
  ):
    raise UsageError(
      f"config.model.widths={tuple(widths)} must hold the width of each hidden"
      " layer; type for example --config.model.widths='(64, 64)'"
    )
