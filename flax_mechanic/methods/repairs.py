"""Repairs of optax's transformations, to be deleted as optax heals."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import meta
from jax.sharding import AxisType
from optax.tree_utils import _tree_math

from flax_mechanic.extra_args import accepted
from flax_mechanic.mechanic.held import held_update
from flax_mechanic.mechanic.offset import widen
from flax_mechanic.paths import map_with_parameters, parameter_path
from flax_mechanic.placement import Shardings


def own_buffers(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Makes the state of `tx` safe to donate together with the parameters.

  These may be Python's numbers, which are made arrays.

  Several of optax's states hold the parameters themselves, one array of zeros
  several times, or an array that every `init` returns (optax 0.2.8). The copies
  that separate them vanish when `init` is compiled.
  """
  tx = optax.with_extra_args_support(tx)
  arrays = functools.partial(jax.tree.map, jnp.asarray)

  def update(updates, state, params=None, **extra_args):
    return tx.update(updates, state, arrays(params), **extra_args)

  return optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.copy, tx.init(arrays(params))), update
  )


def keep_dtypes(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Keeps each leaf of the state in the dtype that `init` gave it.

  A float32 learning rate that is applied before the accumulators widens the
  state of low-precision parameters (optax 0.2.8: `lars`, `cocob`).
  """
  tx = optax.with_extra_args_support(tx)

  def cast(new, old):
    dtype = getattr(old, "dtype", new.dtype)  # A number that the user has set.
    return new if new.dtype == dtype else new.astype(dtype)

  def update(updates, state, params=None, **extra_args):
    updates, new_state = tx.update(updates, state, params, **extra_args)
    return updates, jax.tree.map(cast, new_state, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def in_float32(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Hands `tx` gradients of float32 or wider, and returns them as they were.

  optax's clipping squares float16 gradients in float16 (0.2.8): a norm above
  256 overflows and the clipped gradient is 0. In bfloat16 the norm is rounded
  by up to 0.4%, so the clipped gradient may be that much too large.
  """

  def update(updates, state, params=None):
    wide = jax.tree.map(lambda g: widen(g, jnp.float32), updates)
    made, state = tx.update(wide, state, params)
    narrow = lambda new, g: new.astype(jnp.result_type(g))
    return jax.tree.map(narrow, made, updates), state

  return optax.GradientTransformation(tx.init, update)


def clip_by_global_norm(
  max_norm: float, *, keep_bad: bool = False
) -> optax.GradientTransformation:
  """Returns optax's, computed `in_float32`.

  Args:
    max_norm: the largest norm that a gradient keeps.
    keep_bad: whether a gradient too large to be squared in float32 too becomes
      NaN instead of optax's 0, for what judges gradients behind the clipping.
  """

  def update(updates, state, params=None):
    limit: Any = max_norm
    if keep_bad:
      limit = jnp.where(jnp.isfinite(optax.tree.norm(updates)), limit, jnp.nan)
    return optax.clip_by_global_norm(limit).update(updates, state, params)

  return in_float32(
    optax.GradientTransformation(optax.init_empty_state, update)
  )


def hand_on(
  wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation],
  base: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns `wrap(base)`, where `base` gets the extra arguments it accepts.

  Some of optax's wrappers call `base.update` without them (optax 0.2.8: `sam`,
  `split_real_and_imaginary`).
  """

  def update(updates, state, params=None, **extra_args):
    bound = optax.GradientTransformation(
      base.init,
      lambda updates, state, params=None: base.update(
        updates, state, params, **accepted(base, extra_args)
      ),
    )
    tx = wrap(bound)
    return tx.update(updates, state, params, **accepted(tx, extra_args))

  return optax.GradientTransformationExtraArgs(wrap(base).init, update)


def box_what_fits(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Unboxes the leaves of the state that are not shaped like their parameter.

  Adafactor's factors, of one axis each, would stay in the boxes (Linen's
  `Partitioned`, NNX's variables) of kernels with two axes, whose annotations
  cannot place them; so would the states of sm3, novograd and galore (optax
  0.2.8, flax 0.12).
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    state = tx.init(params)
    if not any(map(_is_box, jax.tree.leaves(state, is_leaf=_is_box))):
      return state
    parameters = {
      parameter_path(path): jax.typeof(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def keep_if_it_fits(box, parameter):
      # `optax.masked` empties boxes.
      fits = parameter is not None or not jax.tree.leaves(box)
      return box if fits else _unbox(box)

    return map_with_parameters(
      keep_if_it_fits,
      state,
      parameters,
      shape=lambda box: getattr(_unbox(box), "shape", None),
      is_leaf=_is_box,
    )

  def update(updates, state, params=None, **extra_args):
    bare = lambda tree: jax.tree.map(_unbox, tree, is_leaf=_is_box)
    like = jax.tree.structure((updates, state))
    new = tx.update(bare(updates), bare(state), bare(params), **extra_args)
    return jax.tree.unflatten(like, jax.tree.leaves(new))

  return optax.GradientTransformationExtraArgs(init, update)


def _is_box(node: Any) -> bool:
  return isinstance(node, meta.AxisMetadata | nnx.Variable)


def _unbox(node: Any) -> Any:
  """Returns what is in a box: an array, a tree of some, or nothing."""
  if not _is_box(node):
    return node
  return jax.tree.leaves(node, is_leaf=lambda child: child is not node)[0]


def with_an_axis(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Hands scalars to `tx` as arrays of one element.

  Sm3 has accumulators for axes alone, and fails without any (optax 0.2.8).
  """
  tx = optax.with_extra_args_support(tx)
  expand = lambda tree: jax.tree.map(jnp.atleast_1d, tree)

  def update(updates, state, params=None, **extra_args):
    made, state = tx.update(
      expand(updates), state, expand(params), **extra_args
    )
    like = lambda new, g: jnp.reshape(new, jnp.shape(g))
    return jax.tree.map(like, made, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: tx.init(expand(params)), update
  )


def without_empty_arrays(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Leaves arrays without elements out of the state.

  Galore has one for each parameter that is no matrix (optax 0.2.8), and Orbax
  saves none (0.12).
  """
  tx = optax.with_extra_args_support(tx)
  without = lambda state: jax.tree.map(
    lambda leaf: leaf if leaf.size else optax.MaskedNode(), state
  )

  def update(updates, state, params=None, **extra_args):
    leaves = iter(jax.tree.leaves(state))
    whole = jax.tree.map(
      lambda like: next(leaves) if like.size else jnp.zeros_like(like),
      jax.eval_shape(tx.init, updates),
    )
    updates, state = tx.update(updates, whole, params, **extra_args)
    return updates, without(state)

  return optax.GradientTransformationExtraArgs(
    lambda params: without(tx.init(params)), update
  )


def skip_zeros(
  tx: optax.GradientTransformation, learning_rate: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
  """Skips the updates at which `tx` would divide 0 by 0.

  Prodigy and D-Adaptation divide by the sum of the gradients weighted with the
  learning rate (optax 0.2.8): if the schedule or the gradient is exactly 0 from
  the start, their estimate becomes NaN forever.
  """
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    moves = jax.tree.reduce(
      jnp.logical_or,
      jax.tree.map(lambda g: jnp.any(g != 0), updates),
      jnp.zeros([], bool),
    )
    moves &= learning_rate != 0
    # Not by a conditional, which reads and writes more than selects do.
    updates, state = held_update(
      lambda g, state, x: tx.update(g, state, x, **extra_args),
      lambda new, old: jnp.where(moves, new, old),
      updates,
      state,
      params,
    )
    return jax.tree.map(lambda u: jnp.where(moves, u, 0), updates), state

  return optax.GradientTransformationExtraArgs(tx.init, update)


def on_any_mesh(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Lets `tx` be updated where the parameters' mesh has explicit axes.

  Many transformations do not expect types that say how an array is sharded, and
  raise ShardingTypeError there. They are given automatic axes; the updates are
  then sharded like the parameters, and the new state like the old one.
  """
  tx = optax.with_extra_args_support(tx)

  def update(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    given = updates if params is None else params
    types = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(given)]
    mesh = next((t.mesh for t in types if not t.mesh.empty), None)
    if mesh is None or set(mesh.axis_types) != {AxisType.Explicit}:
      with _vdot_without_ravel():
        return tx.update(updates, state, params, **extra_args)

    spec = lambda leaf: jax.typeof(leaf).sharding.spec
    is_array = lambda value: isinstance(value, jax.Array)
    arrays = {k: v for k, v in extra_args.items() if is_array(v)}
    others = {k: v for k, v in extra_args.items() if not is_array(v)}
    shardings = others.pop("shardings", None) or Shardings.of(given)
    if "grad_fn" in others:
      others["grad_fn"] = _on_explicit_axes(others["grad_fn"], given)

    def automatic(updates, state, params, arrays):
      others["shardings"] = shardings.on(jax.sharding.get_abstract_mesh())
      with _vdot_without_ravel():
        return tx.update(updates, state, params, **arrays, **others)

    with jax.sharding.use_abstract_mesh(mesh):
      automatic_update: Any = jax.sharding.auto_axes(
        automatic,
        out_sharding=(jax.tree.map(spec, given), jax.tree.map(spec, state)),
      )
      return automatic_update(updates, state, params, arrays)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _on_explicit_axes(
  grad_fn: Callable[[optax.Params], optax.Updates], given: optax.Params
) -> Callable[[optax.Params], optax.Updates]:
  """Returns `grad_fn`, which wants typed parameters, for automatic axes.

  Args:
    grad_fn: parameters -> gradient.
    given: the parameters, typed, boxed or not.
  """
  specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(given)]

  def automatic(params: optax.Params) -> optax.Updates:
    like = jax.tree.unflatten(jax.tree.structure(params), specs)
    typed: Any = jax.sharding.explicit_axes(grad_fn, in_sharding=(like,))
    return typed(params)

  return automatic


# The function is optax's, so it is replaced by one thread at a time.
_REPLACING_VDOT = threading.RLock()


@contextlib.contextmanager
def _vdot_without_ravel() -> Iterator[None]:
  """Has `optax.tree.vdot` reduce leaves where they are placed.

  optax 0.2.8 does so from jax 0.7.2 on, but compares versions as strings, so
  that with jax 0.10 it ravels: leaves that are sharded over two axes are
  gathered. It is fixed in optax's repository, in no release yet; with the fix
  this does nothing.
  """
  if not optax_ravels():
    yield
    return
  with _REPLACING_VDOT:
    original = _tree_math._vdot
    _tree_math._vdot = lambda a, b, precision=None: jnp.sum(jnp.conj(a) * b)
    try:
      yield
    finally:
      _tree_math._vdot = original


@functools.cache
def optax_ravels() -> bool:
  """Whether this optax has the bug."""
  leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  return "reshape" in str(jax.make_jaxpr(optax.tree.vdot)(leaf, leaf))
