"""NNX variables around nothing, which no state should hold."""

from typing import Any

import jax
import optax
from flax import nnx


def without_empty_boxes(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Takes each NNX variable without an array out of the state of `tx`.

  `nnx.Optimizer` passes variables to `init` but arrays to `update` (flax 0.12).
  A state that leaves a parameter out would keep its variable around an
  `optax.MaskedNode`, and code that asks every variable for its shape would
  fail.

  Args:
    tx: the transformation.
  """

  def init(params):
    return _unbox(tx.init(params))

  def update(updates, state, params=None, **extra_args):
    if any(map(_is_box, jax.tree.leaves(params, is_leaf=_is_box))):
      # They are shown to both, and `tx` finds the boxes of its own `init`.
      boxed = jax.tree.structure(jax.eval_shape(tx.init, params))
      state = boxed.unflatten(jax.tree.leaves(state))
    updates, state = tx.update(updates, state, params, **extra_args)
    return updates, _unbox(state)

  return optax.GradientTransformationExtraArgs(init, update)


def _unbox(state: optax.OptState) -> optax.OptState:
  return jax.tree.map(
    lambda leaf: leaf if jax.tree.leaves(leaf) else optax.MaskedNode(),
    state,
    is_leaf=_is_box,
  )


def _is_box(node: Any) -> bool:
  return isinstance(node, nnx.Variable)
