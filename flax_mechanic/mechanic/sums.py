"""Mechanic's inner products: one pass over memory, one all-reduce."""

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_mechanic.mechanic.groups import Groups
from flax_mechanic.paths import parameter_path
from flax_mechanic.placement import Shardings

# For each product its sums over groups, of the groups' shape.
Sums = tuple[jax.Array, ...]
# A leaf of g, of x and of delta.
Leaf = tuple[jax.Array, jax.Array, jax.Array]

# Names of products of g, x and d, which is delta.
PAIRS = ("gg", "xx", "gd", "xd")

# How many terms a CPU adds up in a row before it adds up rows.
_ROW = 4096


def inner_products(
  g: optax.Updates,
  x: optax.Params,
  delta: optax.Params,
  dtype: jax.typing.DTypeLike,
  shardings: Shardings | None = None,
  *,
  groups: Groups | None = None,
  pairs: Sequence[str] = PAIRS,
) -> Sums:
  """Returns |g|^2, |x|^2, Re <g, delta> and Re <x, delta>, group by group.

  Where a leaf's placement is known, each device sums the part that it holds,
  and one all-reduce of a few numbers adds the parts of all such leaves, however
  they are sharded. On an Explicit mesh the types say the placement; on an Auto
  mesh `shardings` has to. Other leaves are left to the partitioner, which makes
  an all-reduce for each kind of placement.

  Args:
    g: a tree of arrays, float32 or wider, or complex.
    x: likewise.
    delta: likewise.
    dtype: of the sums.
    shardings: of the leaves of `x`.
    groups: of the leaves; by default there is one, and the sums are scalars.
    pairs: which products, such as ("gd", "dd").
  """
  products = _Products(tuple(pairs), jnp.dtype(dtype))
  groups = groups or Groups.of("", x)
  leaves = list(zip(*map(jax.tree.leaves, (g, x, delta)), strict=True))
  placed, rest = _by_placement(x, shardings)
  # On several devices the partitioner would gather the operands of a variadic
  # reduction.
  alone = jax.device_count() == 1
  sum_rest = _sum_on_device if alone else _sum_one_by_one
  parts = [
    sum_rest(
      _Part([leaves[i] for i in rest], [1.0] * len(rest), groups.only(rest)),
      products,
    )
  ]
  parts += [
    _sum_on_mesh(
      [leaves[i] for i in specs],
      mesh,
      list(specs.values()),
      groups.only(specs),
      products,
    )
    for mesh, specs in placed.items()
  ]
  return tuple(
    functools.reduce(operator.add, each) for each in zip(*parts, strict=True)
  )


class _Products(NamedTuple):
  """Which products, and of which dtype; static."""

  pairs: tuple[str, ...]
  dtype: jnp.dtype


class _Part(NamedTuple):
  """Leaves that are summed together, their weights and their groups."""

  leaves: Sequence[Leaf]
  weights: Sequence[float]
  groups: Groups


def _by_placement(
  tree: Any, shardings: Shardings | None
) -> tuple[Mapping[Any, Mapping[int, P]], Sequence[int]]:
  """Returns mesh -> leaf -> its spec, and the leaves of unknown placement."""
  known = shardings.by_path if shardings else {}
  placed: dict[Any, dict[int, P]] = {}
  rest = []
  for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
    if leaf.size == 0:
      continue
    sharding = jax.typeof(leaf).sharding
    axis_types = set(sharding.mesh.axis_types)
    if axis_types != {AxisType.Explicit}:
      sharding = known.get(parameter_path(path))
    if sharding is None or AxisType.Manual in axis_types:
      rest.append(i)
    else:
      placed.setdefault(sharding.mesh, {})[i] = sharding.spec
  return placed, rest


def _sum_on_mesh(
  leaves: Sequence[Leaf],
  mesh: Any,
  specs: Sequence[P],
  groups: Groups,
  products: _Products,
) -> Sums:
  """Returns the sums over leaves of one mesh, whose specs are known."""

  def weight(spec: P) -> float:
    # Each replica of a leaf counts a fraction of it.
    axes = jax.tree.leaves(tuple(spec))
    return math.prod(mesh.shape[axis] for axis in axes) / mesh.size

  weights = [weight(spec) for spec in specs]

  def sum_local(*leaves: Leaf) -> jax.Array:
    sums = _sum_on_device(_Part(leaves, weights, groups), products)
    return jax.lax.psum(jnp.stack(sums), mesh.axis_names)

  in_specs = tuple((spec,) * 3 for spec in specs)
  return tuple(
    jax.shard_map(
      sum_local, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False
    )(*leaves)
  )


