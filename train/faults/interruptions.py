"""What ends a run: kills, signals, full disks, the loss of a process."""

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.faults.jobs import EVERY, STEPS, Job
from train.faults.runs import FORK, LIMIT, Ended

# What changes a file, among Python's audit events.
_WRITES = {
  *("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
  *("os.symlink", "os.truncate"),
}


class Size(NamedTuple):
  """What an undisturbed run takes.

  Attributes:
    seconds: of time.
    writes: how often Python changes a file in the run's directory.
    largest: bytes of the largest file.
    total: bytes on the disk.
    files: files and folders.
  """

  seconds: float
  writes: int
  largest: int
  total: int
  files: int


class Interrupted(NamedTuple):
  """What was done to a run.

  Attributes:
    what: a phrase that says it.
    ends: how its processes ended.
    statuses: the exit statuses that are right.
  """

  what: str
  ends: Sequence[Ended]
  statuses: Set[int]


Interruption = Callable[[Job, Size, np.random.Generator], Interrupted]


def measure(job: Job) -> tuple[Size, Sequence[Ended]]:
  """Runs a job undisturbed."""
  writes: Any = FORK.Value("q", 0)

  def count() -> None:
    writes.value += 1

  start = time.monotonic()
  ends = job.run(prepare=lambda: _at_writes(job.workdir, count))
  seconds = time.monotonic() - start
  sizes = [path.lstat() for path in job.workdir.rglob("*")]
  return Size(
    seconds,
    writes.value,
    max(each.st_size for each in sizes),
    sum(each.st_blocks * 512 for each in sizes),
    len(sizes),
  ), ends


def kill(job: Job, size: Size, rng: np.random.Generator) -> Interrupted:
  """Kills a run at any time, up to three times."""
  return _kills(job, rng, lambda: rng.uniform(0, size.seconds))


def kill_in_save(job: Job, size: Size, rng: np.random.Generator) -> Interrupted:
  """Kills a run in a save, up to three times."""
  del size
  # A save takes about 30 ms.
  return _kills(job, rng, lambda: rng.uniform(0, 0.04), in_save=True)


def _kills(
  job: Job,
  rng: np.random.Generator,
  delay: Callable[[], float],
  in_save: bool = False,
) -> Interrupted:
  delays, ends = [], []
  steps = sorted(rng.integers(1, STEPS // EVERY + 1, rng.integers(1, 4)))
  for step in EVERY * np.array(steps):
    (run,) = job.start()
    if in_save:
      run.wait(LIMIT, functools.partial(job.is_saving, step))
    delays.append(delay())
    run.wait(delays[-1])
    run.send(signal.SIGKILL)
    ends.append(run.end())
  after = " and ".join(f"{each:.3f} s" for each in delays)
  saves = f" after the saves of {steps} began" if in_save else ""
  return Interrupted(f"killed {after}{saves}", ends, {-9, 0})


def kill_at_a_write(
  job: Job, size: Size, rng: np.random.Generator
) -> Interrupted:
  """Kills a run just before one of the changes it makes to its directory."""
  number = left = int(rng.integers(1, size.writes + 1))

  def count() -> None:
    nonlocal left
    left -= 1
    if left <= 0:
      os.kill(os.getpid(), signal.SIGKILL)

  ends = job.run(prepare=lambda: _at_writes(job.workdir, count))
  return Interrupted(
    f"killed before write {number} of {size.writes}", ends, {-9, 0}
  )


def _at_writes(folder: Path, called: Callable[[], None]) -> None:
  """Has a function called before each change of a file in a folder."""
  prefix = str(folder)

  def hook(event: str, args: Any) -> None:
    writes = event in _WRITES or (
      event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if writes and str(args[0]).startswith(prefix):
      called()

  sys.addaudithook(hook)


def terminate(job: Job, size: Size, rng: np.random.Generator) -> Interrupted:
  """Sends SIGTERM, sometimes twice."""
  return _signal(job, size, rng, signal.SIGTERM, {-signal.SIGTERM, 0})


def interrupt(job: Job, size: Size, rng: np.random.Generator) -> Interrupted:
  """Sends what Ctrl-C does, sometimes twice."""
  return _signal(job, size, rng, signal.SIGINT, {130, 0})


def _signal(
  job: Job,
  size: Size,
  rng: np.random.Generator,
  number: signal.Signals,
  statuses: Set[int],
) -> Interrupted:
  delays = [rng.uniform(0, size.seconds), rng.uniform(0, 0.1)]
  delays = delays[: rng.integers(1, 3)]
  (run,) = job.start()
  for delay in delays:
    run.wait(delay)
    run.send(number)
  after = " and ".join(f"{each:.3f} s" for each in delays)
  return Interrupted(f"{number.name} after {after}", [run.end()], statuses)


def limit_files(job: Job, size: Size, rng: np.random.Generator) -> Interrupted:
  """Limits the size of each file, as `ulimit -f` does."""
  limit = int(rng.integers(1, size.largest))
  ends = job.run(
    prepare=lambda: resource.setrlimit(
      resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)
    )
  )
  return Interrupted(f"files of {limit} bytes at most", ends, {2})


def fill_disk(job: Job, size: Size, rng: np.random.Generator) -> Interrupted:
  """Has a run on a disk that gets full, and then moves it to a larger one."""
  disk = (
    f"size={4096 * int(rng.integers(1, size.total // 4096))}"
    if rng.random() < 0.5
    else f"nr_inodes={int(rng.integers(2, size.files))}"
  )
  with tempfile.TemporaryDirectory() as copy:
    with _small_disk(job.workdir, disk):
      ends = job.run()
      shutil.copytree(job.workdir, copy, symlinks=True, dirs_exist_ok=True)
    shutil.copytree(copy, job.workdir, symlinks=True, dirs_exist_ok=True)
  return Interrupted(f"a disk of {disk}", ends, {2, 0})


def can_mount() -> bool:
  """Whether a small disk can be made here."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      with _small_disk(Path(folder), "size=4096"):
        return True
    except (OSError, subprocess.CalledProcessError):
      return False


@contextlib.contextmanager
def _small_disk(folder: Path, limit: str) -> Iterator[None]:
  """Mounts a disk with that option of tmpfs, of its bytes or of its files."""
  folder.mkdir(exist_ok=True)
  subprocess.run(
    ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)],
    check=True,
    capture_output=True,
  )
  try:
    yield
  finally:
    subprocess.run(["umount", str(folder)], check=True)


def lose_a_process(
  job: Job, size: Size, rng: np.random.Generator
) -> Interrupted:
  """Kills one of several processes."""
  runs = job.start()
  begun = [job.checkpoints, job.checkpoints / str(EVERY)][rng.integers(2)]
  runs[0].wait(LIMIT, begun.exists)
  delay = rng.uniform(0, size.seconds / 4)
  runs[0].wait(delay)
  lost = int(rng.integers(len(runs)))
  runs[lost].send(signal.SIGKILL)
  # The others have 20 seconds, and this machine may be slow.
  ends = [run.end(seconds=30) for run in runs]
  return Interrupted(
    f"process {lost} killed {delay:.3f} s after {begun.name} was there",
    ends,
    {-9, 75, 0},
  )
