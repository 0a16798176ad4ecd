"""What one process reads and shares with the others, which have the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic import Checkpointer
from flax_mechanic.checkpoints import replicas, storage
from train.cost import restores
from train.faults.bucket import Bucket
from train.processes import free_port

ROOT = Path(__file__).parent.parent
FOLDER = "gs://test/replicas"
# Name -> shape, dtype, and how it is split over data and fsdp.
ARRAYS = {
  "replicated": ((1024, 512), "float32", P()),
  "fsdp": ((1024, 512), "float32", P("fsdp")),
  "data": ((1024, 512), "float32", P(None, "data")),
  "both": ((1024, 512), "float32", P(None, ("fsdp", "data"))),
  "offloaded": ((1024, 512), "float32", P("data")),
  "odd": ((7, 3), "bfloat16", P()),
  "scalar": ((), "float32", P()),
  "bool": ((16,), "bool", P()),
  "int8": ((5,), "int8", P()),
  "int4": ((8,), "int4", P()),
  "complex": ((4, 3), "complex64", P("fsdp")),
}


def bits():
  """Returns name -> array of random bits: NaNs, denormals and -0.0 as well."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, (shape, dtype, _) in ARRAYS.items():
    dtype = np.dtype(dtype)
    words = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    words &= {"bool": 1, "int4": 7}.get(dtype.name, 255)
    arrays[name] = words.view(dtype).reshape(shape)
  return arrays


def placed(mesh):
  """Returns the same as arrays on a mesh, and what else a state may hold."""
  state = {"number": 3}
  for name, array in bits().items():
    kind = "pinned_host" if name == "offloaded" else "device"
    sharding = NamedSharding(mesh, ARRAYS[name][2], memory_kind=kind)
    state[name] = jax.make_array_from_callback(
      array.shape, sharding, array.__getitem__
    )
  make_key = jax.jit(jax.random.key, out_shardings=NamedSharding(mesh, P()))
  return state | {"key": make_key(1)}


def same(found, wanted):
  """Whether each shard of an array has the bits and the place it should."""
  if not isinstance(wanted, jax.Array):
    return found == wanted
  data = lambda each: np.asarray(
    jax.random.key_data(each)
    if jax.dtypes.issubdtype(each.dtype, jax.dtypes.prng_key)
    else each
  )
  return found.sharding == wanted.sharding and all(
    data(one.data).tobytes() == data(other.data).tobytes()
    for one, other in zip(
      found.addressable_shards, wanted.addressable_shards, strict=True
    )
  )


def restore(port, i):
  """Restores as one of two processes; prints how often each byte was served."""
  jax.distributed.initialize(f"localhost:{port}", 2, i)
  server = Bucket(Path(), os.environ["STORAGE_EMULATOR_HOST"])
  wait = multihost_utils.sync_global_devices
  ratios = {}
  for kind in (AxisType.Auto, AxisType.Explicit):
    state = placed(jax.make_mesh((2, 4), ("data", "fsdp"), (kind,) * 2))
    for name in ("alone", f"together, {kind}"):
      folder = f"{FOLDER}/{name}"
      if name != "alone":
        with Checkpointer(folder) as checkpointer:
          checkpointer.save(1, state)
      with Checkpointer(folder, read_only=True) as checkpointer:
        wait("begin")
        server.served()
        wait("restore")
        restored = checkpointer.restore(state).state
        wait("end")
        served = server.served() if i == 0 else 0
      wrong = [each for each in state if not same(restored[each], state[each])]
      assert not wrong, wrong
      files = storage.files(storage.path(folder) / "1")
      ratios[name, str(kind)] = served / sum(size for _, size in files)
  print(json.dumps(list(ratios.items())))


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P("data"), P(None, "fsdp")])
@pytest.mark.parametrize("chunk", [(16, 8), (8, 8), (2, 8), (16, 1), (5, 8)])
def test_each_chunk_is_of_one_block_that_one_device_reads(
  monkeypatch, spec, chunk
):
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
  sharding = NamedSharding(mesh, spec)
  array = jax.ShapeDtypeStruct((16, 8), "float32", sharding=sharding)
  assert replicas.deal({"w": array}, {"w": chunk}) == {}  # One process.
  # As if each row of the mesh were of a process.
  row = lambda mesh: np.reshape(np.arange(8) // 4, mesh.devices.shape)
  monkeypatch.setattr(replicas, "_homes", row)
  dealt = replicas.deal({"w": array}, {"w": chunk})
  if spec == P("data") and chunk in ((8, 8), (2, 8)):
    assert dealt == {}
    return
  blocks, _ = dealt["w"]
  for share in (0, 0.5, 0.99):
    readers = np.zeros(array.shape, int)
    owners = np.zeros(array.shape, int)
    read = blocks.replica(share).devices_indices_map(array.shape)
    for device, index in read.items():
      readers[index] += 1
      owners[index] = device.id
    np.testing.assert_array_equal(readers, 1)
    for row in range(0, 16, chunk[0]):
      for column in range(0, 8, chunk[1]):
        part = owners[row : row + chunk[0], column : column + chunk[1]]
        assert np.unique(part).size == 1
  # As many devices read as there are chunks, if there are as many.
  chunks = 16 // chunk[0] * (8 // chunk[1])
  assert len(read) == (1 if chunk[0] == 5 else min(chunks, 8))


def test_devices_read_as_much(monkeypatch):
  mesh = jax.make_mesh((8,), ("data",))
  homes = lambda mesh: np.reshape(np.arange(8), mesh.devices.shape)
  monkeypatch.setattr(replicas, "_homes", homes)
  array = jax.ShapeDtypeStruct(
    (4,), "float32", sharding=NamedSharding(mesh, P())
  )
  names = [f"{i}" for i in range(16)]
  dealt = replicas.deal(dict.fromkeys(names, array), dict.fromkeys(names))
  readers = [min(read.device_set).id for _, read in dealt.values()]
  assert readers == [i // 2 for i in range(16)]


@pytest.mark.slow
def test_each_byte_is_read_once(bucket):
  with Checkpointer(f"{FOLDER}/alone") as checkpointer:
    state = {name: jnp.asarray(each) for name, each in bits().items()}
    checkpointer.save(1, state | {"key": jax.random.key(1), "number": 3})
  port = free_port()
  code = "from tests import test_replicas; test_replicas.restore({}, {})"
  started = [
    subprocess.Popen(
      [sys.executable, "-c", code.format(port, i)],
      cwd=ROOT,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0]
  ratios = json.loads(outputs[0].splitlines()[-1])
  assert len(ratios) == 4
  assert max(ratio for _, ratio in ratios) < 1.2, ratios


@pytest.mark.slow
def test_what_is_served_is_measured(capsys):
  restores.main(["1"])
  head, _, row = capsys.readouterr().out.splitlines()
  assert head.count("|") == row.count("|")
  count, *times = row.split("|")[1:-1]
  assert int(count) == 1
  assert all(1 <= float(each) < 1.2 for each in times)
