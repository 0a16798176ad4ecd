"""The lock that keeps a second run from writing the same directory."""

import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from flax_mechanic.errors import UsageError

try:
  import fcntl
except ImportError:  # Windows has none, and runs there are not locked.
  fcntl = None

# Seconds after which the lock of a run that was killed lapses in a bucket.
LEASE = 60.0


class Held(Protocol):
  """What one process holds."""

  def check(self) -> None:
    """Raises a UsageError if it is lost."""

  def release(self) -> None:
    """Lets another run have it."""


class Lockable(Protocol):
  """A directory that can be locked."""

  directory: str

  def create(self) -> None:
    """Creates it; raises an OSError if it cannot be written."""

  def hold(self) -> Held:
    """Holds it; raises a UsageError if another run does."""


class Lock:
  """Holds a directory for one run until `release`, or until the run ends."""

  def __init__(self, place: Lockable):
    """Locks a directory, creating it if need be.

    Of several processes all have to call it; either all succeed or all raise.

    Args:
      place: the directory.

    Raises:
      UsageError: it cannot be written, or another run holds it.
    """
    problem = None
    self._held: Held | None = None
    try:
      place.create()
      if jax.process_index() == 0:
        self._held = place.hold()
    except UsageError as error:
      problem = error
    except OSError as error:
      problem = UsageError(
        f"{place.directory} cannot be written: {error.strerror}; type "
        "--workdir=DIR with a directory that can be"
      )
    succeeded = multihost_utils.process_allgather(np.array(problem is None))
    if not np.all(succeeded):
      self.release()
      raise problem or UsageError(
        f"another process of this run cannot write {place.directory}; see its "
        "error"
      )

  def check(self) -> None:
    """Raises a UsageError if another run has taken the directory over."""
    if self._held is not None:
      self._held.check()

  def release(self) -> None:
    """Lets another run have the directory."""
    if self._held is not None:
      self._held.release()
      self._held = None


