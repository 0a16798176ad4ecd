"""One step of any method: loss, gradient, and what else the method needs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic.errors import UsageError
from flax_mechanic.extra_args import accepted
from flax_mechanic.methods import stack
from flax_mechanic.placement import Shardings

# (params, carried, *args) -> (loss, (aux, effects))
LossFn = Callable[..., tuple[jax.Array, tuple[Any, Any]]]
# A name, or a tuple of names, of axes that pmap or shard_map maps.
AxisName = str | tuple[str, ...]


def check_transformation(tx: Any) -> None:
  """Raises for what is no transformation, such as `optax.adamw` uncalled."""
  if not all(hasattr(tx, name) for name in ("init", "update")):
    what = getattr(tx, "__name__", type(tx).__name__)
    raise UsageError(
      f"tx={what} is not a transformation; type "
      "tx=flax_mechanic.make_optimizer(config), or one of optax's with its "
      "arguments, such as tx=optax.adamw(1e-3)"
    )


def value_and_grad(
  loss_fn: LossFn, axis_name: AxisName | None
) -> Callable[..., Any]:
  """Like `jax.value_and_grad`; the gradient is a mean over `axis_name`."""
  evaluate = jax.value_and_grad(loss_fn, has_aux=True)

  def averaged(*args):
    value, grads = evaluate(*args)
    return value, lax.pmean(grads, axis_name)

  return averaged if axis_name else evaluate


def minimize(
  tx: optax.GradientTransformation,
  loss_fn: LossFn,
  params: optax.Params,
  opt_state: optax.OptState,
  carried: Any,
  args: tuple[Any, ...],
  shardings: Shardings,
  *,
  merge_effects: Callable[[Any], Any] = lambda effects: effects,
  axis_name: AxisName | None = None,
  value_and_grad: Callable[..., Any] = value_and_grad,
) -> tuple[tuple[jax.Array, Any], optax.Updates, optax.OptState, Any]:
  """Does one step on a pure loss function.

  Args:
    tx: the transformation; what it needs beside the gradient is found out.
    loss_fn: `loss_fn(params, carried, *args)` returns `(loss, (aux, effects))`.
    params: what is differentiated. For a complex leaf the gradient is the
      conjugate of `jax.grad`'s, the direction of steepest ascent.
    opt_state: the state of `tx`.
    carried: state that the loss changes, such as batch statistics and random
      streams. A method that evaluates the loss again (sam) starts each time
      from this one, and the first evaluation's effects are kept.
    args: the rest. For a method that wants a gradient per example, the leading
      axis of every array is the batch; scalars and random keys are shared, and
      each example folds its index into the keys.
    shardings: of the parameters, as far as they are known.
    merge_effects: per example, combines the effects, whose arrays have the
      examples as their leading axis, into those that are kept.
    axis_name: of the mapped axes over which the batch is split. Every loss and
      every gradient is then that of the whole batch; aux and effects are each
      device's own.
    value_and_grad: `value_and_grad(loss_fn, axis_name)`, in the place of the
      one above.

  Returns:
    `(loss, aux)`, the updates, the new state of `tx`, the effects. Per example
    the loss and the scalars of aux are means over the batch, the arrays of aux
    are concatenated, and random keys are stacked.
  """
  evaluate = value_and_grad(loss_fn, axis_name)
  mine = _on_this_device(params, axis_name)
  if "per_example" in stack.needs(tx):
    (loss, (aux, effects)), grads = _per_example(
      value_and_grad(loss_fn, None), mine, carried, args, axis_name
    )
    effects = merge_effects(effects)
  else:
    (loss, (aux, effects)), grads = evaluate(mine, carried, *args)
  if axis_name:
    _check_own(loss, axis_name)
    loss = lax.pmean(loss, axis_name)
  conjugate = lambda grads: jax.tree.map(jnp.conj, grads)

  def grad_fn(params: optax.Params, _: int = 0) -> optax.Updates:
    mine = _on_this_device(params, axis_name)
    return conjugate(evaluate(mine, carried, *args)[1])

  extra = accepted(
    tx, {"value": loss, "grad_fn": grad_fn, **shardings.extra_args()}
  )
  updates, opt_state = tx.update(conjugate(grads), opt_state, params, **extra)
  return (loss, aux), updates, opt_state, effects


def _tracked(value: Any, axis_name: AxisName) -> frozenset[str]:
  """Returns the axes over which shard_map knows that a value varies."""
  names = (axis_name,) if isinstance(axis_name, str) else axis_name
  return jax.typeof(value).manual_axis_type.varying.intersection(names)


def _on_this_device(params: Any, axis_name: AxisName | None) -> Any:
  """Returns parameters whose gradient shard_map does not sum by itself."""
  if not axis_name:
    return params
  axes = _tracked(lax.axis_index(axis_name), axis_name)

  def cast(leaf):
    missing = tuple(axes - _tracked(leaf, axis_name))
    return lax.pcast(leaf, missing, to="varying")

  return jax.tree.map(cast, params)


def _check_own(loss: jax.Array, axis_name: AxisName) -> None:
  """Raises for a loss that is averaged already, where shard_map knows it."""
  if _tracked(lax.axis_index(axis_name), axis_name) - _tracked(loss, axis_name):
    raise UsageError(
      f"the loss is already averaged over axis_name={axis_name!r}; return each "
      "device's own, which minimize averages, or leave axis_name out"
    )


def _per_example(evaluate, params, carried, args, axis_name):
  """Like `evaluate`, with gradients and effects stacked over the examples.

  The gradients are those of the whole batch, if it is split over an axis.
  """
  leaves, treedef = jax.tree.flatten(args)
  batched = [_is_batched(leaf) for leaf in leaves]
  sizes = {len(leaf) for leaf, b in zip(leaves, batched, strict=True) if b}
  if len(sizes) != 1:
    raise UsageError(
      "a gradient per example needs arguments whose arrays share the leading "
      f"axis, the batch; theirs are {sorted(sizes) or 'none'} (make random "
      "keys with jax.random.key, not PRNGKey)"
    )

  def one(index, examples):
    examples = iter(examples)
    mine = [
      next(examples)[None] if b else _fold_in(leaf, index)
      for leaf, b in zip(leaves, batched, strict=True)
    ]
    (loss, (aux, effects)), grads = evaluate(
      params,
      jax.tree.map(lambda leaf: _fold_in(leaf, index), carried),
      *jax.tree.unflatten(treedef, mine),
    )
    return loss, aux, effects, grads

  examples = [leaf for leaf, b in zip(leaves, batched, strict=True) if b]
  # On an Explicit mesh vmap asks for the examples' own sharding.
  rows = jax.typeof(examples[0]).sharding
  rows = NamedSharding(rows.mesh, P(*rows.spec[:1]))
  indices = jnp.arange(sizes.pop(), out_sharding=rows)
  if axis_name:
    indices += lax.axis_index(axis_name) * len(indices)
  with _explaining_batches_of_one():
    losses, aux, effects, grads = jax.vmap(one)(indices, examples)
  _check_independent(aux)
  if axis_name:
    grads = lax.all_gather(grads, axis_name, tiled=True, to="invarying")
  return (jnp.mean(losses), (jax.tree.map(_merge, aux), effects)), grads


@contextlib.contextmanager
def _explaining_batches_of_one() -> Iterator[None]:
  """Raises an error of Explicit axes as one that says what to change."""
  try:
    yield
  except Exception as error:
    # jax has several classes for them, and exports none.
    if "sharding" not in str(error).lower():
      raise
    raise UsageError(
      "a gradient per example evaluates the loss on batches of one, whose "
      "first axis cannot be split over the mesh; leave it out of the loss's "
      'out_sharding, such as P(None, "model") in the place of '
      f'P("data", "model") ({error})'
    ) from error


def _merge(aux: jax.Array) -> jax.Array:
  """Merges an output of shape [batch, ...], of one example each."""
  if aux.ndim == 1:
    return aux if _is_key(aux) else jnp.mean(aux)
  return aux.reshape(-1, *aux.shape[2:]) if aux.shape[1] == 1 else aux


def _check_independent(aux: Any) -> None:
  """Raises if an auxiliary output holds batch statistics (Linen's name)."""
  for path, _ in jax.tree_util.tree_leaves_with_path(aux):
    if "batch_stats" in jax.tree_util.keystr(path, simple=True):
      refuse_batch_statistics()


def refuse_batch_statistics() -> None:
  """Raises the error of a batch norm under per-example gradients."""
  raise UsageError(
    "a gradient per example does not go with batch statistics, which mix the "
    "examples of a batch and so leak them past the clipping; use layer or "
    "group norm instead"
  )


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _is_batched(leaf: Any) -> bool:
  return not _is_key(leaf) and getattr(leaf, "ndim", 0) > 0


def _fold_in(leaf: Any, index: jax.Array) -> Any:
  """Folds `index` into every key of a leaf that holds keys."""
  if not _is_key(leaf):
    return leaf
  keys = jax.vmap(jax.random.fold_in, (0, None))(leaf.reshape(-1), index)
  return keys.reshape(leaf.shape)
