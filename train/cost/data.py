r"""What text of any size costs: time to start, memory, and waiting for batches.

  python -m train.cost.data [MB ...]

trains the text job on folders of so many MB (10, 1000 and 50000 by default) and
prints a row for each. A folder is links to one file of at most 1 GB, so that
50 GB take 1 GB of the disk; links are read like files.

first start  s until the data is ready, when it has never been seen
start        s of every later start
memory       MB, the most that a process held
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
from train import prefetch
from train.job import make_job
from train.tables import format_table
from train.tasks import make_task

_WARM_UP = 5
_STEPS = 60
_FILES = 10
_LARGEST = 1_000_000_000


def main(arguments: list[str]) -> None:
  """Measures and prints the table."""
  if arguments[:1] == ["--of"]:
    print(json.dumps(_measure(arguments[1])))
    return
  rows = [
    ["MB", "first start", "start", "memory", "steps", "waiting", "in turn"]
  ]
  for size in [int(each) for each in arguments] or [10, 1000, 50_000]:
    with _folder(size * 1_000_000) as folder:
      first, later = _run(folder), _run(folder)
    rows.append(
      [
        str(size),
        f"{first['start']:.2f} s",
        f"{later['start']:.2f} s",
        f"{max(first['memory'], later['memory']):.0f}",
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
  library = pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")
  words = b"".join(path.read_bytes() for path in sorted(library))
  count = max(_FILES, -(-size // _LARGEST))
  with tempfile.TemporaryDirectory() as folder:
    first = pathlib.Path(folder, "0.py")
    with first.open("wb") as file:
      while left := size // count - file.tell():
        file.write(words[:left])
    for i in range(1, count):
      os.link(first, pathlib.Path(folder, f"{i}.py"))
    yield folder


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
      jax.block_until_ready(state)
      seconds = time.perf_counter() - begun
      found |= {name: waited / seconds, "steps": _STEPS / seconds}
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In bytes on macOS, in units of 1024 elsewhere.
  return found | {"memory": most / (1e6 if sys.platform == "darwin" else 976.6)}


if __name__ == "__main__":
  main(sys.argv[1:])
