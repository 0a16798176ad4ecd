"""A folder of text of any size: found once, read where it is asked for."""

import codecs
import concurrent.futures
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError
from train.tasks.sources import Range, Source, source

# By path relative to the folder: [size, version, whether it is text].
Index = dict[str, list[int]]

_INDEX = ".flax_mechanic_corpus.json"
# An index is kept where finding the text takes more than a moment, in bytes.
_WORTH_AN_INDEX = 64_000_000
# A request to a bucket takes about the time of so many.
_REQUEST = 100_000
_CHUNK = 2**20
# How many objects of a bucket are read at a time to find which are text.
_AT_A_TIME = 16


def find_text(
  folder: Any, suffix: str = "", skip: Collection[str] = ()
) -> tuple[dict[str, int], list[str]]:
  """Finds the text files below a folder.

  A text file is valid UTF-8 without NUL. Empty files, hidden files and folders,
  __pycache__ and the folders named in `skip` are ignored. Which files are text
  is kept in a hidden file of the folder, or in the user's cache if the folder
  is read-only; only files whose size or version has changed since are read
  again.

  Args:
    folder: of `storage.path`.
    suffix: how the files' names end.
    skip: names of folders.

  Returns:
    The files' sizes by relative posix path, sorted; and a sentence for each
    file or folder that cannot be read, or whose name is not UTF-8.

  Raises:
    UsageError: it is in a bucket that cannot be used.
  """
  files, known = source(folder), _load_index(folder)
  problems: list[str] = []
  cannot = lambda error: problems.append(f"{error.filename}: {error.strerror}")
  stamps = {
    path: stamp
    for path, stamp in files.files(("__pycache__", *skip), cannot)
    if path.endswith(suffix)
  }
  index = {
    path: known[path]
    for path, stamp in stamps.items()
    if known.get(path, [])[:2] == stamp
  }
  new = {path: size for path, (size, _) in stamps.items() if path not in index}

  def look(path: str) -> None:
    try:
      is_text = _is_text(files, path, new[path])
    except OSError as error:
      cannot(error)
    else:
      index[path] = [*stamps[path], int(is_text)]

  workers = _AT_A_TIME if storage.is_bucket(folder) else 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for _ in pool.map(look, new):
      pass
  found = {}
  for path, (size, _, is_text) in sorted(index.items()):
    if not is_text:
      continue
    try:
      path.encode()
      found[path] = size
    except UnicodeEncodeError:
      problems.append(f"{folder / path}: a name that is not UTF-8")
  requests = len(new) * storage.is_bucket(folder)
  if sum(new.values()) + requests * _REQUEST > _WORTH_AN_INDEX:
    _keep_index(folder, index)
  return found, sorted(problems)


def _is_text(files: Source, path: str, size: int) -> bool:
  decoder = codecs.getincrementaldecoder("utf-8")()
  for start in range(0, size, _CHUNK):
    (chunk,) = files.read([Range(path, start, min(_CHUNK, size - start))])
    try:
      decoder.decode(chunk)
    except UnicodeDecodeError:
      return False
    if b"\0" in chunk:
      return False
  return size > 0 and not decoder.getstate()[0]


def _places(folder: Any) -> list[Any]:
  """Returns where a folder's index may be, the best place first."""
  full = folder if storage.is_bucket(folder) else folder.resolve()
  name = hashlib.sha256(os.fsencode(full)).hexdigest()[:32]
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return [
    folder / _INDEX,
    cache.expanduser() / "flax_mechanic" / f"corpus-{name}.json",
  ]


def _load_index(folder: Any) -> Index:
  for place in _places(folder):
    try:
      index = json.loads(place.read_bytes())
    except Exception:  # Whatever a bucket's client raises.
      continue
    if isinstance(index, dict) and all(map(_is_entry, index.values())):
      return index
  return {}


def _is_entry(entry: Any) -> bool:
  return isinstance(entry, list) and [type(x) for x in entry] == [int] * 3


def _keep_index(folder: Any, index: Index) -> None:
  data = json.dumps(index).encode()
  for place in _places(folder):
    try:
      if storage.is_bucket(place):
        place.write_bytes(data)
        return
      if place.parent != folder:
        place.parent.mkdir(parents=True, exist_ok=True)
      new = place.with_name(f"{place.name}.{os.getpid()}")
      new.write_bytes(data)
      new.replace(place)
      return
    except Exception:  # Whatever a bucket's client raises.
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
  """Parts of files laid end to end, of which only what is asked for is read."""

  def __init__(self, folder: Any, parts: Mapping[str, range]):
    """Opens nothing yet.

    Args:
      folder: that the paths are relative to, of `storage.path`.
      parts: which bytes of which files.
    """
    self._folder = folder
    self._files = source(folder)
    self._paths = list(parts)
    self._firsts = [part.start for part in parts.values()]
    self._ends = np.cumsum([len(part) for part in parts.values()])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def read(self, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns the windows that start there, uint8 [len(starts), length].

    Raises:
      UsageError: a file cannot be read, or has shrunk.
    """
    ranges = [
      each for start in starts.tolist() for each in self._ranges(start, length)
    ]
    data = bytearray().join(self._read(ranges))
    return np.frombuffer(data, np.uint8).reshape(len(starts), length)

  def files_of(self, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns the number of each byte's file, integers as `read` has bytes."""
    bytes_ = starts[:, None] + np.arange(length)
    return np.searchsorted(self._ends, bytes_, side="right")

  def _ranges(self, start: int, count: int) -> Iterator[Range]:
    """Yields where in the files some bytes are."""
    file = int(np.searchsorted(self._ends, start, side="right"))
    while count:
      left = int(self._ends[file]) - start
      size = int(self._ends[file] - (self._ends[file - 1] if file else 0))
      part = min(left, count)
      yield Range(self._paths[file], self._firsts[file] + size - left, part)
      start, count, file = start + part, count - part, file + 1

  def _read(self, ranges: Sequence[Range]) -> Sequence[bytes]:
    try:
      found = self._files.read(ranges)
    except OSError as error:
      raise UsageError(
        f"{error.filename} cannot be read any more ({error.strerror}); put it "
        "back as it was, and the same command resumes"
      ) from error
    for data, each in zip(found, ranges, strict=True):
      if len(data) < each.count:
        raise UsageError(
          f"{self._folder / each.file} has become shorter since this run "
          "started; put it back as it was, and the same command resumes"
        )
    return found
