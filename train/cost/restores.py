r"""What a restore reads of a checkpoint, on any number of processes.

  python -m train.cost.restores [PROCESSES ...]

saves states like the text job's into an emulated bucket, restores them on 1, 2,
4 and 8 processes (by default) of two devices each, and prints how many times
the bytes of the checkpoint the bucket has served to all of them together. Every
restored bit is compared with what was saved.

data          each device holds all parameters
fsdp in data  each process holds all, split over its devices
ZeRO-1        each device holds all parameters, and a part of the state
from one      as fsdp in data, from a checkpoint that one device has saved
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import flax_mechanic
from configs import text
from flax_mechanic.checkpoints import storage
from train.faults import bucket
from train.job import make_job
from train.processes import free_port
from train.tables import format_table

_DEVICES = 2
# One layer, with arrays of up to 3 MB.
_JOB = {
  "optimizer": "mechanic",
  "model.num_layers": 1,
  "model.embed_dim": 512,
  "model.mlp_dim": 1536,
}
_FROM_ONE = "from one"
# Column -> the fields that differ from the job's.
_LAYOUTS = {
  "data": {},
  "fsdp in data": {"mesh.fsdp": _DEVICES},
  "ZeRO-1": {"shard_optimizer_state": True},
  _FROM_ONE: {"mesh.fsdp": _DEVICES},
}


def main(arguments: list[str]) -> None:
  """Measures and prints the table."""
  if arguments[:1] == ["--of"]:
    _measure(*map(int, arguments[1:]))
    return
  with (
    tempfile.TemporaryDirectory() as folder,
    bucket.emulator(Path(folder)) as server,
  ):
    _run(server, 1, devices=1)
    rows = [
      [str(count), *(f"{times:.2f}" for times in _run(server, count).values())]
      for count in [int(each) for each in arguments] or [1, 2, 4, 8]
    ]
  print(format_table([["processes", *_LAYOUTS], *rows]))


def _run(
  server: bucket.Bucket, count: int, devices: int = _DEVICES
) -> Mapping[str, float]:
  """Returns what so many processes have measured."""
  port = free_port()
  started = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "train.cost.restores"),
        *("--of", str(port), str(count), str(i)),
      ],
      env=os.environ
      | server.environment
      | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  outputs = [process.communicate()[0] for process in started]
  if any(process.returncode for process in started):
    sys.exit(1)
  return json.loads(outputs[0].splitlines()[-1])


def _measure(port: int, count: int, i: int) -> None:
  """Restores as process i of so many; the first one prints what was served."""
  jax.distributed.initialize(f"localhost:{port}", count, i)
  alone = jax.device_count() == 1
  found = {}
  for name, fields in ({_FROM_ONE: {}} if alone else _LAYOUTS).items():
    config = text.get_config()
    config.update_from_flattened_dict(_JOB | fields)
    target = make_job(config).target
    state = _random(target)
    folder = f"gs://{bucket.NAME}/{'' if name == _FROM_ONE else count}/{name}"
    if alone or name != _FROM_ONE:
      with flax_mechanic.Checkpointer(folder) as checkpointer:
        checkpointer.save(1, state)
    if not alone:
      found[name] = _restore(folder, target, state)
  if i == 0:
    print(json.dumps(found))


def _random(target: Any) -> Any:
  """Returns a state of random bits, the same on any number of processes."""
  generator = np.random.default_rng(0)

  def fill(leaf):
    size = leaf.size * leaf.dtype.itemsize
    whole = generator.integers(0, 256, size, np.uint8).view(leaf.dtype)
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, whole.reshape(leaf.shape).__getitem__
    )

  return jax.tree.map(fill, target)


def _restore(folder: str, target: Any, state: Any) -> float:
  """Returns how many times the checkpoint's bytes a restore of it reads."""
  server = bucket.Bucket(Path(), os.environ["STORAGE_EMULATOR_HOST"])
  step = storage.path(folder) / "1"
  stored = sum(size for _, size in storage.files(step))
  with flax_mechanic.Checkpointer(folder, read_only=True) as checkpointer:
    multihost_utils.sync_global_devices("all others are done")
    server.served()
    multihost_utils.sync_global_devices("what is served is counted")
    restored = checkpointer.restore(target).state
    multihost_utils.sync_global_devices("all have restored it")
    served = server.served() if jax.process_index() == 0 else 0
  for saved, found in zip(
    *map(jax.tree.leaves, (state, restored)), strict=True
  ):
    for one, other in zip(
      saved.addressable_shards, found.addressable_shards, strict=True
    ):
      assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()
  return served / stored


if __name__ == "__main__":
  main(sys.argv[1:])
