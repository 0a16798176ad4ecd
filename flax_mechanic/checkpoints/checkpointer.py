"""Checkpoints of a whole run, on Orbax."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_mechanic.checkpoints import record as record_lib
from flax_mechanic.checkpoints.checksum import checksums
from flax_mechanic.errors import UsageError
from flax_mechanic.paths import leaf_path


class Restored(NamedTuple):
  """What `Checkpointer.restore` returns.

  Attributes:
    step: the step that was saved.
    state: the arrays, in the target's structure, dtypes and placement.
    data: the position in the data, as it was saved.
    changed: config field -> (saved value, present value), where they differ.
    damaged: a sentence for each newer step that is damaged.
  """

  step: int
  state: Any
  data: Mapping[str, Any]
  changed: Mapping[str, tuple[Any, Any]]
  damaged: Sequence[str] = ()


class _DamageError(Exception):
  """A step does not hold what was saved."""


class Checkpointer:
  """Saves and restores a run: arrays, position in the data, config.

  Saving is asynchronous and atomic: a kill at any instant leaves the earlier
  steps intact. Every array has a checksum that does not depend on how it is
  sharded; it is verified after every restore. A context manager, whose end
  waits for the last save.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.save(7, {"w": jnp.ones(2)})
    ...   checkpointer.wait()
    ...   checkpointer.restore({"w": jnp.zeros(2)}).step
    7
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 3,
    keep_every: int = 0,
    best: str = "",
    read_only: bool = False,
  ):
    """Opens a directory of checkpoints, creating it if need be.

    Args:
      directory: step N is saved in its subfolder N.
      keep: how many of the newest steps are kept.
      keep_every: every so many steps one is kept for ever; 0 for none.
      best: the name of a metric, such as "eval/loss"; the step with its
        smallest value is kept, or with its largest after a minus sign:
        "-eval/accuracy".
      read_only: whether to leave the directory to another run.

    Raises:
      UsageError: the directory cannot be written, or another run is writing it.
    """
    self.directory = os.path.abspath(directory)
    self._read_only = read_only
    self._lock = None if read_only else _lock_for_all(self.directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      handler_registry=_handlers(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_policy(keep, keep_every, best),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
        save_interval_steps=0 if read_only else 1,
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
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts saving; returns once the arrays may be donated.

    Args:
      step: must be above `latest()`.
      state: an `nnx.State` or any other pytree of arrays.
      config: the run's config.
      data: the position in the data, anything JSON can hold.
      metrics: of the step; `best` chooses by them.

    Raises:
      ValueError: `step` is not above `latest()`.
      UsageError: this save, or the one before it, cannot be written.
    """
    pure, numbers = _pure(state), dict(metrics or {})
    record = {
      "step": step,
      "config": record_lib.flat_config(config),
      "data": dict(data or {}),
      "metrics": numbers,
      "versions": record_lib.versions(),
      "arrays": record_lib.describe(pure, checksums(pure)),
    }
    with self._writing():
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(pure),
          record=ocp.args.JsonSave(record_lib.seal(record)),
        ),
        metrics=numbers,
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
    """Restores a step into the structure, dtypes and placement of `target`.

    Args:
      target: what was saved, as arrays or `jax.ShapeDtypeStruct`s.
      step: by default the newest intact one. Newer ones, which are damaged, are
        set aside, their folders renamed to damaged_STEP, with a warning.
      config: the run's present config, to be compared with the saved one.

    Returns:
      The arrays, and what was saved with them.

    Raises:
      UsageError: there is no such step, it is damaged, or it does not fit
        `target`.
    """
    latest = self.latest()
    steps = [
      each
      for each in reversed(self.steps())
      if latest is not None and each <= latest
    ]
    if not steps or (step is not None and step not in steps):
      raise UsageError(
        f"{self.directory} holds no step {step}; it holds "
        f"{sorted(steps) or 'none'}"
      )
    damaged: dict[int, str] = {}
    for each in steps if step is None else [step]:
      try:
        restored = self._restore(each, target, config)
      except _DamageError as error:
        damaged[each] = str(error)
        continue
      for newer, sentence in damaged.items():
        where = "" if self._read_only else f", {self._set_aside(newer)} now"
        logging.warning("%s%s", sentence, where)
      return restored._replace(damaged=tuple(damaged.values()))
    raise UsageError(
      f"{'; '.join(damaged.values())}; no intact step is left in "
      f"{self.directory}; take another --workdir"
      if step is None
      else f"{damaged[step]}; leave the step out for the newest intact one"
    )

  def steps(self) -> list[int]:
    """Returns the steps that are there, intact or not, the oldest first."""
    return sorted(self._manager.all_steps())

  def read(self, step: int) -> Mapping[str, Any]:
    """Returns what was saved of a step beside its arrays.

    That is its "step", "config" (field -> value), "data", "metrics", "versions"
    of libraries, and of its "arrays" by path shape, dtype and checksum.

    Raises:
      UsageError: it cannot be read.
    """
    try:
      return self._read(step)
    except _DamageError as error:
      raise UsageError(str(error)) from None

  def verify(self, step: int) -> None:
    """Reads a step, every array of it on one device, and checks it.

    Raises:
      UsageError: it is damaged; the sentence names what is.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
      saved = self._manager.item_metadata(step).state.tree
      described = self._read(step)["arrays"]
      target = jax.tree_util.tree_map_with_path(
        lambda path, _: record_lib.target(described[leaf_path(path)], device),
        saved,
      )
    except Exception as error:  # Whatever reading a damaged file leads to.
      raise UsageError(
        str(error)
        if isinstance(error, _DamageError)
        else f"step {step} in {self.directory} cannot be read "
        f"({_first_line(error)})"
      ) from None
    self.restore(target, step=step)

  def wait(self) -> None:
    """Waits for the save under way; raises what it raised."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save under way and closes the directory."""
    try:
      with self._writing():
        self._manager.close()
    finally:
      if self._lock is not None:
        os.close(self._lock)
        self._lock = None

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(
    self,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def _restore(
    self, step: int, target: Any, config: ConfigDict | None
  ) -> Restored:
    record = self._read(step)
    changed = record_lib.changed(record["config"], config)
    pure = _pure(target)
    self._check_fit(step, pure, record["arrays"], changed)
    described = record["arrays"]

    def as_saved(path, leaf):
      if not hasattr(leaf, "dtype") or _is_key(leaf):
        return leaf
      return jax.ShapeDtypeStruct(
        leaf.shape,
        jnp.dtype(described[leaf_path(path)]["dtype"]),
        sharding=getattr(leaf, "sharding", None),
      )

    wanted = jax.tree_util.tree_map_with_path(as_saved, pure)
    arrays = self._load(
      step,
      "state",
      ocp.StandardCheckpointHandler(),
      ocp.args.StandardRestore(wanted),
    )
    found = record_lib.describe(arrays, checksums(arrays))
    wrong = [path for path in described if found[path] != described[path]]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    if wrong:
      raise _DamageError(
        f"array {', '.join(wrong[:3])}{more} of step {step} in "
        f"{self.directory} is damaged"
      )
    arrays = jax.tree.map(_cast, arrays, pure)
    return Restored(step, _like(target, arrays), record["data"], changed)

  def _read(self, step: int) -> Mapping[str, Any]:
    """Returns the record of a step."""
    return self._load(
      step,
      "record",
      ocp.JsonCheckpointHandler(),
      ocp.args.JsonRestore(),
      record_lib.unseal,
    )

  def _load(self, step: int, item: str, *how: Any) -> Any:
    """Returns an item of a step; see `read_item`."""
    self.wait()
    try:
      return read_item(os.path.join(self.directory, str(step), item), *how)
    except OSError as error:
      raise _DamageError(
        f"step {step} in {self.directory} cannot be read ({error})"
      ) from None

  def _set_aside(self, step: int) -> str:
    """Renames the folder of a step, so that the step can be saved again."""
    aside = os.path.join(self.directory, f"damaged_{step}")
    if jax.process_index() == 0:
      while os.path.exists(aside):
        aside += "_"
      os.rename(os.path.join(self.directory, str(step)), aside)
    multihost_utils.sync_global_devices("a damaged step is set aside")
    self._manager.reload()
    return aside

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says in one sentence why nothing can be written."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      there = [
        int(name) for name in os.listdir(self.directory) if name.isdecimal()
      ]
      raise UsageError(
        f"saving into {self.directory} failed ({_first_line(error)}); it holds "
        f"steps {sorted(there) or 'none'}; make room, or free the way, and the "
        "same command resumes"
      ) from error

  def _check_fit(
    self,
    step: int,
    target: Any,
    described: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
  ) -> None:
    differences = record_lib.differences(described, target)
    if differences:
      more = len(differences) - 3
      raise UsageError(
        f"step {step} in {self.directory} does not fit this run "
        f"({', '.join(differences[:3])}{f' and {more} more' * (more > 0)}): "
        f"{record_lib.blame(changed)}; "
        "go back to the saved values, or carry over what fits: another "
        f"--workdir and --config.init_from={self.directory}"
      )


def read_item(
  path: str | os.PathLike[str],
  handler: Any,
  args: Any,
  convert: Callable[[Any], Any] = lambda item: item,
) -> Any:
  """Restores an item that Orbax wrote, on every process or on none.

  Orbax's own checkpointers wait for all processes after a restore (0.12.8); one
  that could not read would leave the others there.

  Args:
    path: of the item's folder.
    handler: an Orbax handler.
    args: its restore's.
    convert: what else has to succeed with what was read.

  Raises:
    OSError: a process could not read it.
  """
  problem, item = "", None
  try:
    item = convert(handler.restore(Path(path), args=args))
  except Exception as error:  # Whatever reading a damaged file leads to.
    problem = _first_line(error)
  fine = multihost_utils.process_allgather(np.array(not problem))
  if not np.all(fine):
    raise OSError(problem or "by another process")
  return item


def _lock_for_all(directory: str) -> int | None:
  """Locks a directory by the first process; if it can't, all raise."""
  held, problem = None, None
  try:
    held = _lock(directory)
  except UsageError as error:
    problem = error
  if not np.all(multihost_utils.process_allgather(np.array(problem is None))):
    raise problem or UsageError(f"process 0 cannot write {directory}")
  return held


def _lock(directory: str) -> int | None:
  """Returns a descriptor that only one run can hold; a kill lets go of it."""
  try:
    os.makedirs(directory, exist_ok=True)
    if jax.process_index() != 0:
      return None
    if not os.access(directory, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    held = os.open(directory, os.O_RDONLY)
  except OSError as error:
    raise UsageError(
      f"{directory} cannot be written: {error.strerror}; type --workdir=DIR of "
      "a directory that can"
    ) from None
  try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(held)
    raise UsageError(
      f"another run is writing {directory}; stop it, or take another --workdir"
    ) from None
  except OSError:
    pass  # A file system without locks.
  return held


def _policy(
  keep: int, keep_every: int, best: str
) -> preservation_policy.PreservationPolicy:
  policies: list[Any] = [preservation_policy.LatestN(keep)]
  if keep_every:
    policies.append(preservation_policy.EveryNSteps(keep_every))
  if best:
    name, sign = best.removeprefix("-"), 1 if best.startswith("-") else -1
    policies.append(
      preservation_policy.BestN(
        get_metric_fn=lambda metrics: sign * metrics.get(name, -sign * np.inf),
        n=1,
        keep_checkpoints_without_metrics=False,
      )
    )
  return preservation_policy.AnyPreservationPolicy(policies)


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  arrays, texts = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
  handlers.add("state", ocp.args.StandardSave, arrays)
  handlers.add("state", ocp.args.StandardRestore, arrays)
  handlers.add("record", ocp.args.JsonSave, texts)
  handlers.add("record", ocp.args.JsonRestore, texts)
  return handlers


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cast(leaf: Any, target: Any) -> Any:
  """Returns a leaf in the target's dtype."""
  dtype = getattr(target, "dtype", None)
  if dtype is None or leaf.dtype == dtype:
    return leaf
  return leaf.astype(dtype)


def _pure(state: Any) -> Any:
  return nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state


def _like(target: Any, arrays: Any) -> Any:
  """Undoes `_pure`: gives restored arrays the structure of `target`."""
  if not isinstance(target, nnx.State):
    return arrays
  state = jax.tree.map(lambda leaf: leaf, target)
  nnx.replace_by_pure_dict(state, arrays)
  return state


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )
