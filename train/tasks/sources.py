"""Files below a folder, on a disk or in a bucket, which are read by ranges."""

import errno
import functools
import io
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from flax_mechanic.checkpoints import storage

# How many files a folder keeps open.
_OPEN = 128


class Range(NamedTuple):
  """Some bytes of a file.

  Attributes:
    file: its path below the folder, with slashes.
    start: the first byte.
    count: how many.
  """

  file: str
  start: int
  count: int


class Source(Protocol):
  """A folder of files."""

  def files(
    self, skip: Collection[str], cannot: Callable[[OSError], object]
  ) -> Iterator[tuple[str, list[int]]]:
    """Yields the path of each file, its size, and a number for its version.

    Hidden files and folders are ignored.

    Args:
      skip: names of folders that are ignored as well.
      cannot: is called for what cannot be read.

    Raises:
      UsageError: it is in a bucket that cannot be used.
    """

  def read(self, ranges: Sequence[Range]) -> Sequence[bytes]:
    """Returns those bytes, or fewer where a file has no more.

    Raises:
      OSError: a file cannot be read; its name is `filename`.
      UsageError: it is in a bucket that cannot be used.
    """


def source(folder: Any) -> Source:
  """Returns the files below a folder; `folder` is of `storage.path`."""
  return (Bucket if storage.is_bucket(folder) else Folder)(folder)


class Folder:
  """A folder on a disk.

  Files are read and not mapped: a page that is mapped counts as this process's
  memory, and a file that shrinks under a mapping kills the process.
  """

  def __init__(self, path: pathlib.Path):
    """Names it."""
    self._path = path
    self._opened = functools.lru_cache(_OPEN)(self._open)

  def files(
    self, skip: Collection[str], cannot: Callable[[OSError], object]
  ) -> Iterator[tuple[str, list[int]]]:
    """Yields paths, and sizes with times of change."""
    for root, folders, names in os.walk(self._path, onerror=cannot):
      folders[:] = [
        name for name in folders if name not in skip and name[0] != "."
      ]
      for name in names:
        path = pathlib.Path(root, name)
        # Also no pipe, and no broken link.
        if name[0] == "." or not path.is_file():
          continue
        try:
          status = path.stat()
        except OSError as error:
          cannot(error)
          continue
        relative = path.relative_to(self._path).as_posix()
        yield relative, [status.st_size, status.st_mtime_ns]

  def read(self, ranges: Sequence[Range]) -> Sequence[bytes]:
    """Returns those bytes, one after the other."""
    return [self._read(*each) for each in ranges]

  def _read(self, file: str, start: int, count: int) -> bytes:
    try:
      opened = self._opened(file)  # It stays open while this is here.
      return os.pread(opened.fileno(), count, start)
    except OSError as error:
      error.filename = str(self._path / file)
      raise

  def _open(self, file: str) -> io.FileIO:
    return open(self._path / file, "rb", buffering=0)


class Bucket:
  """A folder in a bucket, of which ranges are read all at the same time."""

  def __init__(self, path: Any):
    """Names it."""
    self._path = str(path)
    self._fs = storage.file_system(path)

  def files(
    self, skip: Collection[str], cannot: Callable[[OSError], object]
  ) -> Iterator[tuple[str, list[int]]]:
    """Yields paths, and sizes with a hash of what the bucket says of them."""
    from fsspec.utils import tokenize

    del cannot
    try:
      found = self._fs.find(self._path, detail=True)
    except Exception as error:  # Whatever a bucket's client raises.
      raise storage.failure(
        f"config.data.path={self._path}", "cannot be read", error
      ) from error
    start = self._path.partition("://")[2] + "/"
    for name, info in found.items():
      relative = name.removeprefix(start)
      *folders, file = relative.split("/")
      hidden = any(part.startswith(".") for part in (*folders, file))
      if not hidden and {*folders}.isdisjoint(skip):
        yield relative, [info["size"], int(tokenize(info), 16)]

  def read(self, ranges: Sequence[Range]) -> Sequence[bytes]:
    """Returns those bytes, after about the time that one of them takes."""
    names = [f"{self._path}/{each.file}" for each in ranges]
    found = self._fs.cat_ranges(
      names,
      [each.start for each in ranges],
      [each.start + each.count for each in ranges],
    )
    for name, data in zip(names, found, strict=True):
      if isinstance(data, FileNotFoundError):
        missing = errno.ENOENT
        raise FileNotFoundError(missing, os.strerror(missing), name) from data
      if isinstance(data, Exception):
        raise storage.failure(name, "cannot be read", data) from data
    return found
