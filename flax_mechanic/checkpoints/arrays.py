"""Reads the arrays that Orbax wrote: some of them, by path, and verified."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_mechanic.checkpoints.checksum import checksums
from flax_mechanic.paths import by_path, leaf_path

# Path of an array -> its "shape", "dtype" and "checksum".
Descriptions = Mapping[str, Mapping[str, Any]]

_T = TypeVar("_T")


class DamageError(Exception):
  """A checkpoint does not hold what was saved; the message says what is wrong.

  It is a sentence without the advice on what to do.
  """


class SavedArrays:
  """The arrays of an item, which is a pytree that Orbax wrote.

  Attributes:
    shapes: path of an array -> its shape; a random key's is that of its data.
  """

  def __init__(self, folder: Path, name: str):
    """Reads the names and shapes of the arrays.

    Args:
      folder: the item's.
      name: what errors call it.

    Raises:
      DamageError: they cannot be read.
    """
    # Its annotations ask for etils' paths, and it takes pathlib's as well.
    handler: Any = ocp.PyTreeCheckpointHandler()
    self._folder, self._name, self._handler = folder, name, handler
    self._tree: Any = read_on_all(name, lambda: handler.metadata(folder).tree)
    self.shapes: Mapping[str, tuple[int, ...]] = {
      path: tuple(leaf.shape or ())
      for path, leaf in by_path(self._tree).items()
    }

  def read(
    self,
    wanted: Mapping[str, Any],
    descriptions: Descriptions | None = None,
  ) -> dict[str, Any]:
    """Reads arrays, each straight into its placement, and nothing else.

    Of several processes all have to call it with the same paths.

    Args:
      wanted: path -> an array, or its shape, dtype and sharding. Only a random
        key's dtype matters: other arrays keep the dtype that they were saved
        in. An array without a sharding gets the one that it was saved with,
        or is placed on one device if those devices are not here. A Python
        number stands for one of its type.
      descriptions: what was saved, to verify what is read.

    Returns:
      Path -> array.

    Raises:
      DamageError: an array cannot be read, or is not what `descriptions` says.
    """
    missing = wanted.keys() - self.shapes.keys()
    if missing:
      raise DamageError(f"{_listed(missing)} of {self._name} is missing")
    target = jax.tree_util.tree_map_with_path(
      lambda path, saved: (
        _as_saved(saved, wanted[leaf_path(path)])
        if leaf_path(path) in wanted
        else ocp.PLACEHOLDER
      ),
      self._tree,
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
    )
    arrays = {
      path: leaf for path, leaf in by_path(tree).items() if path in wanted
    }
    if descriptions is not None:
      found = describe(arrays, checksums(arrays))
      wrong = [path for path in found if found[path] != descriptions.get(path)]
      if wrong:
        raise DamageError(f"{_listed(wrong)} of {self._name} is damaged")
    return arrays


def read_on_all(name: str, read: Callable[[], _T]) -> _T:
  """Returns what `read` returns, if it succeeds on every process.

  Orbax's own checkpointers wait for all processes after a restore (0.12.8), so
  that one that could not read would leave the others waiting.

  Args:
    name: what the error calls it.
    read: reads without waiting for other processes.

  Raises:
    DamageError: a process could not read it.
  """
  problem, value = "", None
  try:
    value = read()
  except Exception as error:  # Whatever reading a damaged file leads to.
    problem = first_line(error)
  succeeded = multihost_utils.process_allgather(np.array(not problem))
  if not np.all(succeeded):
    reason = problem or "by another process"
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
  description: Mapping[str, Any], sharding: jax.sharding.Sharding
) -> Any:
  """Returns what `SavedArrays.read` wants for an array that was described."""
  name = description["dtype"]
  if name.startswith("<class"):  # A Python number.
    return 0
  key = jax.eval_shape(jax.random.key, 0).dtype
  dtype = key if name.startswith("key") else jnp.dtype(name)
  return jax.ShapeDtypeStruct(description["shape"], dtype, sharding=sharding)


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, or its type's name."""
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _as_saved(saved: Any, wanted: Any) -> Any:
  """Returns what Orbax wants to know of an array to read it as it was saved."""
  if not hasattr(wanted, "dtype"):
    return wanted
  sharding = getattr(wanted, "sharding", None)
  if sharding is None and getattr(saved, "sharding", None) is not None:
    try:
      sharding = saved.sharding.to_jax_sharding()
    except ValueError:  # It is of devices that are not here.
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  is_key = jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key)
  dtype = wanted.dtype if is_key else saved.dtype
  return jax.ShapeDtypeStruct(wanted.shape, dtype, sharding=sharding)


def _listed(paths: Collection[str]) -> str:
  """Returns the first paths, such as "array a, b, c and 2 more"."""
  more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
  return f"array {', '.join(sorted(paths)[:3])}{more}"
