"""Jobs in forked processes, which need not import anything."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from train import inspect, main, stop

FORK = multiprocessing.get_context("fork")
# How long a run may take, in seconds; undisturbed it takes two.
LIMIT = 90.0
# Has a run that hangs print where.
_WHERE = signal.SIGUSR1


class Ended(NamedTuple):
  """How a run ended.

  Attributes:
    status: the exit status, or minus the number of a signal; None if the run
      did not end and had to be killed.
    output: what it printed.
    error: what it printed to standard error.
  """

  status: int | None
  output: str
  error: str


class Run:
  """A command of `train` in a process of its own."""

  def __init__(
    self,
    arguments: Sequence[str],
    prepare: Callable[[], object] = lambda: None,
    command: Callable[[Sequence[str]], int] = main.main,
  ):
    """Starts it.

    Args:
      arguments: the command line.
      prepare: what the process does first.
      command: what it does then.
    """
    pipes = [os.pipe(), os.pipe()]
    self._texts = [b"", b""]
    self._ends = [read for read, _ in pipes]
    self._process = FORK.Process(
      target=_work, args=(command, arguments, prepare, pipes)
    )
    self._process.start()
    for read, write in pipes:
      os.close(write)
      os.set_blocking(read, False)

  def wait(
    self, seconds: float, until: Callable[[], bool] = lambda: False
  ) -> bool:
    """Waits until it ends, or something is true, and says whether it runs."""
    deadline = time.monotonic() + seconds
    while self._process.is_alive():
      self._read()
      if until() or time.monotonic() > deadline:
        return True
      self._process.join(0.002)
    return False

  def send(self, number: int) -> None:
    """Sends a signal, unless it has ended."""
    if self._process.is_alive() and self._process.pid:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._process.pid, number)

  def end(self, seconds: float = LIMIT) -> Ended:
    """Waits until it ends, and kills it if that takes too long."""
    hangs = self.wait(seconds)
    if hangs:
      self.send(_WHERE)
      self.wait(1.0)
      self._process.kill()
    self._process.join()
    self._read()
    for end in self._ends:
      os.close(end)
    status = None if hangs else self._process.exitcode
    return Ended(
      status, *(text.decode(errors="replace") for text in self._texts)
    )

  def _read(self) -> None:
    for i, end in enumerate(self._ends):
      with contextlib.suppress(BlockingIOError):
        while data := os.read(end, 2**16):
          self._texts[i] += data


def verify(workdir: str | os.PathLike[str]) -> Ended:
  """Verifies every step of a run."""
  return Run([str(workdir)], command=inspect.main).end()


def _work(
  command: Callable[[Sequence[str]], int],
  arguments: Sequence[str],
  prepare: Callable[[], object],
  pipes: Sequence[tuple[int, int]],
) -> None:
  for descriptor, (_, write) in enumerate(pipes, start=1):
    os.dup2(write, descriptor)
  sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
  faulthandler.register(_WHERE)
  signal.signal(signal.SIGINT, stop)
  prepare()
  sys.exit(command(arguments))
