"""Writes a run's files, in a folder or in a bucket."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError

# Seconds after which what is logged is in the bucket.
INTERVAL = 30.0


def write(path: Any, data: bytes) -> None:
  """Creates or replaces a file, atomically.

  A link in its place is replaced and not followed: a run's folder may be
  somebody else's, and its links may point anywhere.

  Args:
    path: of `storage.path`.
    data: the whole content.

  Raises:
    UsageError: it cannot be written.
  """
  if storage.is_bucket(path):
    with _writing(path):
      storage.file_system(path).pipe_file(str(path), data)
    return
  new = path.with_name(path.name + ".new")
  try:
    new.unlink(missing_ok=True)
    with new.open("xb") as file:
      file.write(data)
    new.replace(path)
  except OSError as error:
    raise UsageError(
      f"{path} cannot be written ({error.strerror}); make room, or move what "
      "is in its place, and give the same command again"
    ) from error


class Log(Protocol):
  """A file that grows."""

  def read(self) -> bytes | None:
    """Returns all of it, or None if there is none."""

  def start(self, data: bytes) -> None:
    """Replaces what there is by some beginning, atomically."""

  def write(self, data: bytes) -> None:
    """Appends."""

  def flush(self) -> None:
    """Returns once nothing that was written can be lost."""

  def close(self) -> None:
    """Flushes; nothing can be written any more."""


def log(path: Any) -> Log:
  """Returns a file that grows, in a folder or in a bucket."""
  return Segments(path) if storage.is_bucket(path) else File(path)


class File:
  """A file to append to, without a buffer that could fail when it is closed."""

  def __init__(self, path: Path):
    """Names it; nothing is read or written."""
    self._path = path
    self._file: Any = None

  def read(self) -> bytes | None:
    """Returns all of it, or None if there is none."""
    return self._path.read_bytes() if self._path.is_file() else None

  def start(self, data: bytes) -> None:
    """Replaces what there is by some beginning, atomically."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    write(self._path, data)
    self._file = self._path.open("ab", buffering=0)

  def write(self, data: bytes) -> None:
    """Writes all of it, or raises an OSError that names the file."""
    if self._file is None:
      self._file = self._path.open("ab", buffering=0)
    try:
      while data:
        data = data[self._file.write(data) :]
    except OSError as error:
      error.filename = str(self._path)
      raise

  def flush(self) -> None:
    """Does nothing: there is no buffer."""

  def close(self) -> None:
    """Closes it."""
    if self._file is not None:
      self._file.close()


class Segments:
  """A file that grows in a bucket, where nothing can be appended to.

  It is the objects PATH.RUN-NUMBER of the newest run, in their order. A resumed
  run is the next one, and its first object begins with what it keeps of the one
  before. An object is written at most every `INTERVAL` seconds.
  """

  def __init__(self, path: Any):
    """Names it; nothing is read or written."""
    self._path = path
    self._fs = storage.file_system(path)
    self._run, self._number = 0, 0
    self._buffer = b""
    self._problem: Exception | None = None
    self._lock = threading.Lock()
    self._closed = threading.Event()
    self._thread: threading.Thread | None = None

  def read(self) -> bytes | None:
    """Returns all of it, or None if there is none."""
    runs = self._runs()
    if not runs:
      return None
    with _reading(self._path):
      names = runs[max(runs)]
      parts = self._fs.cat(names, on_error="raise")
    if isinstance(parts, bytes):
      return parts
    by_name = {name.rpartition("/")[2]: part for name, part in parts.items()}
    return b"".join(by_name[name.rpartition("/")[2]] for name in names)

  def start(self, data: bytes) -> None:
    """Replaces what there is by some beginning, atomically."""
    earlier = self._runs()
    self._run, self._number = max(earlier, default=0) + 1, 0
    if data or earlier:
      self._put(data)
    with _writing(self._path):
      for name in (each for run in earlier.values() for each in run):
        with contextlib.suppress(FileNotFoundError):  # A repeated request.
          self._fs.rm_file(name)

  def write(self, data: bytes) -> None:
    """Appends, and raises what went wrong before."""
    if self._problem is not None:
      raise self._problem
    if not self._run:
      self.start(self.read() or b"")
    with self._lock:
      self._buffer += data
    if self._thread is None:
      self._thread = threading.Thread(target=self._keep, daemon=True)
      self._thread.start()

  def flush(self) -> None:
    """Returns once nothing that was written can be lost."""
    with self._lock:
      if self._buffer:
        self._put(self._buffer)
        self._buffer = b""

  def close(self) -> None:
    """Flushes; nothing can be written any more."""
    self._closed.set()
    self.flush()

  def _keep(self) -> None:
    while not self._closed.wait(INTERVAL):
      try:
        self.flush()
      except Exception as error:  # Whatever a bucket's client raises.
        self._problem = error
        return

  def _put(self, data: bytes) -> None:
    name = f"{self._path}.{self._run:04d}-{self._number:06d}"
    with _writing(self._path):
      self._fs.pipe_file(name, data)
    self._number += 1

  def _runs(self) -> dict[int, list[str]]:
    """Returns the names of the objects of each run, in their order."""
    with _reading(self._path):
      try:
        found = self._fs.ls(str(self._path.parent), detail=False)
      except FileNotFoundError:
        return {}
    start = re.escape(self._path.name)
    runs: dict[int, list[str]] = {}
    for name in sorted(found):
      if match := re.search(rf"/{start}\.(\d{{4,}})-\d{{6,}}$", name):
        runs.setdefault(int(match[1]), []).append(name)
    return runs


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
  try:
    yield
  except FileNotFoundError:
    raise
  except Exception as error:
    raise storage.failure(path, "cannot be read", error) from error


@contextlib.contextmanager
def _writing(path: Any) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    raise storage.failure(path, "cannot be written", error) from error
