"""Reads each byte of an array on one process, and shares it with the others.

Orbax has each process read all that its devices hold, and the whole of a chunk
of which they hold a part; a chunk is what one device wrote. Its handler that
reads one replica (0.12.8) leaves all reading to that replica's processes, takes
no array that is split over the replicas' axis, and by its sums loses -0.0.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic.placement import axes_of, on_device


class Blocks(NamedTuple):
  """An array in blocks, each of which is one chunk or several whole ones.

  Attributes:
    sharding: that of the blocks, on the array's own devices. The axes of its
      mesh are the prime factors of those of the array's mesh.
    free: the axes over which the blocks are replicated.
  """

  sharding: NamedSharding
  free: tuple[str, ...]

  @classmethod
  def of(cls, array: Any, chunk: Sequence[int] | None) -> Self | None:
    """Returns an array's blocks, or None if no two processes would read one.

    Also None for random keys, and for elements smaller than a byte.

    Args:
      array: its shape, dtype and sharding.
      chunk: the shape of its chunks. By default it is one chunk.
    """
    sharding = getattr(array, "sharding", None)
    if (
      not isinstance(sharding, NamedSharding)
      or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
      or jax.dtypes.itemsize_bits(array.dtype) < 8
    ):
      return None
    mesh, factors = _factored(sharding.mesh)
    chunk = chunk or array.shape
    block, split = list(array.shape), [[] for _ in array.shape]

    def take(dim: int, axis: str) -> bool:
      """Splits the blocks over an axis, unless that splits a chunk."""
      rows, rest = divmod(block[dim], mesh.shape[axis])
      if rest or rows % chunk[dim]:
        return False
      block[dim] = rows
      split[dim].append(axis)
      return True

    free = list(mesh.axis_names)
    # First as the array is split,
    for dim, names in enumerate(axes_of(sharding, len(block))):
      for axis in (axis for name in names for axis in factors[name]):
        if not take(dim, axis):
          break
        free.remove(axis)
    if not _is_shared(mesh, free):
      return None
    # and then over what is left.
    free = [
      axis
      for axis in free
      if not any(take(dim, axis) for dim in range(len(block)))
    ]
    return cls(NamedSharding(mesh, P(*map(tuple, split))), tuple(free))

  def replica(self, which: float) -> NamedSharding:
    """Returns the sharding of one replica of the blocks, in device memory.

    Args:
      which: 0 for the first one, just below 1 for the last one.
    """
    mesh = self.sharding.mesh
    sizes = [mesh.shape[axis] for axis in self.free]
    place = np.unravel_index(int(which * math.prod(sizes)), sizes)
    index = dict(zip(self.free, place, strict=True))
    devices = mesh.devices[
      tuple(index.get(axis, slice(None)) for axis in mesh.axis_names)
    ]
    names = [axis for axis in mesh.axis_names if axis not in index]
    return NamedSharding(Mesh(devices, names), self.sharding.spec)

  def share(self, array: jax.ShapeDtypeStruct, found: Any) -> jax.Array:
    """Returns an array in its own sharding.

    All processes have to call it.

    Args:
      array: its shape, dtype and sharding.
      found: the replica, where a part of it was read.
    """
    # Processes share no host memory.
    found = on_device(found)
    if self.free:
      with jax.set_mesh(self.sharding.mesh):  # pyrefly: ignore
        found = _sum(self._with_zeros(array, found), self)
    sharding: Any = array.sharding
    found = jax.device_put(found, sharding.with_memory_kind(None))
    # One array after the other, so that no two are held twice.
    return jax.block_until_ready(jax.device_put(found, sharding))

  def _with_zeros(self, array: jax.ShapeDtypeStruct, found: Any) -> jax.Array:
    """Returns an array whose replicas differ: all but the one read are zeros.

    jax does not check that they are the same.
    """
    zeros = jnp.zeros(array.shape, array.dtype, device=self.sharding)
    parts = {each.device: each.data for each in zeros.addressable_shards}
    if isinstance(found, jax.Array):
      parts |= {each.device: each.data for each in found.addressable_shards}
    return jax.make_array_from_single_device_arrays(
      array.shape, self.sharding, list(parts.values())
    )


def deal(
  arrays: Mapping[str, Any], chunks: Mapping[str, Sequence[int] | None]
) -> dict[str, tuple[Blocks, NamedSharding]]:
  """Deals out to the processes what several of them would read.

  Args:
    arrays: path -> shape, dtype and sharding.
    chunks: path -> the shape of its chunks, if it is known.

  Returns:
    Path -> its blocks, and the sharding of the replica that is to be read.
  """
  found = {
    path: blocks
    for path, array in arrays.items()
    if (blocks := Blocks.of(array, chunks[path]))
  }
  # As many bytes to each device: the middle of each array says of which it is.
  sizes = np.array(
    [arrays[path].size * arrays[path].dtype.itemsize for path in found]
  )
  middles = (np.cumsum(sizes) - sizes / 2) / np.sum(sizes)
  memory = [arrays[path].sharding.memory_kind for path in found]
  return {
    path: (blocks, blocks.replica(middle).with_memory_kind(kind))
    for (path, blocks), middle, kind in zip(
      found.items(), middles, memory, strict=True
    )
  }


@functools.cache
def _factored(mesh: Mesh) -> tuple[Mesh, Mapping[str, Sequence[str]]]:
  """Returns a mesh whose axes are prime factors, and axis -> its factors."""
  sizes: list[int] = []
  factors: dict[str, list[str]] = {}
  for name, size in mesh.shape.items():
    primes = _primes(size)
    factors[name] = [f"{name} {i}" for i in range(len(primes))]
    sizes += primes
  names = [axis for axes in factors.values() for axis in axes]
  return Mesh(mesh.devices.reshape(sizes), names), factors


def _primes(number: int) -> list[int]:
  """Returns the prime factors of a number, the smallest first."""
  for factor in range(2, number):
    if number % factor == 0:
      return [factor, *_primes(number // factor)]
  return [number] if number > 1 else []


def _is_shared(mesh: Mesh, free: Sequence[str]) -> bool:
  """Whether what is replicated over axes of a mesh is on several processes."""
  homes = _homes(mesh)
  first = homes[
    tuple(slice(1) if axis in free else slice(None) for axis in mesh.axis_names)
  ]
  return bool((homes != first).any())


@functools.cache
def _homes(mesh: Mesh) -> np.ndarray:
  """Returns the process of each device of a mesh."""
  homes = [device.process_index for device in mesh.devices.flat]
  return np.reshape(homes, mesh.devices.shape)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _sum(array: jax.Array, blocks: Blocks) -> jax.Array:
  """Returns the sum of the replicas, of which one is not zero, bit for bit."""

  def add(x):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      return jax.lax.complex(add(x.real), add(x.imag))
    if x.dtype == jnp.bool_:
      return add(x.astype(jnp.uint8)).astype(jnp.bool_)
    bits = min(jax.dtypes.itemsize_bits(x.dtype), 32)
    words = jax.lax.bitcast_convert_type(x, f"uint{bits}")
    return jax.lax.bitcast_convert_type(
      jax.lax.psum(words, blocks.free), x.dtype
    )

  mesh, spec = blocks.sharding.mesh, blocks.sharding.spec
  return jax.shard_map(
    add, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )(array)
