"""The lock that keeps a second run from writing the same directory."""

import errno
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mechanic.errors import UsageError

try:
  import fcntl
except ImportError:  # Windows has none, and runs there are not locked.
  fcntl = None


class Lock:
  """Holds a directory for one run until `release`, or until the run ends.

  The first process locks the directory itself with flock, so that no file is
  left behind and the kernel lets go of it however the process ends.
  """

  def __init__(self, directory: str):
    """Locks a directory, creating it if need be.

    Of several processes all have to call it; either all succeed or all raise.

    Args:
      directory: the directory.

    Raises:
      UsageError: it cannot be written, or another run holds it.
    """
    problem = None
    self._descriptor: int | None = None
    try:
      os.makedirs(directory, exist_ok=True)
      if jax.process_index() == 0:
        self._descriptor = _lock(directory)
    except UsageError as error:
      problem = error
    except OSError as error:
      problem = UsageError(
        f"{directory} cannot be written: {error.strerror}; type --workdir=DIR "
        "with a directory that can be"
      )
    succeeded = multihost_utils.process_allgather(np.array(problem is None))
    if not np.all(succeeded):
      self.release()
      raise problem or UsageError(
        f"another process of this run cannot write {directory}; see its error"
      )

  def release(self) -> None:
    """Lets another run have the directory."""
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None


def _lock(directory: str) -> int | None:
  """Returns the descriptor that holds a directory; None without locks."""
  if not os.access(directory, os.W_OK):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  if fcntl is None:
    return None
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise UsageError(
      f"another run is writing {directory}; stop it, or take another --workdir"
    ) from None
  except OSError:
    pass  # A file system without locks.
  return descriptor
