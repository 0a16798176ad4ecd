"""What optimizers' states tell: scalars, and parameters to evaluate."""

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib
from optax.schedules import InjectStatefulHyperparamsState

from flax_mechanic.mechanic import MechanicState
from flax_mechanic.mechanic.sizes import Sizes
from flax_mechanic.methods import features, registry
from flax_mechanic.methods.registry import Scalars
from flax_mechanic.paths import outermost
from flax_mechanic.placement import Shardings

# A state -> scalars, or a state and parameters -> parameters.
Reader = Callable[..., Any]


def scalars(opt_state: Any) -> Scalars:
  """Returns what the optimizer has learned, out of any nesting of states.

  Args:
    opt_state: an optax state, the `opt_state` of an `nnx.Optimizer`, or its
      part of `nnx.state(optimizer)`.

  Returns:
    Name -> scalar: each method's own, such as "mechanic/scale";
    "learning_rate/effective", the schedule's present value times the scales
    learned on top of it; and where bad gradients are skipped, "skipped", how
    many were, and "skipped_in_a_row", how many since the last good one. Where
    `optax.partition` or `optax.masked` gives parts of the parameters an
    optimizer each, they are the means over the parts, but for ranges, the sum
    of "skipped" and the largest "skipped_in_a_row". Of an ensemble, a state
    that `jax.vmap` has made, each value has the members for an axis.

    The states of optax's own optimizers do not hold the schedule's value, so
    under `mechanize(optax.adamw(schedule))` it is left out of the product. It
    is in those of `make_optimizer` and `optax.inject_hyperparams`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from flax_mechanic import mechanize
    >>> state = mechanize(optax.sgd(1.0)).init({"w": jnp.ones(2)})
    >>> sorted(scalars(state))
    ['learning_rate/effective', 'mechanic/scale', 'skipped', 'skipped_in_a_row']
  """
  readers: dict[type, Reader] = {
    InjectStatefulHyperparamsState: injected_learning_rate,
    Sizes: skipped,
  }
  readers |= _readers("scalars")
  types = (*readers, optax.MaskedState)
  found = _read(_typed(nnx.as_pure(opt_state), types), readers)
  if "learning_rate" in found:
    found["learning_rate/effective"] = found.pop("learning_rate")
  return found


def eval_params(
  opt_state: Any,
  params: optax.Params,
  shardings: Shardings | None = None,
) -> optax.Params:
  """Returns the parameters to evaluate, for any nesting of states.

  Args:
    opt_state: an optax state without NNX variables.
    params: the parameters being trained, as the transformation sees them.
    shardings: of the parameters, and of what is returned, where it is known.

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
  readers = _readers("eval_params")
  for state in outermost(_typed(opt_state, readers), tuple(readers)):
    read = readers[type(state)]
    if shardings and shardings.by_path:
      params = _placed(read, shardings, state, params)
    else:
      params = read(state, params)
  return params


# Compiled, so that of a state that is split further (ZeRO-1) only what is read
# is gathered.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _placed(
  read: Reader, shardings: Shardings, state: Any, params: optax.Params
) -> optax.Params:
  """Returns `read(state, params)`, computed and placed by the shardings."""
  return shardings.keep(read(shardings.place(state), params))


def _readers(field: str) -> dict[type, Reader]:
  """Returns state type -> reader of a field of the rows."""
  readers: dict[type, Reader] = {}
  for row in registry.methods().values():
    readers |= getattr(row, field)
  return readers


def _read(tree: Any, readers: Mapping[type, Reader]) -> Scalars:
  """Returns the scalars of the states in a tree.

  The learning rates of states around or beside each other multiply, but for
  those under `optax.masked`, which are of other parameters each.
  """
  found: Scalars = {}
  parts = []
  for state in outermost(tree, (*readers, optax.MaskedState)):
    inner = _read(tuple(state), readers)
    if isinstance(state, optax.MaskedState):
      parts.append(inner)
    else:
      found = _multiplied(found, readers[type(state)](state), inner)
  return _multiplied(found, _over_parts(parts))


def _multiplied(*parts: Scalars) -> Scalars:
  """Returns the union, with the product of the learning rates."""
  found = {name: value for part in parts for name, value in part.items()}
  rates = [part["learning_rate"] for part in parts if "learning_rate" in part]
  if rates:
    found["learning_rate"] = functools.reduce(operator.mul, rates)
  return found


_OVER_PARTS = {
  "skipped": jnp.sum,
  "skipped_in_a_row": jnp.max,
  "mechanic/scale_min": jnp.min,
  "mechanic/scale_max": jnp.max,
}


def _over_parts(parts: Sequence[Scalars]) -> Scalars:
  """Returns one scalar for those of a name, of different parameters each."""
  names = {name: None for part in parts for name in part}
  values = {name: [p[name] for p in parts if name in p] for name in names}
  return {
    name: _OVER_PARTS.get(name, jnp.mean)(jnp.stack(each), axis=0)
    if len(each) > 1
    else each[0]
    for name, each in values.items()
  }


def _typed(tree: Any, types: Collection[Any]) -> Any:
  """Returns a tree with mappings made the states that they were.

  `nnx.state` makes a mapping of every NamedTuple, and leaves out those fields
  that hold no array.

  Args:
    tree: mappings and arrays.
    types: NamedTuples.
  """
  if not isinstance(tree, Mapping):
    return tree
  fields = {name: _typed(child, types) for name, child in tree.items()}
  absent = {
    type_: set(type_._fields) - set(fields)
    for type_ in types
    if set(fields) <= set(type_._fields)
  }
  fits = [type_ for type_ in absent if absent[type_] <= _may_be_empty(type_)]
  if not fits:
    return fields
  best = min(fits, key=lambda type_: len(absent[type_]))
  return best(**fields, **dict.fromkeys(absent[best]))


def _may_be_empty(type_: Any) -> set[str]:
  """Returns the fields of a state that may hold no array: those of trees."""
  hints = getattr(type_, "__annotations__", {})
  trees = (optax.OptState, dict[str, Any])
  return {name for name, hint in hints.items() if hint in trees}


def injected_learning_rate(state: InjectStatefulHyperparamsState) -> Scalars:
  """Reads the schedule's present value."""
  if "learning_rate" not in state.hyperparams:
    return {}
  return {"learning_rate": jnp.asarray(state.hyperparams["learning_rate"])}


