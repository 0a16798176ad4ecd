"""A base optimizer whose state can be held still, or put back to its start."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import optax
from optax.schedules import InjectStatefulHyperparamsState

# The states of schedules, which follow the steps of the job.
SCHEDULES = (optax.ScaleByScheduleState, InjectStatefulHyperparamsState)


class Restart(NamedTuple):
  """When a state goes back to its start.

  Attributes:
    now: whether it does, bool scalar.
    start: the state before the first update.
  """

  now: jax.Array
  start: optax.OptState


def held_update(
  update: Callable[..., tuple[optax.Updates, optax.OptState]],
  accept: Callable[[jax.Array, jax.Array], jax.Array],
  grads: optax.Updates,
  state: optax.OptState,
  params: optax.Params | None,
  restart: Restart | None = None,
) -> tuple[optax.Updates, optax.OptState]:
  """Returns the updates and `accept(new, old)` of each leaf of the state.

  Schedules, and the learning rates that `optax.inject_hyperparams` keeps, go on
  in any case. The updates are computed from the accepted state, so they are the
  base's own only where `accept` takes the new state throughout. If the state
  were selected afterwards, XLA:TPU would split the pass in two for
  low-precision parameters and read the state again (libtpu 0.0.51 for v5e: 12.5
  copies of the parameters instead of 10.0 for bfloat16 under adamw), and
  XLA:CPU would hold the new state and the old one at once, two copies with
  adamw.

  Args:
    update: the base's.
    accept: of a new and an old leaf of the same shape.
    grads: the gradient.
    state: the base's.
    params: the parameters.
    restart: when the update is made from another state, if it may be.
  """
  closed, shapes = jax.make_jaxpr(update, return_shape=True)(
    grads, state, params
  )
  jaxpr = closed.jaxpr
  leaves, treedef = jax.tree.flatten(state)
  new_atoms = jaxpr.outvars[len(jaxpr.outvars) - len(leaves) :]
  first = len(jax.tree.leaves(grads))
  old_atoms = jaxpr.invars[first : first + len(leaves)]
  # A leaf that no update changes, such as a reference point, is as it was at
  # the start.
  fixed = [
    free or new is old
    for free, new, old in zip(
      jax.tree.leaves(_of_schedules(state)), new_atoms, old_atoms, strict=True
    )
  ]
  old_leaves = leaves
  if restart is not None:
    starts = jax.tree.leaves(restart.start)
    old_leaves = [
      old if keep else jnp.where(restart.now, _cast(new, old.dtype), old)
      for old, new, keep in zip(leaves, starts, fixed, strict=True)
    ]
  # An atom may be a constant, and one variable may stand for two leaves.
  uses = collections.Counter(map(id, new_atoms))
  old = {
    id(atom): leaf
    for atom, leaf, keep in zip(new_atoms, old_leaves, fixed, strict=True)
    if uses[id(atom)] == 1 and atom.aval == jax.typeof(leaf) and not keep
  }

  inputs = [*jax.tree.leaves(grads), *old_leaves, *jax.tree.leaves(params)]
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values |= zip(jaxpr.invars, inputs, strict=True)
  read = lambda atom: (
    atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]
  )
  kept = set()
  for equation in jaxpr.eqns:
    primitive = equation.primitive
    options = primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
      results = primitive.bind(*map(read, equation.invars), **options)
    if not primitive.multiple_results:
      results = [results]
    for var, result in zip(equation.outvars, results, strict=True):
      if id(var) in old:
        result = accept(result, old[id(var)])
        kept.add(id(var))
      values[var] = result

  updates, new_state = jax.tree.structure(shapes).unflatten(
    # A literal is no jax.Array.
    jnp.asarray(read(atom))
    for atom in jaxpr.outvars
  )
  new_leaves = [
    new if id(atom) in kept or keep else accept(new, leaf)
    for atom, new, leaf, keep in zip(
      new_atoms, jax.tree.leaves(new_state), old_leaves, fixed, strict=True
    )
  ]
  return updates, treedef.unflatten(new_leaves)


def _cast(leaf: jax.Array, dtype: Any) -> jax.Array:
  # A random key has no other dtype.
  return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def _of_schedules(state: optax.OptState) -> Any:
  """Returns a tree like `state`: whether a leaf belongs to a schedule."""

  def of_node(node: Any) -> Any:
    if not isinstance(node, SCHEDULES):
      return False
    flags = jax.tree.map(lambda _: True, node)
    if isinstance(node, InjectStatefulHyperparamsState):
      return flags._replace(inner_state=_of_schedules(node.inner_state))
    return flags

  return jax.tree.map(
    of_node, state, is_leaf=lambda node: isinstance(node, SCHEDULES)
  )
