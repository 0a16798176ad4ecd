"""Several processes, one job: they connect, agree and stop together."""

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any, Self, TextIO

import jax
import numpy as np
from jax._src import distributed  # It has no public name.
from jax.experimental import multihost_utils

from flax_mechanic.errors import UsageError
from train import files
from train.flags import Processes
from train.lifeline import LOST, Lifeline, delay_abort

# How long to wait for the other processes, in seconds: less than jax's five
# minutes, after which it aborts.
_PATIENCE = 280


def free_port() -> int:
  """Returns a port of this machine that nothing listens to."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def connect(
  given: Processes | None,
) -> contextlib.AbstractContextManager[object]:
  """Connects to the job's other processes; call it before using a device.

  Args:
    given: this process's place. If None, jax reads it from the environment: a
      TPU pod, GKE, SLURM or Open MPI. A process that is alone there stays
      alone.

  Returns:
    A context in which this process ends when another one is lost.

  Raises:
    UsageError: the environment describes the processes incompletely.
  """
  alone = threading.Timer(_PATIENCE, _give_up)
  alone.daemon = True
  alone.start()
  try:
    _initialize(given)
  finally:
    alone.cancel()
  if jax.process_count() == 1:
    return contextlib.nullcontext()
  delay_abort()
  return Lifeline(distributed.global_state)


def _give_up() -> None:
  print(
    f"error: the job's other processes did not come in {_PATIENCE} seconds; "
    "start all of them, with the same command",
    file=sys.stderr,
    flush=True,
  )
  os._exit(LOST)


def _initialize(given: Processes | None) -> None:
  if given is not None:
    jax.distributed.initialize(*given)
    return
  # jax would leave such a process only one of its GPUs.
  if "1" in (
    os.environ.get(v) for v in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
  ):
    return
  try:
    jax.distributed.initialize()
  except RuntimeError as error:
    if "before any JAX calls" not in str(error):
      raise
    # In a notebook, for example: it is too late, and there is no need.
  except ValueError as error:
    if "coordinator_address" in str(error):
      return  # No cluster.
    raise UsageError(
      f"the environment describes the other processes incompletely ({error}); "
      "type --coordinator=HOST:PORT --num_processes=N --process_id=I"
    ) from None


def terminal() -> TextIO:
  """Returns where to print: standard output in the first process alone."""
  return sys.stdout if jax.process_index() == 0 else open(os.devnull, "w")


def check_agreement(config: str, workdir: Any) -> None:
  """Checks that every process runs the same job in the same directory.

  Args:
    config: the config as text.
    workdir: the job's directory.

  Raises:
    UsageError: they do not; every process raises it.
  """
  if jax.process_count() == 1:
    return
  word = np.frombuffer(config.encode(), np.uint8)
  token, length = multihost_utils.broadcast_one_to_all(
    np.array([secrets.randbits(31), len(word)], np.int32)
  )
  first = multihost_utils.broadcast_one_to_all(np.resize(word, length))
  same = len(word) == length and np.array_equal(first, word)
  _check_all(
    same,
    "has another config than process 0; give every process the same command",
  )
  path = workdir / f".process_0_{token}"
  if jax.process_index() == 0:
    files.write(path, b"")
  multihost_utils.sync_global_devices("the file is there")
  seen = path.exists()
  multihost_utils.sync_global_devices("the file has been looked for")
  if jax.process_index() == 0:
    path.unlink(missing_ok=True)  # A request to a bucket may be repeated.
  _check_all(
    seen,
    f"does not see what process 0 writes to --workdir={workdir}; give a "
    "directory that all processes share",
  )


def _check_all(fine: bool, sentence: str) -> None:
  votes = np.ravel(multihost_utils.process_allgather(np.array(fine)))
  if not votes.all():
    raise UsageError(f"process {int(votes.argmin())} {sentence}")


class Stop:
  """A request to stop, by SIGTERM or Ctrl-C to any process, that all agree on.

  A context manager: within it the first signal is a request, and a second one
  ends the process at once.
  """

  def __init__(self) -> None:
    self._wished = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      # With several processes, jax handles SIGTERM and tells the others. A
      # process that a shell started in the background ignores Ctrl-C.
      alone = jax.process_count() == 1
      for number in [signal.SIGINT, signal.SIGTERM][: 1 + alone]:
        if signal.getsignal(number) != signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._wish)
    return self

  def __exit__(self, *unused_exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def agreed(self, step: int) -> bool:
    """Whether to stop after this step; every process must ask at every step."""
    if jax.process_count() == 1:
      return self._wished
    return multihost_utils.reached_preemption_sync_point(step)

  def _wish(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._wished = True
    signal.signal(number, self._previous[number])
    if jax.process_count() > 1:
      signal.raise_signal(signal.SIGTERM)
