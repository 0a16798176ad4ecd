"""Mechanic's four inner products: one pass over memory, one all-reduce."""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_mechanic.sharding import Shardings, leaf_path

# The four sums, or four arrays whose sums they are.
Four = tuple[jax.Array, ...]
# A leaf of g, of x and of delta.
Leaf = tuple[jax.Array, jax.Array, jax.Array]

# Terms of the inner of two sums on a CPU.
_ROW = 4096


def inner_products(
  g: optax.Updates,
  x: optax.Params,
  delta: optax.Params,
  dtype: jnp.dtype,
  shardings: Shardings | None = None,
) -> Four:
  """Returns |g|^2, |x|^2, Re <g, delta> and Re <x, delta>.

  Where a leaf's placement is known, each device sums what it holds, and one
  all-reduce of four numbers adds that up for all such leaves, however they are
  sharded. On an Explicit mesh the placement is in the types; on an Auto mesh
  `shardings` has to say it. Other leaves are left to the partitioner, which
  makes an all-reduce for each kind of placement.

  Args:
    g: a tree of arrays, float32 or wider, or complex.
    x: likewise.
    delta: likewise.
    dtype: of the sums.
    shardings: of the leaves of `x`.
  """
  leaves = list(zip(*map(jax.tree.leaves, (g, x, delta)), strict=True))
  placed, rest = _by_placement(x, shardings)
  others = [leaves[i] for i in rest]
  # The partitioner would gather what a CPU's variadic reductions read.
  alone = jax.device_count() == 1
  sum_others = _sum_for_backend if alone else _sum_one_by_one
  sums = [sum_others(others, [1.0] * len(others), dtype)]
  for mesh, specs in placed.items():
    held = [leaves[i] for i in specs]
    sums.append(_sum_on_mesh(held, mesh, list(specs.values()), dtype))
  return _add(sums, dtype)


def _by_placement(tree: Any, shardings: Shardings | None) -> Any:
  """Returns mesh -> leaf -> its spec, and the other leaves with an entry."""
  known = shardings.by_path if shardings else {}
  placed, rest = {}, []
  for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
    if leaf.size == 0:
      continue
    sharding = jax.typeof(leaf).sharding
    axis_types = set(sharding.mesh.axis_types)
    if axis_types != {AxisType.Explicit}:
      sharding = known.get(leaf_path(path))
    if sharding is None or AxisType.Manual in axis_types:
      rest.append(i)
    else:
      placed.setdefault(sharding.mesh, {})[i] = sharding.spec
  return placed, rest


def _sum_on_mesh(
  leaves: Sequence[Leaf], mesh: Any, specs: Sequence[P], dtype: jnp.dtype
) -> Four:
  """Returns the four sums over leaves of one mesh, whose specs are known."""

  def copies(spec: P) -> int:
    axes = jax.tree.leaves(tuple(spec))
    return mesh.size // math.prod(mesh.shape[axis] for axis in axes)

  def sum_local(*leaves: Leaf) -> jax.Array:
    weights = [1 / copies(spec) for spec in specs]
    sums = _sum_for_backend(leaves, weights, dtype)
    return jax.lax.psum(jnp.stack(sums), mesh.axis_names)

  in_specs = tuple((spec,) * 3 for spec in specs)
  return tuple(
    jax.shard_map(
      sum_local, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False
    )(*leaves)
  )


def _sum_for_backend(
  leaves: Sequence[Leaf], weights: Sequence[float], dtype: jnp.dtype
) -> Four:
  """Returns the four weighted sums over leaves that lie on this device.

  Four reductions merge into one pass on TPU and GPU, but not on a CPU, where
  one reduction of four operands does.
  """
  if not leaves:
    return _add([], dtype)
  choices = {
    name: functools.partial(f, weights=weights, dtype=dtype)
    for name, f in (("cpu", _sum_at_once), ("default", _sum_one_by_one))
  }
  return jax.lax.platform_dependent(leaves, **choices)


def _sum_one_by_one(
  leaves: Sequence[Leaf], weights: Sequence[float], dtype: jnp.dtype
) -> Four:
  sums = [
    tuple(w * jnp.sum(product) for product in _products(*leaf, dtype=dtype))
    for leaf, w in zip(leaves, weights, strict=True)
  ]
  return _add(sums, dtype)


def _sum_at_once(
  leaves: Sequence[Leaf], weights: Sequence[float], dtype: jnp.dtype
) -> Four:
  """Sums in two levels, since a flat float32 sum of 50M values is 14% wrong."""
  partial = [
    [w * part for part in sums]
    for leaf, w in zip(leaves, weights, strict=True)
    for sums in _row_sums(*leaf, dtype=dtype)
  ]
  return _reduce(map(jnp.concatenate, zip(*partial, strict=True)))


# Traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _row_sums(
  g: jax.Array, x: jax.Array, delta: jax.Array, *, dtype: jnp.dtype
) -> list[Four]:
  """Returns four vectors of sums over rows, and those over what is left."""
  flat = [part.reshape(-1) for part in (g, x, delta)]
  whole = flat[0].size // _ROW * _ROW
  sums = []
  if whole:
    # Two terms at a time, since an addition waits for the one before it.
    pairs = [part[:whole].reshape(-1, _ROW // 2, 2) for part in flat]
    even, odd = (
      _products(*(part[..., i] for part in pairs), dtype=dtype) for i in (0, 1)
    )
    sums.append(_reduce(map(operator.add, even, odd)))
  if whole < flat[0].size:
    rest = [part[whole:].reshape(1, -1) for part in flat]
    sums.append(_reduce(_products(*rest, dtype=dtype)))
  return sums


def _reduce(operands: Iterable[jax.Array]) -> Four:
  """Returns the sums over the last axis, of all operands in one loop."""
  operands = tuple(operands)
  zeros = tuple(jnp.zeros([], operand.dtype) for operand in operands)
  add = lambda a, b: tuple(map(operator.add, a, b))
  return tuple(jax.lax.reduce(operands, zeros, add, [operands[0].ndim - 1]))


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _products(
  g: jax.Array, x: jax.Array, delta: jax.Array, *, dtype: jnp.dtype
) -> Four:
  real = lambda a, b: jnp.real(a * jnp.conj(b)).astype(dtype)
  return real(g, g), real(x, x), real(g, delta), real(x, delta)


def _add(sums: Iterable[Four], dtype: jnp.dtype) -> Four:
  # Scalar by scalar: stacked for each leaf, XLA does not merge all-reduces.
  total = (jnp.zeros([], dtype),) * 4
  for four in sums:
    total = tuple(map(operator.add, total, four))
  return total
