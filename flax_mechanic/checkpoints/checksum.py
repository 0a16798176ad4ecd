"""Checksums of arrays that do not depend on how the arrays are sharded."""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flax_mechanic.paths import leaf_path
from flax_mechanic.placement import on_device


def checksums(tree: Any) -> dict[str, str]:
  """Returns path -> checksum, computed on the arrays' devices.

  A checksum is two sums over the array's 32-bit words, modulo 2^32: the sum of
  the words, and their sum weighted by 2 i + 1, where i is the word's index in
  the whole array. A change of one word changes both, and as integers may be
  added in any order, neither depends on the sharding.

  Args:
    tree: arrays, random keys included. Of several processes all have to call
      it.

  Example:
    >>> checksums({"w": jnp.arange(3)})
    {'w': '000000030000000d'}
  """
  groups: dict[Any, dict[str, jax.Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = _automatic(_array(leaf))
    group = groups.setdefault(_devices(array.sharding), {})
    group[leaf_path(path)] = array
  return {
    path: "".join(f"{int(word):08x}" for word in words)
    for group in groups.values()
    for path, words in zip(group, _sums_of([*group.values()]), strict=True)
  }


def _sums_of(arrays: Sequence[jax.Array]) -> Sequence[tuple[Any, Any]]:
  """Returns the two sums of arrays on the same devices."""
  shardings: list[Any] = [array.sharding for array in arrays]
  meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
  mesh: Any = meshes[0] if meshes else None
  alone = all(len(sharding.device_set) == 1 for sharding in shardings)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    return jax.device_get(_sums(arrays, alone))


def _devices(sharding: jax.sharding.Sharding) -> Any:
  """Returns the devices of a sharding, in the mesh's order if it has one."""
  if isinstance(sharding, NamedSharding):
    return tuple(sharding.mesh.devices.flat)
  return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _array(leaf: Any) -> jax.Array:
  """Returns a leaf in jax, which of 64 bits may hold only the two words."""
  if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.itemsize >= 8:
    leaf = np.ravel(leaf).view(np.uint32)
  return jnp.asarray(leaf)


def _automatic(array: jax.Array) -> jax.Array:
  """Returns an array on Auto axes, where a sum's sharding need not be given.

  Of random keys, which jax does not move on several processes (0.12), the data.
  """
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  sharding = array.sharding
  if not isinstance(sharding, NamedSharding):
    return array
  mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
  return jax.device_put(
    array,
    NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind),
  )


# One program for all arrays of a mesh: several at once, each with its own
# all-reduces, can deadlock on a CPU that simulates many devices (jax 0.10).
@functools.partial(jax.jit, static_argnames="alone")
def _sums(
  arrays: Sequence[jax.Array], alone: bool
) -> list[tuple[jax.Array, jax.Array]]:
  # One after the other: all that is in host memory need not fit on the devices.
  return [_sum(_words(on_device(array)), alone) for array in arrays]


def _sum(words: jax.Array, alone: bool) -> tuple[jax.Array, jax.Array]:
  index = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    stride = math.prod(words.shape[axis + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += iota * jnp.uint32(stride)
  terms = (words, words * (2 * index + 1))
  if not alone:
    plain, weighted = (jnp.sum(each, dtype=jnp.uint32) for each in terms)
    return plain, weighted
  # One reduce for both sums, which is 20 times as fast on a CPU. Of a sharded
  # array the partitioner would gather it.
  zero = jnp.uint32(0)
  return jax.lax.reduce(
    terms,
    (zero, zero),
    lambda a, b: (a[0] + b[0], a[1] + b[1]),
    tuple(range(words.ndim)),
  )


def _words(array: jax.Array) -> jax.Array:
  """Returns the bits of an array, each element as one or more uint32."""
  if jnp.issubdtype(array.dtype, jnp.complexfloating):
    array = jnp.stack([array.real, array.imag], -1)
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  bits = jax.dtypes.itemsize_bits(array.dtype)
  if bits < 8:
    return array.astype(jnp.int8).astype(jnp.uint32)
  if bits >= 32:
    return jax.lax.bitcast_convert_type(array, jnp.uint32)
  return jax.lax.bitcast_convert_type(array, f"uint{bits}").astype(jnp.uint32)
