"""Where a run's files are: in a folder on a disk, or in a bucket.

A bucket has no rename, no lock and no append. What that changes is here, in
`lock.Lease` and in `train.files`.
"""

import contextlib
import functools
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_mechanic.checkpoints.lock import Flock, Held, Lease
from flax_mechanic.errors import UsageError, not_installed

# pathlib makes one slash of two.
_BUCKET = re.compile(r"(gs|s3):/+")
# The client, and the extra that installs it.
_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# What Orbax writes last in a bucket, and what is written beside it.
_COMMITTED, _DAMAGED = "commit_success.txt", "damaged.txt"
# How often TensorStore repeats a request, as often as gcsfs does, which takes
# half a minute; by itself it does so for a quarter of an hour.
_RETRIES = 6
# The largest gap that is read, in bytes.
_GAP = "experimental_read_coalescing_threshold_bytes"
# What a client's error means -> the words that it has.
_TROUBLES = (
  (
    "it does not accept the credentials, or there are none; type gcloud auth "
    "application-default login for gs://, or set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY for s3://",
    r"\b401\b|UNAUTHENTICATED|[Cc]redentials|Anonymous|Unauthorized|"
    r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken",
  ),
  (
    "there is no permission to do that; ask for the rights to read, write, "
    "list and delete its objects",
    r"\b403\b|Forbidden|PERMISSION_DENIED|AccessDenied|PermissionError",
  ),
  (
    "there is no such bucket",
    r"NoSuchBucket|bucket does not exist|NOT_FOUND: Error writing",
  ),
  (
    "it does not answer",
    r"\b(408|429|500|502|503|504)\b|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|"
    r"RESOURCE_EXHAUSTED|[Tt]imed? ?out|Timeout|ClientError|ServerDisconnected|"
    r"Connect|ProxyError|SlowDown|EndpointConnectionError",
  ),
)


def is_bucket(given: str | os.PathLike[str]) -> bool:
  """Whether a path is one in a bucket.

  Example:
    >>> is_bucket("gs://bucket/run"), is_bucket("runs/mine")
    (True, False)
  """
  return bool(_BUCKET.match(os.fspath(given)))


def path(given: str | os.PathLike[str]) -> Any:
  """Returns pathlib's path, or etils' path in a bucket.

  Raises:
    UsageError: it is in a bucket whose client is not installed, or in
      something else that has an address.

  Example:
    >>> path("runs/mine")
    PosixPath('runs/mine')
  """
  text = os.fspath(given)
  match = _BUCKET.match(text)
  if match is None:
    if "://" in text:
      raise UsageError(
        f"{text} is neither a folder nor in a bucket; type a folder, or "
        "gs://BUCKET/FOLDER"
      )
    return Path(given).expanduser()
  _connect(match[1])
  from etils import epath

  return epath.Path(f"{match[1]}://{text[match.end() :].rstrip('/')}")


def check_name(folder: str | os.PathLike[str]) -> None:
  """Raises a UsageError for a folder on a disk in which a step would be lost.

  Orbax (0.12.8) looks for what its processes have saved by the glob of etils
  (1.15), to which the folder's own name is a part of the pattern.
  """
  match = re.search(r"\[|\\|\*\*", os.path.abspath(path(folder)))
  if match:
    raise UsageError(
      f"{os.fspath(folder)} cannot hold checkpoints: Orbax takes the "
      f"{match[0]} in its path for a part of a pattern; take a folder without"
    )


def storage(directory: str | os.PathLike[str]) -> "Folder | Bucket":
  """Returns where checkpoints are: a folder, or a part of a bucket."""
  return (Bucket if is_bucket(directory) else Folder)(directory)


def files(folder: Any) -> Iterator[tuple[Any, int]]:
  """Yields the files in a folder, at any depth, and their sizes."""
  if not is_bucket(folder):
    for each, status in _inside(folder):
      if stat.S_ISREG(status.st_mode):
        yield each, status.st_size
    return
  for name, info in file_system(folder).find(str(folder), detail=True).items():
    if info["type"] == "file":
      yield path(f"{str(folder).partition('://')[0]}://{name}"), info["size"]


def file_system(folder: Any) -> Any:
  """Returns fsspec's file system of a path in a bucket."""
  import fsspec

  return fsspec.filesystem(str(folder).partition("://")[0])