def _sum_on_device(part: _Part, products: _Products) -> Sums:
  """Returns the sums over leaves that one device holds.

  Several reductions merge into one pass on TPU and GPU, but not on a CPU, where
  one reduction of several operands does.
  """
  if not part.leaves:
    return _sum_one_by_one(part, products)

  def choice(f: Any) -> Any:
    return lambda leaves: f(part._replace(leaves=leaves), products)

  return jax.lax.platform_dependent(
    part.leaves, cpu=choice(_sum_rows), default=choice(_sum_one_by_one)
  )


def _sum_one_by_one(part: _Part, products: _Products) -> Sums:
  sums = [
    [w * jnp.sum(each) for each in _multiply(*leaf, products=products)]
    for leaf, w in zip(part.leaves, part.weights, strict=True)
  ]
  by_pair = zip(*sums, strict=True) if sums else [()] * len(products.pairs)
  return tuple(part.groups.total(each, products.dtype) for each in by_pair)


def _sum_rows(part: _Part, products: _Products) -> Sums:
  """Sums in two levels, since a flat float32 sum of 50M values is 14% wrong."""
  rows, of_row = [], []
  for leaf, w, group in zip(*part[:2], part.groups.of_leaf, strict=True):
    for sums in _row_sums(*leaf, products=products):
      rows.append(jnp.stack(sums) if w == 1 else w * jnp.stack(sums))
      of_row += [group] * len(sums[0])
  # One array of all products' rows: XLA:CPU compiles a concatenation for a time
  # that grows with its operands (jax 0.12).
  table = jnp.concatenate(rows, axis=1)
  if not part.groups.shape:
    return _reduce(table, [0])
  totals = jax.ops.segment_sum(table.T, np.asarray(of_row), part.groups.size)
  return tuple(totals.T)


# Traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnames="products", inline=True)
def _row_sums(
  g: jax.Array, x: jax.Array, delta: jax.Array, *, products: _Products
) -> list[Sums]:
  """Returns vectors of sums over rows, and those over what is left."""
  flat = [part.reshape(-1) for part in (g, x, delta)]
  whole = flat[0].size // _ROW * _ROW
  sums: list[Sums] = []
  if whole:
    # Two terms at a time, since an addition waits for the one before it.
    pairs = [part[:whole].reshape(-1, _ROW // 2, 2) for part in flat]
    even, odd = (
      _multiply(*(part[..., i : i + 1] for part in pairs), products=products)
      for i in (0, 1)
    )
    if len(products.pairs) == 1:
      # XLA:CPU fuses the producers of a reduce only if it has several operands
      # (jax 0.12).
      sums.append((operator.add(*_reduce((*even, *odd), [1, 2])),))
    else:
      sums.append(_reduce(map(operator.add, even, odd), [1, 2]))
  if whole < flat[0].size:
    rest = [part[whole:].reshape(1, -1) for part in flat]
    sums.append(_reduce(_multiply(*rest, products=products), [1]))
  return sums


def _reduce(operands: Iterable[jax.Array], axes: Sequence[int]) -> Sums:
  """Returns the sums over some axes, of all operands in one loop."""
  operands = tuple(operands)
  zeros = (jnp.zeros([], operands[0].dtype),) * len(operands)
  add = lambda a, b: tuple(map(operator.add, a, b))
  return tuple(jax.lax.reduce(operands, zeros, add, axes))


@functools.partial(jax.jit, static_argnames="products", inline=True)
def _multiply(
  g: jax.Array, x: jax.Array, delta: jax.Array, *, products: _Products
) -> Sums:
  factors = {"g": g, "x": x, "d": delta}
  real = lambda a, b: jnp.real(a * jnp.conj(b)).astype(products.dtype)
  return tuple(real(factors[a], factors[b]) for a, b in products.pairs)
