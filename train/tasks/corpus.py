"""A folder of text of any size: found once, read where it is asked for."""

import codecs
import functools
import hashlib
import io
import json
import os
import pathlib
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from flax_mechanic.errors import UsageError

# Which files are text, by path relative to the folder: [size, mtime, is text].
Index = dict[str, list[int]]

_INDEX = ".flax_mechanic_corpus.json"
# An index is kept where finding the text takes more than a moment, in bytes.
_WORTH_AN_INDEX = 64_000_000
_CHUNK = 2**20
# How many files each side of the split keeps open.
_OPEN = 128


def find_text(
  folder: pathlib.Path, suffix: str = "", skip: Collection[str] = ()
) -> tuple[dict[str, int], list[str]]:
  """Finds the text files below a folder.

  A text file is valid UTF-8 without NUL. Empty files, hidden files and folders,
  __pycache__ and the folders named in `skip` are ignored. Which files are text
  is kept in a hidden file of the folder, or in the user's cache if the folder
  is read-only; only files whose size or time has changed since are read again.

  Returns:
    The files' sizes by relative posix path, sorted; and a sentence for each
    file or folder that cannot be read, or whose name is not UTF-8.
  """
  known, index = _load_index(folder), {}
  found, problems = {}, []
  unread = 0
  cannot = lambda error: problems.append(f"{error.filename}: {error.strerror}")
  for root, folders, names in os.walk(folder, onerror=cannot):
    folders[:] = [
      name
      for name in folders
      if name not in ("__pycache__", *skip) and not name.startswith(".")
    ]
    for name in names:
      path = pathlib.Path(root, name)
      if name.startswith(".") or not name.endswith(suffix):
        continue
      if not path.is_file():  # A pipe or a broken link.
        continue
      relative = path.relative_to(folder).as_posix()
      try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if known.get(relative, [])[:2] == stamp:
          index[relative] = known[relative]
        else:
          index[relative] = [*stamp, int(_is_text(path))]
          unread += status.st_size
      except OSError as error:
        cannot(error)
        continue
      if not index[relative][2]:
        continue
      try:
        relative.encode()
        found[relative] = status.st_size
      except UnicodeEncodeError:
        problems.append(f"{path}: a name that is not UTF-8")
  if unread > _WORTH_AN_INDEX:
    _keep_index(folder, index)
  return dict(sorted(found.items())), sorted(problems)


def _is_text(path: pathlib.Path) -> bool:
  decoder = codecs.getincrementaldecoder("utf-8")()
  empty = True
  with open(path, "rb", buffering=0) as file:
    while chunk := file.read(_CHUNK):
      empty = False
      try:
        decoder.decode(chunk)
      except UnicodeDecodeError:
        return False
      if b"\0" in chunk:
        return False
  return not empty and not decoder.getstate()[0]


def _places(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns where a folder's index may be, the best place first."""
  name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return [
    folder / _INDEX,
    cache.expanduser() / "flax_mechanic" / f"corpus-{name}.json",
  ]


def _load_index(folder: pathlib.Path) -> Index:
  for place in _places(folder):
    try:
      index = json.loads(place.read_bytes())
    except (OSError, ValueError):
      continue
    if isinstance(index, dict) and all(map(_is_entry, index.values())):
      return index
  return {}


def _is_entry(entry: Any) -> bool:
  return isinstance(entry, list) and [type(x) for x in entry] == [int] * 3


def _keep_index(folder: pathlib.Path, index: Index) -> None:
  for place in _places(folder):
    new = place.with_name(f"{place.name}.{os.getpid()}")
    try:
      if place.parent != folder:
        place.parent.mkdir(parents=True, exist_ok=True)
      new.write_text(json.dumps(index))
      new.replace(place)
      return
    except OSError:
      continue


def split_by_file(
  sizes: Mapping[str, int],
) -> tuple[dict[str, range], dict[str, range]]:
  """Splits files into training and held-out ones by a hash of their paths.

  A file with crc32(path) % 10 == 0 is held out, whatever other files there are.
  If that would leave a side empty, the tenth of the files with the smallest
  hashes is held out, at least one. A single file is split: its last tenth is
  held out.

  Args:
    sizes: of at least one file, by relative path.

  Returns:
    For the training files and for the held-out files, which bytes of them.
  """
  if len(sizes) == 1:
    ((path, size),) = sizes.items()
    cut = size - size // 10
    return {path: range(cut)}, {path: range(cut, size)}
  hashes = {path: zlib.crc32(path.encode()) for path in sizes}
  held_out = {path for path in sizes if hashes[path] % 10 == 0}
  if not 0 < len(held_out) < len(sizes):
    ranked = sorted(sizes, key=hashes.__getitem__)
    held_out = set(ranked[: max(1, len(sizes) // 10)])
  return (
    {path: range(n) for path, n in sizes.items() if path not in held_out},
    {path: range(n) for path, n in sizes.items() if path in held_out},
  )


class Corpus:
  """Parts of files laid end to end, of which only what is asked for is read.

  Files are read and not mapped: a page that is mapped counts as this process's
  memory, and a file that shrinks under a mapping kills the process.
  """

  def __init__(self, folder: pathlib.Path, parts: Mapping[str, range]):
    """Opens nothing yet.

    Args:
      folder: that the paths are relative to.
      parts: which bytes of which files.
    """
    self._folder = folder
    self._paths = list(parts)
    self._firsts = [part.start for part in parts.values()]
    self._ends = np.cumsum([len(part) for part in parts.values()])
    self._opened = functools.lru_cache(_OPEN)(self._open)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def read(self, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns the windows that start there, uint8 [len(starts), length].

    Raises:
      UsageError: a file cannot be read, or has shrunk.
    """
    windows = np.empty((len(starts), length), np.uint8)
    for window, start in zip(windows, starts.tolist(), strict=True):
      self._fill(window, start)
    return windows

  def files_of(self, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns the number of each byte's file, integers as `read` has bytes."""
    bytes_ = starts[:, None] + np.arange(length)
    return np.searchsorted(self._ends, bytes_, side="right")

  def _fill(self, out: np.ndarray, start: int) -> None:
    file = int(np.searchsorted(self._ends, start, side="right"))
    while len(out):
      left = int(self._ends[file]) - start
      part, out = np.split(out, [min(left, len(out))])
      size = int(self._ends[file] - (self._ends[file - 1] if file else 0))
      offset = self._firsts[file] + size - left
      part[:] = np.frombuffer(self._read(file, offset, len(part)), np.uint8)
      start += len(part)
      file += 1

  def _read(self, file: int, offset: int, count: int) -> bytes:
    path = self._folder / self._paths[file]
    try:
      opened = self._opened(file)
      data = os.pread(opened.fileno(), count, offset)
    except OSError as error:
      raise UsageError(
        f"{path} cannot be read any more ({error.strerror}); put it back as it "
        "was, and the same command resumes"
      ) from error
    if len(data) < count:
      raise UsageError(
        f"{path} has become shorter since this run started; put it back as it "
        "was, and the same command resumes"
      )
    return data

  def _open(self, file: int) -> io.FileIO:
    return open(self._folder / self._paths[file], "rb", buffering=0)
