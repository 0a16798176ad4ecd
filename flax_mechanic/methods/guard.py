"""The guard against bad gradients, around any method."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_mechanic.extra_args import accepted
from flax_mechanic.mechanic import sizes
from flax_mechanic.mechanic.groups import Groups
from flax_mechanic.mechanic.held import Restart, held_update
from flax_mechanic.mechanic.offset import widen
from flax_mechanic.mechanic.sums import inner_products
from flax_mechanic.placement import Shardings


class GuardState(NamedTuple):
  """State of `guard`.

  Attributes:
    inner_state: the wrapped transformation's.
    sizes: what is known about the sizes of the gradient and of its leaves.
  """

  inner_state: optax.OptState
  sizes: sizes.Sizes


def guard(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Skips the gradients that `sizes.judge` finds bad.

  The updates are then 0 and the state of `tx` stays as it is, but for
  schedules. If the first gradients turn out to have been bad, the state is put
  back to its start; where they moved the parameters to cannot be undone.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    groups = _leaf_by_leaf(params)
    return GuardState(tx.init(params), sizes.init(groups.size, jnp.float32))

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    shardings: Shardings | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GuardState]:
    if shardings is not None:
      extra_args |= accepted(tx, {"shardings": shardings})
    given = updates if params is None else params
    g = jax.tree.map(lambda g: widen(g, jnp.float32), updates)
    groups = _leaf_by_leaf(g)
    (squares,) = inner_products(
      g, g, g, jnp.float32, shardings, groups=groups, pairs=("gg",)
    )
    verdict, known = sizes.judge(state.sizes, squares)
    # Without the barrier XLA:CPU computes the scalars anew in each leaf's
    # fusion (jax 0.12).
    ok, restart = jax.lax.optimization_barrier((verdict.ok, verdict.restart))
    accept = lambda new, old: jnp.where(ok, new, old)
    moved, inner_state = held_update(
      lambda g, state, x: tx.update(g, state, x, **extra_args),
      accept,
      updates,
      state.inner_state,
      params,
      Restart(restart, tx.init(given)),
    )
    moved = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros_like(u)), moved)
    return moved, GuardState(inner_state, known)

  return optax.GradientTransformationExtraArgs(init, update)


def _leaf_by_leaf(tree: Any) -> Groups:
  return Groups.of(lambda path: path, tree)
