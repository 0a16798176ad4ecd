"""What an optimizer has learned, read out of its state."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from optax.schedules import InjectStatefulHyperparamsState

from flax_mechanic import registry


def scalars(opt_state: Any) -> registry.Scalars:
  """Returns what the optimizer has learned, out of any nesting of states.

  Args:
    opt_state: an optax state, or the `opt_state` of an `nnx.Optimizer`.

  Returns:
    Name -> scalar: each method's own, such as "mechanic/scale", and
    "learning_rate/effective", the schedule's present value times the scales
    learned on top of it.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from flax_mechanic import mechanize
    >>> state = mechanize(optax.sgd(1.0)).init({"w": jnp.ones(2)})
    >>> sorted(scalars(state))
    ['learning_rate/effective', 'mechanic/scale', 'mechanic/skipped']
  """
  readers: dict[type, Callable[[Any], registry.Scalars]] = {
    InjectStatefulHyperparamsState: _injected_learning_rate
  }
  for row in registry.methods().values():
    readers |= dict(row.scalars)
  found: registry.Scalars = {}
  factors = []
  for state in _states(nnx.as_pure(opt_state), tuple(readers)):
    values = readers[type(state)](state)
    if "learning_rate" in values:
      factors.append(values.pop("learning_rate"))
    found |= values
  if factors:
    found["learning_rate/effective"] = functools.reduce(operator.mul, factors)
  return found


def _injected_learning_rate(
  state: InjectStatefulHyperparamsState,
) -> registry.Scalars:
  injected = state.hyperparams
  return {
    name: jnp.asarray(injected[name])
    for name in ("learning_rate",)
    if name in injected
  }


def _states(tree: Any, types: tuple[type, ...]) -> Iterator[Any]:
  """Yields every state of the given types, the outermost first."""
  for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, types)):
    if isinstance(node, types):
      yield node
      yield from _states(tuple(node), types)