def skipped(state: Sizes) -> Scalars:
  """Reads how many gradients were skipped, in all and since the last good."""
  return {
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
  }


def mechanic(state: MechanicState) -> Scalars:
  """Reads the learned scale: its mean and range over groups."""
  # Axes in front of the groups' are an ensemble's.
  groups = tuple(range(jnp.ndim(state.count), state.scale.ndim))
  scale = jnp.mean(state.scale, groups)
  found = {
    "mechanic/scale": scale,
    "learning_rate": scale,
  }
  if groups:
    found["mechanic/scale_min"] = jnp.min(state.scale, groups)
    found["mechanic/scale_max"] = jnp.max(state.scale, groups)
  return found


def optax_mechanic(state: contrib.MechanicState) -> Scalars:
  """Reads the learned scale of optax's own mechanize."""
  scale = jnp.sum(state.s, -1)
  return {"mechanic/scale": scale, "learning_rate": scale}


def distance_estimate(name: str) -> Callable[[Any], Scalars]:
  """Scalars of a method that learns d, the distance to the solution."""
  return lambda state: {
    f"{name}/d": state.estim_lr,
    "learning_rate": state.estim_lr,
  }


def dog(state: contrib.DoGState) -> Scalars:
  """Reads the distance moved and the step that follows from it."""
  squares = state.sum_sq_norm_grads
  rate = jnp.where(squares > 0, state.max_dist * jax.lax.rsqrt(squares), 0.0)
  return {"dog/distance": state.max_dist, "learning_rate": rate}


def dowg(state: contrib.DoWGState) -> Scalars:
  """Reads the distance moved and the step that follows from it."""
  # Without eps, which the state does not hold.
  squares = state.weighted_sq_norm_grads
  rate = jnp.where(
    squares > 0, state.estim_sq_dist * jax.lax.rsqrt(squares), 0.0
  )
  return {
    "dowg/distance": jnp.sqrt(state.estim_sq_dist),
    "learning_rate": rate,
  }


def plateau(state: contrib.ReduceLROnPlateauState) -> Scalars:
  """Reads by how much the learning rate is reduced."""
  factor = jnp.asarray(state.scale)
  return {"reduce_on_plateau/factor": factor, "learning_rate": factor}


def measured(state: features.MeasuredState) -> Scalars:
  """Reads what `features.measured` kept."""
  found = dict(state.scalars)
  return found | {"learning_rate": found.pop("factor")}


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
