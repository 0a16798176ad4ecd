"""Reads the arrays that Orbax wrote: some of them, by path, and verified."""

import asyncio
import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_mechanic.checkpoints import replicas
from flax_mechanic.checkpoints.checksum import checksums
from flax_mechanic.checkpoints.storage import files, trouble
from flax_mechanic.errors import UsageError, first_line
from flax_mechanic.paths import by_path, leaf_path

# Path of an array -> its "shape", "dtype" and "checksum".
Descriptions = Mapping[str, Mapping[str, Any]]

_T = TypeVar("_T")

# Above the largest compression ratio: zstd shrinks zeros 2^15 times.
_RATIO = 2**16
# What development versions of 0.1.0 called the dtype of a Python number.
_FORMER_NUMBERS = {str(type(each)): each for each in (False, 0, 0.0)}
# Seconds to wait for the other arrays where one cannot be read.
_PATIENCE = 2.0


class DamageError(Exception):
  """A checkpoint does not hold what was saved; the message says what is wrong.

  It is a sentence without the advice on what to do.
  """


class SavedArrays:
  """The arrays of an item, which is a pytree that Orbax wrote.

  Attributes:
    shapes: path of an array -> its shape; a random key's is that of its data.
  """

  def __init__(self, folder: Any, name: str):
    """Reads the names and shapes of the arrays.

    Args:
      folder: the item's.
      name: what errors call it.

    Raises:
      DamageError: they cannot be read.
    """
    # Annotated for etils' paths, but accepts pathlib's.
    handler: Any = ocp.PyTreeCheckpointHandler()
    self._folder, self._name, self._handler = folder, name, handler
    self._tree: Any = read_on_all(
      name, lambda: handler.metadata(folder).tree, folder
    )
    self.shapes: Mapping[str, tuple[int, ...]] = {
      path: tuple(getattr(leaf, "shape", None) or ())  # A text has none.
      for path, leaf in by_path(self._tree).items()
    }

  def read(
    self,
    wanted: Mapping[str, Any],
    descriptions: Descriptions | None = None,
  ) -> dict[str, Any]:
    """Reads arrays, each straight into its placement, and nothing else.

    Of several processes all have to call it with the same paths. What more than
    one of them holds, one reads and shares.

    Args:
      wanted: path -> an array, or its shape, dtype and sharding. Only a random
        key's dtype matters: other arrays keep the dtype that they were saved
        in. An array without a sharding gets the one that it was saved with,
        or is placed on one device if those devices are not here. For a Python
        number NumPy's array is read, and so it is where jax cannot hold the
        dtype without x64.
      descriptions: what was saved, to verify what is read.

    Returns:
      Path -> array.

    Raises:
      DamageError: an array cannot be read, or is not what `descriptions` says.
    """
    missing = wanted.keys() - self.shapes.keys()
    if missing:
      raise DamageError(f"{_listed(missing)} of {self._name} is missing")
    # In one order on all processes.
    saved = {
      path: leaf for path, leaf in by_path(self._tree).items() if path in wanted
    }
    targets = {
      path: _as_saved(leaf, wanted[path]) for path, leaf in saved.items()
    }
    dealt = replicas.deal(
      targets,
      {path: _chunk(leaf, wanted[path]) for path, leaf in saved.items()},
    )
    arrays = self._restore(
      targets
      | {path: _on(each, targets[path]) for path, (_, each) in dealt.items()}
    )
    for path, (blocks, _) in dealt.items():
      arrays[path] = blocks.share(targets[path], arrays.pop(path))
    if descriptions is not None:
      read = {
        path: _as_described(array, descriptions.get(path))
        for path, array in arrays.items()
      }
      found = describe(read, checksums(read))
      wrong = [path for path in found if found[path] != descriptions.get(path)]
      if wrong:
        raise DamageError(f"{_listed(wrong)} of {self._name} is damaged")
    return {
      path: self._placed(path, array, wanted[path])
      for path, array in arrays.items()
    }

  def _placed(self, path: str, array: Any, wanted: Any) -> Any:
    """Returns an array in jax, if it was read for jax but is NumPy's."""
    if (
      isinstance(array, jax.Array)
      or not isinstance(wanted, jax.Array | jax.ShapeDtypeStruct)
      or not _in_jax(wanted.dtype)
    ):
      return array
    cast = array.astype(wanted.dtype)
    if array.dtype.kind in "iu" and not np.array_equal(cast, array):
      raise UsageError(
        f"array {path} of {self._name} is too large for {wanted.dtype}; "
        "restore it into NumPy's array or a Python number"
      )
    return jax.device_put(cast, wanted.sharding)

  def _restore(self, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Has Orbax read path -> what it wants to know of an array."""
    target = jax.tree_util.tree_map_with_path(
      lambda path, _: targets.get(leaf_path(path), ocp.PLACEHOLDER), self._tree
    )
    tree = read_on_all(
      self._name,
      lambda: self._handler.restore(
        self._folder,
        args=ocp.args.PyTreeRestore(
          item=target,
          restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        ),
      ),
      self._folder,
    )
    return {
      path: leaf for path, leaf in by_path(tree).items() if path in targets
    }


def check_size(folder: Any, name: str, descriptions: Descriptions) -> None:
  """Raises DamageError for arrays that the files of a step cannot hold.

  To be called before they are allocated.

  Args:
    folder: the step's.
    name: what errors call it.
    descriptions: of its arrays.
  """
  arrays = [described(each, None) for each in descriptions.values()]
  size = sum(
    math.prod(each.shape) * each.dtype.itemsize
    for each in arrays
    if hasattr(each, "dtype")
  )
  stored = sum(each for _, each in files(folder))
  if size > _RATIO * stored:
    raise DamageError(
      f"{name} declares {size / 1e9:,.0f} GB of arrays, which its "
      f"{stored / 1e6:,.1f} MB of files cannot hold"
    )


def read_on_all(
  name: str, read: Callable[[], _T], folder: str | os.PathLike[str] = ""
) -> _T:
  """Returns what `read` returns, if it succeeds on every process.

  Orbax's own checkpointers wait for all processes after a restore (0.12.8), so
  that one that could not read would leave the others waiting.

  Args:
    name: what the error calls it.
    read: reads without waiting for other processes.
    folder: what it reads from.

  Raises:
    DamageError: a process could not read it.
    UsageError: the bucket that it is in cannot be used, to a process.
  """
  problem, unusable, value = "", None, None
  try:
    with _patience():
      value = read()
  except Exception as error:  # Whatever reading a damaged file leads to.
    problem, unusable = first_line(error), trouble(folder, error)
  outcome = (2 if unusable else 1) if problem else 0
  worst = np.max(multihost_utils.process_allgather(np.array(outcome)))
  if worst:
    reason = unusable or problem or "by another process"
    if worst == 2:
      raise UsageError(f"{name} cannot be read: {reason}")
    raise DamageError(f"{name} cannot be read ({reason})")
  return value  # pyrefly: ignore[bad-return]


def describe(
  tree: Any, sums: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
  """Returns path -> shape, dtype and, if given, checksum."""
  return {
    path: {
      "shape": list(jnp.shape(leaf)),
      "dtype": str(leaf.dtype if hasattr(leaf, "dtype") else type(leaf)),
    }
    | ({"checksum": sums[path]} if sums else {})
    for path, leaf in by_path(tree).items()
  }


def described(
  description: Mapping[str, Any], sharding: jax.sharding.Sharding | None
) -> Any:
  """Returns what `SavedArrays.read` wants for an array that was described.

  Raises:
    DamageError: no array can be of that dtype.
  """
  name = description["dtype"]
  if name in _FORMER_NUMBERS:
    return _FORMER_NUMBERS[name]
  try:
    dtype = (
      _key_dtype(generators().get(name))
      if name.startswith("key")
      else jnp.dtype(name)
    )
  except TypeError:
    raise DamageError(f"an array was saved as {name!r}, no dtype") from None
  return jax.ShapeDtypeStruct(description["shape"], dtype, sharding=sharding)


@functools.cache
def generators() -> Mapping[str, str]:
  """Returns dtype of a random key, such as "key<fry>" -> jax's generator."""
  names = ("threefry2x32", "rbg", "unsafe_rbg")
  return {str(_key_dtype(name)): name for name in names}


def _key_dtype(generator: str | None) -> Any:
  """Returns the dtype of a generator's keys; by default of the usual one's."""
  return jax.eval_shape(lambda: jax.random.key(0, impl=generator)).dtype


class _PatientLoop(asyncio.SelectorEventLoop):
  """An event loop that waits for what still runs in it before it closes."""

  def close(self) -> None:
    rest = asyncio.all_tasks(self) if not self.is_closed() else ()
    if rest:
      ended = asyncio.gather(*rest, return_exceptions=True)
      with contextlib.suppress(TimeoutError):
        self.run_until_complete(asyncio.wait_for(ended, _PATIENCE))
    super().close()


# The function is asyncio's, so it is replaced by one thread at a time.
_REPLACING_LOOP = threading.RLock()


@contextlib.contextmanager
def _patience() -> Iterator[None]:
  """Has Orbax wait for the other arrays where one cannot be read.

  It closes its event loop at once (0.12.8), and TensorStore then prints a
  traceback for each of them.
  """
  with _REPLACING_LOOP:
    new = asyncio.new_event_loop
    asyncio.new_event_loop = _PatientLoop
    try:
      yield
    finally:
      asyncio.new_event_loop = new


def _as_saved(saved: Any, wanted: Any) -> Any:
  """Returns what Orbax wants to know of an array to read it as it was saved."""
  kept = getattr(saved, "dtype", None) or jnp.result_type(wanted)
  if not hasattr(wanted, "dtype") or not _in_jax(kept):
    return jax.ShapeDtypeStruct(jnp.shape(wanted), kept)
  sharding = getattr(wanted, "sharding", None)
  if sharding is None and getattr(saved, "sharding", None) is not None:
    try:
      sharding = saved.sharding.to_jax_sharding()
    except ValueError:  # It is of devices that are not here.
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  is_key = jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key)
  dtype = wanted.dtype if is_key else kept
  return jax.ShapeDtypeStruct(wanted.shape, dtype, sharding=sharding)


def _in_jax(dtype: Any) -> bool:
  """Whether jax can hold a dtype; those of 64 bits only with x64."""
  return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _as_described(array: Any, description: Mapping[str, Any] | None) -> Any:
  """Returns an array as what its checksum is that of."""
  former = description and description["dtype"] in _FORMER_NUMBERS
  return array.item() if former else array


def _chunk(saved: Any, wanted: Any) -> Sequence[int] | None:
  """Returns the shape of an array's chunks, if it is known."""
  if tuple(getattr(saved, "shape", ())) != jnp.shape(wanted):
    return None  # Reading it will fail.
  return getattr(getattr(saved, "storage", None), "chunk_shape", None)


def _on(replica: jax.sharding.Sharding, array: Any) -> Any:
  """Returns what to read of an array here, if this process is to read it."""
  if not replica.addressable_devices:
    return ocp.PLACEHOLDER
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replica)


def _listed(paths: Collection[str]) -> str:
  """Returns the first paths, such as "array a, b, c and 2 more"."""
  more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
  return f"array {', '.join(sorted(paths)[:3])}{more}"
