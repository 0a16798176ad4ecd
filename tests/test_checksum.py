"""Checksums: of the bits, whatever their placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic.checkpoints.checksum import checksums

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint32", "int16", "bool"]


def by_hand(words):
  words = np.ravel(words).astype(np.uint64)
  index = np.arange(len(words), dtype=np.uint64)
  sums = (words.sum(), (words * (2 * index + 1) % 2**32).sum())
  return "".join(f"{int(each) % 2**32:08x}" for each in sums)


def test_the_sums_are_those_of_the_docstring():
  bits = np.random.default_rng(0).integers(0, 2**32, (7, 5, 3), np.uint32)
  assert checksums([jnp.asarray(bits)]) == {"0": by_hand(bits)}
  floats = bits.view(np.float32)
  assert checksums([jnp.asarray(floats)]) == {"0": by_hand(bits)}
  halves = bits.view(np.uint16)
  found = checksums([jnp.asarray(halves.view(jnp.bfloat16))])
  assert found == {"0": by_hand(halves)}
  key = jax.random.key(3)
  assert checksums([key]) == {"0": by_hand(jax.random.key_data(key))}
  assert checksums([jnp.float32(1)]) == {"0": by_hand([0x3F800000])}
  assert checksums([jnp.zeros((0, 3))]) == {"0": "0" * 16}
  assert checksums([jnp.complex64(1 + 1j)]) == {"0": by_hand([0x3F800000] * 2)}


DOUBLES = np.random.default_rng(0).normal(size=(3, 5))


def test_doubles(x64):
  words = DOUBLES.view(np.uint32)
  assert checksums([jnp.asarray(DOUBLES)]) == {"0": by_hand(words)}


@pytest.mark.parametrize("array", [DOUBLES, DOUBLES.T, np.int64(2**40 + 1)])
def test_arrays_that_jax_holds_only_with_x64(array):
  words = np.ravel(array).view(np.uint32)
  assert checksums([array]) == {"0": by_hand(words)}


@pytest.mark.parametrize(
  ("dtype", "axis_type"),
  [
    *((dtype, AxisType.Auto) for dtype in DTYPES),
    # One of each way to be turned into words.
    *((dtype, AxisType.Explicit) for dtype in ("float32", "bfloat16")),
  ],
)
def test_no_sharding_changes_them(dtype, axis_type):
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
  x = jax.random.normal(jax.random.key(0), (8, 16, 4)).astype(dtype)
  wanted = checksums({"x": x})
  specs = [P("a", "b"), P(None, ("b", "a")), P(), P("b", None, "a")]
  for spec in specs:
    for kind in ("device", "pinned_host"):
      sharding = NamedSharding(mesh, spec, memory_kind=kind)
      tree = {"x": jax.device_put(x, sharding)}
      assert checksums(tree) == wanted
      with jax.set_mesh(mesh):
        assert checksums(tree) == wanted


def test_devices_may_differ():
  devices = jax.devices()
  # Of two meshes of the same devices, in another order.
  places = [
    *(
      NamedSharding(jax.sharding.Mesh(each, "a"), P("a"))
      for each in (devices, devices[::-1], devices[:2])
    ),
    devices[3],
  ]
  arrays = [jax.device_put(jnp.arange(8), place) for place in places]
  assert {*checksums(arrays).values()} == {by_hand(np.arange(8))}


def test_every_flipped_bit_and_every_swap_is_seen():
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**32, (8,), np.uint32)
  changed = []
  for place in range(8):
    for bit in range(32):
      other = bits.copy()
      other[place] ^= np.uint32(1 << bit)
      changed.append(other)
  for i, j in rng.integers(0, 8, (40, 2)):
    if bits[i] != bits[j]:
      other = bits.copy()
      other[[i, j]] = other[[j, i]]
      changed.append(other)
  found = set(checksums([jnp.asarray(each) for each in changed]).values())
  assert by_hand(bits) not in found
