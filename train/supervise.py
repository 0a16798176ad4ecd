r"""Runs a job of several processes on this machine and restarts it when needed.

  python -m train.supervise --processes=N --config=FILE --workdir=DIR [...]

--processes=N      how many; on a machine with GPUs, each takes one of them
--min_processes=M  a start that brings no new checkpoint is followed by one with
                   half as many processes, but no fewer than M; N by default
--max_restarts=K   ends after so many restarts in a row that bring no new
                   checkpoint; 3 by default

All other arguments are those of `python -m train.main`. When a process is lost,
the others are ended and all start again from the newest checkpoint. SIGTERM and
Ctrl-C save a checkpoint and end the job; a second one ends it at once. What
process 0 prints is shown, and the errors of another when it fails.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple, Self

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError
from train import flags
from train.command import failed
from train.lifeline import LOST
from train.processes import free_port

# How long the others have, in seconds, to end after one that has failed.
_GRACE = 20
_POLL = 0.05
_SET_PDEATHSIG = 1  # Of Linux's prctl.


class Ended(NamedTuple):
  """How the processes of a job ended.

  Attributes:
    statuses: the exit status of each, or minus the number of a signal.
    killed: process -> the signal, of those that ended by one before the others
      were ended too.
  """

  statuses: Sequence[int]
  killed: dict[int, int]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the job until it ends and returns its exit status.

  Args:
    argv: the arguments after the program's name; `sys.argv` if None.

  Returns:
    As `train.main`; 2 too if the job is lost again and again, and 128 plus the
    number of the signal that ended it before it could save.
  """
  arguments = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--processes", type=_count, required=True)
  parser.add_argument("--min_processes", type=_count)
  parser.add_argument("--max_restarts", type=int, default=3)
  own, job = parser.parse_known_args(arguments)
  try:
    parsed = flags.parse(job)
    if parsed.processes is not None:
      raise UsageError(
        "--coordinator, --num_processes and --process_id are what the "
        "supervisor gives to each process; leave them out"
      )
    least = min(own.min_processes or own.processes, own.processes)
    return _supervise(
      job,
      range(least, own.processes + 1),
      own.max_restarts,
      parsed.workdir / "checkpoints",
    )
  except Exception as error:
    return failed(error)


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} must be 1 or more")
  return int(text)


def _supervise(
  job: Sequence[str], counts: range, most: int, checkpoints: Any
) -> int:
  """Runs a job until it ends for good, and returns its exit status.

  Args:
    job: the arguments of `train.main`.
    counts: the numbers of processes that may run it.
    most: how many restarts in a row may bring no new checkpoint.
    checkpoints: the folder of the job's steps.

  Raises:
    UsageError: more restarts than that brought no new checkpoint.
  """
  count, in_vain = counts[-1], 0
  with _Signals() as signals:
    while True:
      before = _newest(checkpoints)
      ended = _run(job, count, signals)
      if not any(ended.statuses):
        return 0
      if signals.received:
        return 128 + signals.received[0]
      # A signal that is none of `killed` was the supervisor's.
      failures = {each for each in ended.statuses if each > 0} - {LOST}
      if failures and not ended.killed:
        return max(failures)
      step = _newest(checkpoints)
      in_vain = 0 if step > before else in_vain + 1
      why = _why(ended)
      if in_vain > most:
        raise UsageError(
          f"{why}, and {most} restarts in a row have brought no new checkpoint "
          f"in {checkpoints}; look for what ends it (is there too little "
          "memory?), or save more often with a smaller "
          "--config.checkpoint_every, and the same command resumes"
        )
      if in_vain:
        count = max(counts[0], count // 2)
      print(
        f"{why}; restarting with {count} processes, "
        + (f"from step {step}" if step else "from the start"),
        file=sys.stderr,
        flush=True,
      )


def _newest(checkpoints: Any) -> int:
  """Returns the last step that has been saved; 0 if there is none."""
  if not checkpoints.is_dir():
    return 0
  steps = [
    int(path.name)
    for path in checkpoints.iterdir()
    if path.name.isdecimal() and storage.is_complete(path)
  ]
  return max(steps, default=0)


def _why(ended: Ended) -> str:
  for process, number in ended.killed.items():
    return f"process {process} was ended by {signal.Signals(number).name}"
  return "a process was lost"


class _Signals:
  """SIGTERM and Ctrl-C, as they come; a context manager."""

  def __init__(self) -> None:
    self.received: list[int] = []
    self._previous = {}

  def __enter__(self) -> Self:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._previous[number] = signal.signal(
        number, lambda number, _: self.received.append(number)
      )
    return self

  def __exit__(self, *unused_exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def _run(job: Sequence[str], count: int, signals: _Signals) -> Ended:
  """Runs the processes of a job once, until all have ended."""
  with contextlib.ExitStack() as stack:
    errors = [
      stack.enter_context(tempfile.TemporaryFile()) for _ in range(count - 1)
    ]
    processes: list[subprocess.Popen[bytes]] = []
    stack.callback(_end, processes)
    for process in _start(job, count, errors):
      processes.append(process)
    ended = _wait(processes, signals)
    for i, file in enumerate(errors, start=1):
      status = ended.statuses[i]
      # What all say, process 0 has said.
      if status > 0 and status not in (LOST, ended.statuses[0]):
        file.seek(0)
        text = file.read().decode(errors="replace").rstrip()
        print(f"process {i}: {text}", file=sys.stderr, flush=True)
    return ended


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
  for process in processes:
    process.kill()
  for process in processes:
    process.wait()


def _start(
  job: Sequence[str], count: int, errors: Sequence[IO[bytes]]
) -> Iterator[subprocess.Popen[bytes]]:
  """Starts the processes of a job, which end with this one."""
  port = free_port()
  libc, parent = ctypes.CDLL(None), os.getpid()

  def end_with_parent() -> None:
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(LOST)

  for i in range(count):
    several = [
      f"--coordinator=localhost:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
    ]
    yield subprocess.Popen(
      [
        sys.executable,
        "-m",
        "train.main",
        *job,
        *(several if count > 1 else []),
      ],
      # Which GPUs it takes.
      env=({"JAX_LOCAL_DEVICE_IDS": str(i)} if count > 1 else {}) | os.environ,
      stdout=subprocess.DEVNULL if i else None,
      stderr=errors[i - 1] if i else None,
      # A terminal's Ctrl-C reaches the supervisor alone.
      process_group=0,
      preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def _wait(
  processes: Sequence[subprocess.Popen[bytes]], signals: _Signals
) -> Ended:
  """Waits for processes; ends the others soon after one that has failed."""
  killed: dict[int, int] = {}
  deadline = float("inf")
  told = False
  while True:
    statuses = [process.poll() for process in processes]
    if signals.received and not told:
      told = True
      for process in processes:
        process.terminate()
    killed |= {i: -s for i, s in enumerate(statuses) if s is not None and s < 0}
    if any(statuses):
      deadline = min(deadline, time.monotonic() + _GRACE)
    late = time.monotonic() > deadline
    if killed or late or len(signals.received) > 1:
      _end(processes)
      return Ended([process.wait() for process in processes], killed)
    if None not in statuses:
      return Ended([status or 0 for status in statuses], killed)
    time.sleep(_POLL)


if __name__ == "__main__":
  sys.exit(main())
