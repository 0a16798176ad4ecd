"""Checkpoints of a whole run, on Orbax."""

import json
import os
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_mechanic.errors import UsageError
from flax_mechanic.sharding import leaf_path

# Fields that change no shape: how long, how often, and where the state lies.
_SHAPELESS = re.compile(
  r"_every$|^num_steps$|^batch_size$|^learning_rate$|^seed$"
  r"|^mesh\.|_optimizer_state$"
)


class Restored(NamedTuple):
  """What `Checkpointer.restore` returns.

  Attributes:
    step: the step that was saved.
    state: the arrays, in the target's structure and placement.
    data: the position in the data, as it was saved.
    changed: config field -> (saved value, present value), where they differ.
  """

  step: int
  state: Any
  data: Mapping[str, Any]
  changed: Mapping[str, tuple[Any, Any]]


class Checkpointer:
  """Saves and restores a run: arrays, position in the data, config.

  Saving is asynchronous and atomic: a kill at any instant leaves the earlier
  steps intact. A context manager, whose end waits for the last save.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.save(7, {"w": jnp.ones(2)})
    ...   checkpointer.wait()
    ...   checkpointer.restore({"w": jnp.zeros(2)}).step
    7
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
    """Opens a directory of checkpoints, creating it if need be.

    Args:
      directory: step N is saved in its subfolder N.
      keep: how many of the newest steps are kept.
    """
    self.directory = os.path.abspath(directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      handler_registry=_handlers(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep),
        cleanup_tmp_directories=True,
      ),
    )

  def latest(self) -> int | None:
    """Returns the newest step saved, or None.

    Of several processes all have to ask; they get what the first one sees.
    """
    latest = self._manager.latest_step()
    found = multihost_utils.broadcast_one_to_all(
      np.int32(-1 if latest is None else latest)
    )
    return int(found) if found >= 0 else None

  def save(
    self,
    step: int,
    state: Any,
    *,
    config: ConfigDict | None = None,
    data: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts saving; returns once the arrays may be donated.

    Args:
      step: must be above `latest()`.
      state: an `nnx.State` or any other pytree of arrays.
      config: the run's config.
      data: the position in the data, anything JSON can hold.

    Raises:
      ValueError: `step` is not above `latest()`.
    """
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_pure(state)),
        config=ocp.args.JsonSave(_flat_config(config)),
        data=ocp.args.JsonSave(dict(data or {})),
      ),
    )
    if not saved:
      raise ValueError(
        f"step {step} was not saved: {self.directory} holds step "
        f"{self.latest()} already"
      )

  def restore(
    self,
    target: Any,
    *,
    step: int | None = None,
    config: ConfigDict | None = None,
  ) -> Restored:
    """Restores a step into the structure and placement of `target`.

    Args:
      target: what was saved, as arrays or `jax.ShapeDtypeStruct`s.
      step: by default the newest.
      config: the run's present config, to be compared with the saved one.

    Raises:
      UsageError: there is no such step, or it does not fit `target`.
    """
    step = self.latest() if step is None else step
    if step is None or step not in self._manager.all_steps():
      raise UsageError(
        f"{self.directory} holds no step {step}; it holds "
        f"{sorted(self._manager.all_steps()) or 'none'}"
      )
    parts: Any = self._manager.restore(
      step,
      args=ocp.args.Composite(
        config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()
      ),
    )
    changed = _changed(parts.config, config)
    pure = _pure(target)
    self._check_fit(step, pure, changed)
    arrays: Any = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(pure))
    )
    return Restored(step, _like(target, arrays.state), parts.data, changed)

  def wait(self) -> None:
    """Waits for the save under way; raises what it raised."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save under way and closes the directory."""
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(
    self,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def _check_fit(
    self, step: int, target: Any, changed: Mapping[str, tuple[Any, Any]]
  ) -> None:
    saved = _shapes(self._manager.item_metadata(step).state.tree)
    wanted = _shapes(target)
    missing = sorted(wanted.keys() - saved.keys())
    unknown = sorted(saved.keys() - wanted.keys())
    reshaped = sorted(
      path
      for path in wanted.keys() & saved.keys()
      if wanted[path] and saved[path] and wanted[path] != saved[path]
    )
    if not (missing or unknown or reshaped):
      return
    differences = [
      f"{path} {what}"
      for paths, what in (
        (missing, "is not in it"),
        (unknown, "is not wanted"),
        (reshaped, "has another shape"),
      )
      for path in paths
    ]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    # The broadest fields first: what a whole group hangs on decides the shapes.
    fields = sorted(changed, key=lambda field: field.count("."))
    telling = [field for field in fields if not _SHAPELESS.search(field)]
    options = "; ".join(
      f"config.{field} was {changed[field][0]!r} and is {changed[field][1]!r}"
      for field in telling[:3]
    )
    raise UsageError(
      f"step {step} in {self.directory} does not fit this run "
      f"({', '.join(differences[:3])}{more}): "
      f"{options or 'the config is the same, so the code has changed'}; "
      "go back to the saved values, or take another --workdir"
    )


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  arrays, texts = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
  handlers.add("state", ocp.args.StandardSave, arrays)
  handlers.add("state", ocp.args.StandardRestore, arrays)
  for item in ("config", "data"):
    handlers.add(item, ocp.args.JsonSave, texts)
    handlers.add(item, ocp.args.JsonRestore, texts)
  return handlers


def _pure(state: Any) -> Any:
  return nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state


def _like(target: Any, arrays: Any) -> Any:
  """Undoes `_pure`: gives restored arrays the structure of `target`."""
  if not isinstance(target, nnx.State):
    return arrays
  state = jax.tree.map(lambda leaf: leaf, target)
  nnx.replace_by_pure_dict(state, arrays)
  return state


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | None]:
  """Returns path -> shape; None for random keys, which Orbax saves as words."""
  return {
    leaf_path(path): (
      None if _is_key(leaf) else tuple(getattr(leaf, "shape", ()))
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _flat_config(config: ConfigDict | None) -> dict[str, Any]:
  if config is None:
    return {}
  nested = json.loads(config.to_json_best_effort())
  return traverse_util.flatten_dict(nested, sep=".")


def _changed(
  saved: Mapping[str, Any], config: ConfigDict | None
) -> dict[str, tuple[Any, Any]]:
  present = _flat_config(config)
  return {
    field: (saved.get(field), present.get(field))
    for field in sorted(saved.keys() | present.keys() if present else ())
    if saved.get(field) != present.get(field)
  }
