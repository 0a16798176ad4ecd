r"""What text of any size costs: time to start, memory, and waiting for batches.

  python -m train.cost.data [--bucket] [MB ...]

trains the text job on folders of so many MB (10, 1000 and 50000 by default) and
prints a row for each. A folder is links to one file of at most 1 GB, so that
50 GB take 1 GB of the disk; links are read like files. With --bucket (10 and
1000 MB by default) it is files of 1 MB in an emulated bucket, which takes 50 ms
to answer.

first start  s until the data is ready, when it has never been seen
start        s of every later start
memory       MB, the most that a process held
batch        ms to load one
steps        a second
waiting      the share of the loop's time that it waits for batches
in turn      the same, if each batch were loaded when it is needed
"""

import contextlib
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator

import jax

from configs import text
from flax_mechanic.checkpoints import storage
from train import prefetch
from train.faults.bucket import NAME, emulator
from train.job import make_job
from train.tables import format_table
from train.tasks import make_task

_WARM_UP = 5
_STEPS = 60
_FILES = 10
_LARGEST = 1_000_000_000
# In a bucket: bytes of a file, and seconds that a request takes.
_SMALL, _DELAY = 1_000_000, 0.05


def main(arguments: list[str]) -> None:
  """Measures and prints the table."""
  if arguments[:1] == ["--of"]:
    print(json.dumps(_measure(arguments[1])))
    return
  in_bucket = "--bucket" in arguments
  sizes = [int(each) for each in arguments if each != "--bucket"]
  rows = [
    [
      *("MB", "first start", "start", "memory"),
      *("batch", "steps", "waiting", "in turn"),
    ]
  ]
  for size in sizes or ([10, 1000] if in_bucket else [10, 1000, 50_000]):
    with (_bucket if in_bucket else _folder)(size * 1_000_000) as folder:
      first, later = _run(folder), _run(folder)
    rows.append(
      [
        str(size),
        f"{first['start']:.2f} s",
        f"{later['start']:.2f} s",
        f"{max(first['memory'], later['memory']):.0f}",
        f"{1000 * later['batch']:.1f} ms",
        f"{later['steps']:.1f}",
        f"{later['waiting']:.2%}",
        f"{later['in turn']:.2%}",
      ]
    )
  print(format_table(rows))


def _run(folder: str) -> dict[str, float]:
  """Measures in a process of its own, whose memory nothing else has taken."""
  command = [sys.executable, "-m", "train.cost.data", "--of", folder]
  output = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(output.stdout.splitlines()[-1])


@contextlib.contextmanager
def _folder(size: int) -> Iterator[str]:
  """Yields a folder of the standard library's text, repeated to a size."""
  words = _words()
  count = max(_FILES, -(-size // _LARGEST))
  with tempfile.TemporaryDirectory() as folder:
    first = pathlib.Path(folder, "0.py")
    with first.open("wb") as file:
      while left := size // count - file.tell():
        file.write(words[:left])
    for i in range(1, count):
      os.link(first, pathlib.Path(folder, f"{i}.py"))
    yield folder


@contextlib.contextmanager
def _bucket(size: int) -> Iterator[str]:
  """Yields a folder of the same text in an emulated bucket."""
  words = _words()[:_SMALL]
  with (
    tempfile.TemporaryDirectory() as folder,
    emulator(pathlib.Path(folder)) as bucket,
  ):
    os.environ.update(bucket.environment)
    path = storage.path(f"gs://{NAME}/text")
    for i in range(size // _SMALL):
      (path / f"{i}.py").write_bytes(words)
    bucket.delay(_DELAY)
    yield str(path)


def _words() -> bytes:
  library = pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")
  return b"".join(path.read_bytes() for path in sorted(library))


def _measure(folder: str) -> dict[str, float]:
  config = text.get_config()
  config.data.path = folder
  config.mesh.data = 1
  begun = time.perf_counter()
  make_task(config)
  start = time.perf_counter() - begun
  job = make_job(config, jax.devices()[:1])
  found = {"start": start}
  with jax.set_mesh(job.mesh):
    state = job.create()
    steps = range(_WARM_UP + _STEPS)
    for name, batches in (
      ("in turn", map(job.train_batch, steps)),
      ("waiting", prefetch.ahead(job.train_batch, steps)),
    ):
      for batch in itertools.islice(batches, _WARM_UP):
        state, _ = job.train_step(state, batch)
      jax.block_until_ready(state)
      begun, waited = time.perf_counter(), 0.0
      for _ in range(_STEPS):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, _ = job.train_step(state, batch)
        # Or it would wait for batches while it need not wait for steps.
        jax.block_until_ready(state)
      seconds = time.perf_counter() - begun
      found |= {name: waited / seconds, "steps": _STEPS / seconds}
      found.setdefault("batch", waited / _STEPS)
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In bytes on macOS, in units of 1024 elsewhere.
  return found | {"memory": most / (1e6 if sys.platform == "darwin" else 976.6)}


if __name__ == "__main__":
  main(sys.argv[1:])