def trouble(folder: Any, error: BaseException | None) -> str | None:
  """Returns what keeps a bucket from being used, if that caused an error.

  None for a file that is missing or damaged, and for anything on a disk.

  Args:
    folder: where it was; None for any bucket, if a client of one is loaded.
    error: what was raised.
  """
  loaded = any(client in sys.modules for client, _ in _CLIENTS.values())
  if not (loaded if folder is None else is_bucket(folder)):
    return None
  while error is not None:
    if not isinstance(error, FileNotFoundError | UsageError):
      text = f"{type(error).__name__} {getattr(error, 'code', '')} {error}"
      for phrase, words in _TROUBLES:
        if re.search(words, text):
          return phrase
    error = error.__cause__ or error.__context__
  return None


class Folder:
  """Checkpoints in a folder on a disk.

  Attributes:
    directory: its absolute path.
    path: the same, as a path.
    options: what Orbax is to do here.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Names it.

    Raises:
      UsageError: see `check_name`.
    """
    check_name(directory)
    self.directory = os.path.abspath(path(directory))
    self.path = Path(self.directory)
    self.options: Mapping[str, Any] = {"cleanup_tmp_directories": True}

  def check_kinds(self, read_only: bool) -> None:
    """Raises a UsageError for what no run saves, such as a pipe or a link.

    Orbax would write through the link of a step, or wait for minutes where it
    cannot delete it, and for ever for what comes through a pipe.
    """
    for step in self.path.glob("[0-9]*"):
      if step.is_symlink() and not read_only:
        _refuse(step, "a link")
      for path, status in _inside(step):
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(
          status.st_mode
        ):
          _refuse(path, "neither a file nor a folder")

  def create(self) -> None:
    """Creates it."""
    os.makedirs(self.directory, exist_ok=True)

  def hold(self) -> Held:
    """Locks it."""
    return Flock(self.directory)

  def clean(self) -> None:
    """Orbax deletes what a kill has left of a save."""

  def delete(self, step: int) -> None:
    """Deletes the folder of a step, as far as it can be."""
    shutil.rmtree(self.path / str(step), ignore_errors=True)

  def set_aside(self, step: int) -> str:
    """Renames a step, so that it can be saved again, and says to what."""
    folder = self.path / str(step)
    aside = lambda copy: folder.with_name(
      f"damaged_{step}" + (f"_{copy}" if copy > 1 else "")
    )
    copy = 1
    if jax.process_index() == 0:
      while aside(copy).exists():
        copy += 1
      folder.rename(aside(copy))
    # The others go on once it is renamed, and know its name.
    copy = int(multihost_utils.broadcast_one_to_all(np.int32(copy)))
    return f"it is in {aside(copy)} now"

  def aside(self) -> Iterator[tuple[int, str]]:
    """Yields the steps that were set aside, and where they are."""
    for each in sorted(self.path.glob("damaged_*")):
      number = each.name.split("_")[1]
      if number.isdecimal():
        yield int(number), f"was set aside as {each}"


class Bucket:
  """Checkpoints in a bucket.

  A step is complete once Orbax has written its last object, and a damaged one
  is set aside by a marker in place of that object.

  Attributes:
    directory: its address.
    path: the same, as a path.
    options: what Orbax is to do here.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Names it."""
    import orbax.checkpoint as ocp

    self.path = path(directory)
    self.directory = str(self.path)
    self.options: Mapping[str, Any] = {
      # It would delete a damaged step too.
      "cleanup_tmp_directories": False,
      # By default it renames in s3://, which is not atomic there.
      "atomicity_options": ocp.options.AtomicityOptions(
        mode=ocp.options.AtomicityMode.COMMIT_FILE
      ),
    }

  def check_kinds(self, read_only: bool) -> None:
    """There are only objects."""

  def create(self) -> None:
    """It exists once it has an object."""

  def hold(self) -> Held:
    """Locks it."""
    try:
      return Lease(self.directory, file_system(self.path))
    except UsageError:
      raise
    except Exception as error:
      raise failure(self.path, "cannot be written", error) from error

  def clean(self) -> None:
    """Deletes what a kill has left of a save."""
    for metadata in self.path.glob("*/_CHECKPOINT_METADATA"):
      step = metadata.parent
      if (
        step.name.isdecimal()
        and not (step / _COMMITTED).exists()
        and not (step / _DAMAGED).exists()
      ):
        step.rmtree()

  def delete(self, step: int) -> None:
    """Deletes a step."""
    (self.path / str(step)).rmtree(missing_ok=True)

  def set_aside(self, step: int) -> str:
    """Marks a step as damaged, so that it can be saved again, in its place."""
    folder = self.path / str(step)
    if jax.process_index() == 0:
      (folder / _DAMAGED).write_text(
        "Its arrays are not those that were saved.\n"
      )
      (folder / _COMMITTED).unlink(missing_ok=True)
    multihost_utils.sync_global_devices("the step is marked")
    return f"it is marked by {folder / _DAMAGED} now"

  def aside(self) -> Iterator[tuple[int, str]]:
    """Yields the steps that were set aside, and where they are."""
    for each in sorted(self.path.glob(f"*/{_DAMAGED}")):
      if each.parent.name.isdecimal():
        yield int(each.parent.name), f"was marked by {each}"


