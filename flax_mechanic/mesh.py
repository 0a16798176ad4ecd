"""Makes optax's transformations work on every mesh."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from optax.tree_utils import _tree_math

from flax_mechanic.sharding import Shardings


def on_any_mesh(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Lets `tx` be updated where the parameters' mesh has explicit axes.

  Many transformations were written without types that say how an array is
  sharded, and raise ShardingTypeError there. They see automatic axes; what
  comes out is sharded as what went in, updates like parameters and the new
  state like the old one.
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


@contextlib.contextmanager
def _vdot_without_ravel() -> Iterator[None]:
  """Has `optax.tree.vdot` reduce leaves where they lie.

  optax 0.2.8 means to from jax 0.7.2 on, but compares versions as texts, so
  that jax 0.10 ravels: leaves that are sharded over two axes are gathered.
  Mended in optax's repository, in no release yet; then this does nothing.
  """
  if not optax_ravels():
    yield
    return
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
