"""What optimizers' states tell: scalars, and parameters to evaluate."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib
from optax.schedules import InjectStatefulHyperparamsState

from flax_mechanic.methods import registry


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


def eval_params(opt_state: Any, params: optax.Params) -> optax.Params:
  """Returns the parameters to evaluate, for any nesting of states.

  Args:
    opt_state: an optax state without NNX variables.
    params: the parameters being trained, as the transformation sees them.

  Returns:
    A tree like `params`; `params` itself where a method evaluates those.

  Example:
    >>> tx = optax.chain(
    ...   optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1)
    ... )
    >>> params = {"w": jax.numpy.ones(2)}
    >>> eval_params(tx.init(params), params)["w"].shape
    (2,)
  """
  readers: dict = {}
  for row in registry.methods().values():
    readers |= dict(row.eval_params)
  types = tuple(readers)
  for node in jax.tree.leaves(
    opt_state, is_leaf=lambda node: isinstance(node, types)
  ):
    if isinstance(node, types):
      return readers[type(node)](node, params)
  return params


def averaged(state: Any, params: optax.Params) -> optax.Params:
  """Reads a state that holds averaged parameters."""
  return _where_optimized(
    lambda average, x: average.astype(x.dtype), state.average, params
  )


def schedule_free(
  state: contrib.ScheduleFreeState, params: optax.Params
) -> optax.Params:
  """Reads x = (y - (1 - b1) z) / b1, as `schedule_free_eval_params` does."""
  return _where_optimized(
    lambda z, y: ((y - (1.0 - state.b1) * z) / state.b1).astype(y.dtype),
    state.z,
    params,
  )


def split(
  state: contrib.SplitRealAndImaginaryState, params: optax.Params
) -> optax.Params:
  """Reads the state of a base that sees real and imaginary parts apart."""
  identity = contrib.split_real_and_imaginary(
    optax.stateless(lambda parts, _: eval_params(state.inner_state, parts))
  )
  return identity.update(params, identity.init(params), params)[0]


def _where_optimized(
  read: Callable[[jax.Array, jax.Array], jax.Array],
  kept: optax.Params,
  params: optax.Params,
) -> optax.Params:
  """Maps `read(kept, x)`; a leaf that the method does not see stays."""
  is_masked = lambda node: isinstance(node, optax.MaskedNode)
  return jax.tree.map(
    lambda kept, x: x if is_masked(kept) else read(kept, x),
    kept,
    params,
    is_leaf=is_masked,
  )
