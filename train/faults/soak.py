r"""Kills processes of a supervised job, again and again, and compares.

  python -m train.faults.soak [--processes=8] [--kills=20] [--steps=400]
      [--seed=0] [--folder=DIR] [--bucket] [--failing=SHARE]

A small job of that many processes, of one CPU device each, runs under
`train.supervise`: once undisturbed, and once with a random process killed at
random instants, in the start, between steps and in saves. The command prints a
line for each kill, what the supervisor says, and the last lines of both runs.
The exit status is 1 unless the metrics and the checksums of the last checkpoint
are the same. It needs Linux.

--steps=N        of the job; more of them if it ends before the last kill
--folder=DIR     where the runs are and stay; a temporary one by default
--bucket         the runs are in an emulated bucket, in DIR
--failing=SHARE  of the requests to the bucket of the run that is killed, half
                 of them after they were carried out; 0 by default
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from train.faults.bucket import emulator
from train.faults.jobs import Job

_TEXT = (
  "configs/digits.py optimizer=mechanic model.widths=(16,) batch_size=32 "
  "checkpoint_every=10 eval_every=100"
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs both and returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=int, default=8)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=Path)
  parser.add_argument("--bucket", action="store_true")
  parser.add_argument("--failing", type=float, default=0.0)
  arguments = parser.parse_args(argv)
  if arguments.failing and not arguments.bucket:
    parser.error("--failing needs --bucket")
  with contextlib.ExitStack() as stack:
    folder = arguments.folder or Path(
      stack.enter_context(tempfile.TemporaryDirectory())
    )
    bucket = (
      stack.enter_context(emulator(folder / "bucket"))
      if arguments.bucket
      else None
    )
    root = bucket.folder if bucket else None
    undisturbed, killed = (
      Job(
        _TEXT,
        arguments.processes,
        (root or folder) / name,
        root,
        steps=arguments.steps,
      )
      for name in ("undisturbed", "killed")
    )
    if bucket:
      os.environ.update(bucket.environment)
    start = time.monotonic()
    with _supervised(undisturbed, folder, 0) as supervisor:
      _wait_for_steps(undisturbed, supervisor)
      first = time.monotonic() - start
      status = supervisor.wait()
    seconds = time.monotonic() - start
    print(
      f"undisturbed: exit status {status} after {seconds:.0f} s, the first "
      f"metrics after {first:.0f} s",
      flush=True,
    )
    if bucket:
      bucket.fail(arguments.failing)
    done = _kill(killed, folder, arguments.kills, first, arguments.seed)
    for job in (undisturbed, killed):
      print(f"{job.workdir.name}:")
      for text in (_output(job, folder).read_text(), job.metrics()):
        print(f"  {text.splitlines()[-1]}")
    same = False
    with contextlib.suppress(OSError, ValueError):  # One has not ended well.
      same = undisturbed.numbers() == killed.numbers()
    print(
      "the metrics and the checksums of the last checkpoint are "
      + ("the same" if same else "not the same")
    )
    if done < arguments.kills:
      print(f"the job ended after {done} kills; type a larger --steps")
  return 0 if same and done == arguments.kills else 1


@contextlib.contextmanager
def _supervised(
  job: Job, folder: Path, restarts: int
) -> Iterator[subprocess.Popen[bytes]]:
  """Starts a job under the supervisor; its output goes to a file."""
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
  folder.mkdir(parents=True, exist_ok=True)
  with open(_output(job, folder), "wb") as output:
    supervisor = subprocess.Popen(
      [
        *(sys.executable, "-m", "train.supervise"),
        f"--processes={job.processes}",
        f"--max_restarts={restarts}",
        *job.arguments(),
      ],
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      },
      stdout=output,
    )
  try:
    yield supervisor
  finally:
    supervisor.kill()
    supervisor.wait()


def _output(job: Job, folder: Path) -> Path:
  return folder / f"{job.workdir.name}.out"


def _kill(job: Job, folder: Path, kills: int, first: float, seed: int) -> int:
  """Runs a job and kills its processes; returns how many were killed.

  Args:
    job: the job.
    folder: for the compilation cache.
    kills: how many.
    first: the seconds that a start takes until there are metrics.
    seed: of what is drawn.
  """
  rng = np.random.default_rng(seed)
  start = time.monotonic()
  done = 0
  with _supervised(job, folder, kills) as supervisor:
    while done < kills:
      delay = rng.uniform(0, 1.5 * first)
      with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(delay)
        break
      processes = _children(supervisor.pid)
      if not processes:
        continue
      number = int(rng.integers(len(processes)))
      with contextlib.suppress(ProcessLookupError):
        os.kill(processes[number], signal.SIGKILL)
        done += 1
        print(
          f"{time.monotonic() - start:6.0f} s: kill {done}, process {number}, "
          f"{_step(job)} steps done",
          flush=True,
        )
    status = supervisor.wait()
  print(
    f"killed {done} times: exit status {status} after "
    f"{time.monotonic() - start:.0f} s",
    flush=True,
  )
  return done


def _children(pid: int) -> Sequence[int]:
  text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
  return sorted(int(word) for word in text.split())


def _wait_for_steps(job: Job, supervisor: subprocess.Popen[bytes]) -> None:
  while not _step(job) and supervisor.poll() is None:
    time.sleep(0.1)


def _step(job: Job) -> int:
  """Returns how many lines of metrics there are, of a step each."""
  with contextlib.suppress(FileNotFoundError):
    return job.metrics().count("\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