class Flock:
  """Holds a folder on a disk with flock.

  It is the folder itself that is locked, so that no file is left behind and the
  kernel lets go of it however the process ends.
  """

  def __init__(self, directory: str):
    """Locks a folder; does nothing where there are no locks.

    Raises:
      UsageError: another run holds it.
      OSError: it cannot be written.
    """
    self._descriptor: int | None = None
    if not os.access(directory, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if fcntl is None:
      return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      raise _held_by_another(directory) from None
    except OSError:
      pass  # A file system without locks.
    self._descriptor = descriptor

  def check(self) -> None:
    """Cannot be lost."""

  def release(self) -> None:
    """Lets another run have it."""
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None


class Lease:
  """Holds a directory in a bucket for as long as it is renewed.

  The lock is the newest of some numbered objects. Each is created only if it is
  absent, which a bucket does atomically: the holder renews its lease by
  creating the next number, and a run that finds a lapsed one takes over in the
  same way. Only one of them can succeed. A lease held by a process of this
  machine lapses as soon as that process ends.
  """

  def __init__(self, directory: str, files: Any):
    """Takes the lease, and waits where one of a run that was killed may lapse.

    Args:
      directory: the directory.
      files: its fsspec file system.

    Raises:
      UsageError: another run holds it.
    """
    self._directory, self._fs = directory, files
    self._folder = f"{directory}/.lock"
    self._owner = f"{_machine()} {os.getpid()} {secrets.token_hex(8)}"
    self._renewing = threading.Lock()
    self._problem: UsageError | None = None
    self._ended = threading.Event()
    lapsed = self._lapsed()
    self._number = max(lapsed, default=0)
    self._renewed = time.monotonic()
    if not self._advance(lapsed):
      raise _held_by_another(directory)
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises a UsageError if another run has taken the directory over."""
    if time.monotonic() - self._renewed > LEASE:
      self._renew()
    if self._problem is not None:
      raise self._problem

  def release(self) -> None:
    """Lets another run have it."""
    self._ended.set()
    self._thread.join()
    if self._problem is None:
      with contextlib.suppress(Exception):
        self._fs.rm_file(self._object(self._number))

  def _lapsed(self) -> set[int]:
    """Returns the numbers of the objects that hold nothing any more."""
    found = self._objects()
    if not found:
      return found
    if self._was_killed(max(found)):
      return found
    left = LEASE - self._age(max(found))
    if left > 0:
      logging.warning(
        "%s is locked by a run that was alive %.0f seconds ago; waiting %.0f "
        "seconds for its lock to lapse, in case it was killed",
        self._directory,
        LEASE - left,
        left,
      )
    deadline = time.monotonic() + left
    while (now := time.monotonic()) < deadline:
      time.sleep(min(1.0, deadline - now))
      newer = self._objects()
      if not newer:
        return newer
      if newer - found:
        raise _held_by_another(self._directory)
    return found

  def _was_killed(self, number: int) -> bool:
    """Whether an object is of a process of this machine that has ended."""
    try:
      owner = self._fs.cat_file(self._object(number)).decode()
    except FileNotFoundError:  # It has been renewed, or released.
      return False
    if not owner.startswith(f"{_machine()} "):
      return False
    try:
      os.kill(int(owner.split()[1]), 0)  # Only asks whether it is there.
    except ProcessLookupError:
      return True
    except PermissionError:  # It is another user's.
      pass
    return False

  def _age(self, number: int) -> float:
    """Returns how old an object is, by the bucket's own clock."""
    probe = f"{self._folder}/now_{secrets.token_hex(8)}"
    self._fs.pipe_file(probe, b"")
    try:
      age = self._fs.modified(probe) - self._fs.modified(self._object(number))
    except FileNotFoundError:  # It has been renewed, or released.
      return 0.0
    finally:
      self._remove(probe)
    return age.total_seconds()

  def _advance(self, lapsed: Collection[int] = ()) -> bool:
    """Creates the next object, and says whether no other run has one."""
    known = {self._number, *lapsed}
    new, start = self._number + 1, time.monotonic()
    try:
      self._fs.pipe_file(self._object(new), self._owner.encode(), mode="create")
    except FileExistsError:
      # A request that was repeated may have succeeded at first.
      if self._fs.cat_file(self._object(new)) != self._owner.encode():
        return False
    if self._objects() - known - {new}:
      self._remove(self._object(new))
      return False
    for number in known:
      self._remove(self._object(number))
    self._number, self._renewed = new, start
    return True

  def _renew(self) -> None:
    with self._renewing:
      try:
        if self._problem is None and not self._advance():
          self._problem = UsageError(
            f"another run has taken over {self._directory}, which this one did "
            f"not hold on to for {LEASE:.0f} seconds; let that run go on, or "
            "stop it and give the same command again"
          )
      except Exception as error:  # Whatever a bucket's client raises.
        if time.monotonic() - self._renewed > LEASE:
          logging.warning("%s: its lock: %s", self._directory, error)

  def _keep(self) -> None:
    while not self._ended.wait(LEASE / 4):
      self._renew()

  def _objects(self) -> set[int]:
    """Returns the numbers of the objects."""
    try:
      found = self._fs.ls(self._folder, detail=False, refresh=True)
    except FileNotFoundError:
      return set()
    names = [each.rpartition("/")[2] for each in found]
    return {int(name) for name in names if name.isdecimal()}

  def _remove(self, name: str) -> None:
    # It may be gone: a request is repeated where its answer was lost.
    with contextlib.suppress(FileNotFoundError):
      self._fs.rm_file(name)

  def _object(self, number: int) -> str:
    return f"{self._folder}/{number:012d}"


def _machine() -> str:
  """Returns what tells a machine, or a container, from every other."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
  except OSError:  # It has no /proc, and no process is known to have ended.
    return secrets.token_hex(8)


def _held_by_another(directory: str) -> UsageError:
  return UsageError(
    f"another run is writing {directory}; stop it, or take another --workdir"
  )
