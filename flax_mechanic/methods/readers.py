"""What optimizers' states tell: scalars, and parameters to evaluate."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    many were, and "skipped_in_a_row", how many since the last good one. The
    states of optax's own optimizers do not hold the schedule's value, so under
    `mechanize(optax.adamw(schedule))` it is left out of the product. It is in
    those of `make_optimizer` and `optax.inject_hyperparams`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from flax_mechanic import mechanize
    >>> state = mechanize(optax.sgd(1.0)).init({"w": jnp.ones(2)})
    >>> sorted(scalars(state))
    ['learning_rate/effective', 'mechanic/scale', 'skipped', 'skipped_in_a_row']
  """
  readers = {
    InjectStatefulHyperparamsState: injected_learning_rate,
    Sizes: skipped,
  }
  found: Scalars = {}
  factors = []
  for read, state in _find("scalars", nnx.as_pure(opt_state), readers):
    values = read(state)
    if "learning_rate" in values:
      factors.append(values.pop("learning_rate"))
    found |= values
  if factors:
    found["learning_rate/effective"] = functools.reduce(operator.mul, factors)
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
  for read, state in _find("eval_params", opt_state, {}):
    if shardings and shardings.by_path:
      return _placed(read, shardings, state, params)
    return read(state, params)
  return params


# Compiled, so that of a state that is split further (ZeRO-1) only what is read
# is gathered.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _placed(
  read: Reader, shardings: Shardings, state: Any, params: optax.Params
) -> optax.Params:
  """Returns `read(state, params)`, computed and placed by the shardings."""
  return shardings.keep(read(shardings.place(state), params))


def _find(
  field: str,
  opt_state: Any,
  others: dict[type, Reader],
) -> Iterator[tuple[Reader, Any]]:
  """Yields the states that a row reads, with their readers, outermost first.

  Args:
    field: of a row, "scalars" or "eval_params": state type -> reader.
    opt_state: any nesting of states.
    others: more readers.
  """
  readers = dict(others)
  for row in registry.methods().values():
    readers |= getattr(row, field)
  types = tuple(readers)
  if isinstance(opt_state, Mapping):
    opt_state = _typed(opt_state, types)
  is_read = lambda node: isinstance(node, types)

  def walk(tree: Any) -> Iterator[tuple[Reader, Any]]:
    for node in filter(is_read, jax.tree.leaves(tree, is_leaf=is_read)):
      yield readers[type(node)], node
      yield from walk(tuple(node))

  return walk(opt_state)


def _typed(tree: Any, types: Sequence[Any]) -> Any:
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
  injected = state.hyperparams
  return {
    name: jnp.asarray(injected[name])
    for name in ("learning_rate",)
    if name in injected
  }


def skipped(state: Sizes) -> Scalars:
  """Reads how many gradients were skipped, in all and since the last good."""
  return {
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
  }


def mechanic(state: MechanicState) -> Scalars:
  """Reads the learned scale: its mean and range over groups."""
  scale = jnp.mean(state.scale)
  found = {
    "mechanic/scale": scale,
    "learning_rate": scale,
  }
  if state.scale.ndim:
    found["mechanic/scale_min"] = jnp.min(state.scale)
    found["mechanic/scale_max"] = jnp.max(state.scale)
  return found


def optax_mechanic(state: contrib.MechanicState) -> Scalars:
  """Reads the learned scale of optax's own mechanize."""
  scale = jnp.sum(state.s)
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