def is_complete(step: Any) -> bool:
  """Whether a step is not one that a kill cut short, or that is set aside."""
  return not is_bucket(step) or (step / _COMMITTED).exists()


def failure(folder: Any, what: str, error: Exception) -> UsageError:
  """Returns the error that says why something in a bucket failed."""
  missing = isinstance(error, FileNotFoundError)
  reason = trouble(None, error) or (
    "there is no such bucket" if missing else f"{type(error).__name__}: {error}"
  )
  return UsageError(f"{folder} {what}: {reason}")


@functools.cache
def _connect(scheme: str) -> None:
  """Configures the clients: all that they print is in what they raise."""
  client, extra = _CLIENTS[scheme]
  if os.environ.get("STORAGE_EMULATOR_HOST"):
    # Nobody's credentials are asked for, and no zones.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    token = {"token": "anon"}
  else:
    token = {}
  try:
    import fsspec.config

    __import__(client)
    from orbax.checkpoint._src.serialization import tensorstore_utils
  except ImportError as error:
    raise not_installed(f"{scheme}:// needs {error.name}", extra) from error
  for name in ("gcsfs", "s3fs", "aiobotocore", "botocore", "google.auth"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  for name, own in (("gs", token), ("gcs", token), ("s3", {})):
    fsspec.config.conf.setdefault(name, {}).update(
      {"use_listings_cache": False, **own}
    )
  for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
    context = getattr(tensorstore_utils, name, {})
    for service in ("gcs", "s3"):
      context[f"{service}_request_retries"] = {"max_retries": _RETRIES}
  tensorstore_utils._build_ocdbt_kvstore_tspec = functools.partial(
    _spec, tensorstore_utils._build_ocdbt_kvstore_tspec
  )
  if scheme == "s3":
    _teach_s3()


def _spec(
  build: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
) -> Any:
  """Returns the spec that Orbax builds, with TensorStore's own largest gap.

  Orbax (0.12.8) has TensorStore read the bytes between two chunks of a file, up
  to a megabyte, to save a request. Where chunks are smaller, several requests
  read the same ones, and more so the more devices have written them.
  """
  spec = build(*args, **kwargs)
  if _GAP in spec:
    spec[_GAP] = 4095
  return spec


def _teach_s3() -> None:
  """Has Orbax save arrays in s3://.

  Orbax 0.12.8 takes such an address for a folder that is not absolute.
  """
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  in_gs = gcs_utils.get_kvstore_for_gcs

  def in_bucket(address: str) -> dict[str, Any]:
    if not address.startswith("s3://"):
      return in_gs(address)
    name, _, folder = address.removeprefix("s3://").partition("/")
    return {"driver": "s3", "bucket": name, "path": folder}

  vars(gcs_utils)["get_kvstore_for_gcs"] = in_bucket
  vars(tensorstore_utils)["_use_gcs_driver"] = is_bucket
  vars(tensorstore_utils)["_normalize_path"] = lambda address: _BUCKET.sub(
    r"\1://", os.path.normpath(address)
  )


def _inside(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
  """Yields what is in a folder, at any depth, and is not deleted meanwhile."""
  for parent, folders, names in os.walk(folder):
    for name in (*folders, *names):
      with contextlib.suppress(OSError):
        yield Path(parent, name), os.stat(os.path.join(parent, name))


def _refuse(path: Path, kind: str) -> None:
  raise UsageError(
    f"{path} is {kind}, where a run writes its steps; delete it, or take "
    "another --workdir"
  )
