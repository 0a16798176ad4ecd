"""Checkpoints of a whole run, on Orbax."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from flax_mechanic.checkpoints import record as record_lib
from flax_mechanic.checkpoints import savable
from flax_mechanic.checkpoints.arrays import (
  DamageError,
  SavedArrays,
  check_size,
  describe,
  described,
  generators,
)
from flax_mechanic.checkpoints.checksum import checksums
from flax_mechanic.checkpoints.lock import Lock
from flax_mechanic.checkpoints.renamed import saved_paths, unknown
from flax_mechanic.checkpoints.retention import Retention
from flax_mechanic.checkpoints.storage import failure, storage, trouble
from flax_mechanic.errors import UsageError, first_line, no_room, printable
from flax_mechanic.paths import by_path, leaf_path

# How often a reader tries again, beside a run that deletes steps.
_OPENINGS = 9

# Each can be cast to the ones after it.
_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


class Restored(NamedTuple):
  """What `Checkpointer.restore` returns.

  Attributes:
    step: the step that was saved.
    state: the arrays, in the target's structure, dtypes and placement.
    data: the position in the data, as it was saved.
    changed: config field -> (saved value, present value), where they differ.
    damaged: a sentence for each newer step that is damaged.
    versions: library -> (version that saved, present version), where they
      differ.
  """

  step: int
  state: Any
  data: Mapping[str, Any]
  changed: Mapping[str, tuple[Any, Any]]
  damaged: Sequence[str] = ()
  versions: Mapping[str, tuple[Any, Any]] = MappingProxyType({})


class Checkpointer:
  """Saves and restores a run: arrays, position in the data, config.

  Saving is asynchronous and atomic: a kill at any instant leaves the earlier
  steps intact. Every array has a checksum that does not depend on its sharding
  and is verified after every restore. As a context manager it waits for the
  last save at its end.

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
      directory: step N is saved in its subfolder N. It may be in a bucket:
        gs://BUCKET/FOLDER.
      keep: how many of the newest steps to keep, at least 1.
      keep_every: steps that are multiples of it are kept forever; 0 for none,
        and 1 for all.
      best: the name of a metric, such as "eval/loss". The step with its
        smallest value is kept as well; after a minus sign, as in
        "-eval/accuracy", the step with its largest.
      read_only: whether to only read, beside a run that may be writing.

    Raises:
      UsageError: the directory cannot be written, another run is writing it, a
        step in it is a link, a file a pipe, or Orbax would lose what it saves
        there, as in a folder with a bracket in its path; or `keep` or
        `keep_every` is too small.
    """
    if keep < 1 or keep_every < 0:
      raise UsageError(
        f"keep={keep} must be at least 1, and keep_every={keep_every} at least "
        "0; to keep all steps, type keep_every=1"
      )
    self._storage = storage(directory)
    self.directory = self._storage.directory
    self._read_only = read_only
    self._storage.check_kinds(read_only)
    self._lock = None if read_only else Lock(self._storage)
    try:
      self._retention = Retention(self._storage, keep, keep_every, best)
      self._manager = self._open()
    except BaseException:
      if self._lock is not None:
        self._lock.release()
      raise

  def _open(self) -> ocp.CheckpointManager:
    """Finishes what a run that was killed was deleting, and opens the steps."""
    if not self._read_only:
      if jax.process_index() == 0:
        self._retention.finish()
        self._storage.clean()
      multihost_utils.sync_global_devices("deleted steps are gone")
    own = {} if self._read_only else self._storage.options
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._retention,
      **own,
      read_only=self._read_only,
      create=not self._read_only,
      save_interval_steps=0 if self._read_only else 1,
      # Otherwise threads wait for minutes for a folder that a full disk has no
      # room for, and the process with them (0.12.8).
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    try:
      return _manager(self.directory, options)
    except (ValueError, TypeError, RecursionError) as error:
      problem = (
        failure(self.directory, "cannot be read", error)
        if trouble(self.directory, error)
        else UsageError(
          f"{self.directory} cannot be opened ({first_line(error)}); if the "
          "_CHECKPOINT_METADATA of a step is damaged, delete that file"
        )
      )
      raise problem from error

  def latest(self) -> int | None:
    """Returns the newest step, or None.

    Of several processes all have to call it; all get what the first one sees.
    """
    latest = max(self.steps(), default=-1)
    found = multihost_utils.broadcast_one_to_all(np.int32(latest))
    return int(found) if found >= 0 else None

  def save(
    self,
    step: int,
    state: Any,
    *,
    config: Any = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts a save, and returns as soon as the arrays may be donated.

    Args:
      step: must be above `latest()`, and fit in an int32.
      state: an `nnx.State` or any other pytree of arrays.
      config: the run's config, an ml_collections one or any that
        `make_optimizer` takes, such as a dataclass.
      data: the position in the data, anything JSON can hold, and arrays, which
        come back as lists.
      metrics: the step's metrics, numbers, by which `best` chooses.

    Raises:
      ValueError: `step` is not above `latest()`.
      UsageError: this save, or the one before it, cannot be written, or what
        was given could not be read again, such as a metric that is None, an
        array without elements, or two with one path: {"a/b": x, "a": {"b": y}}.
    """
    if self._read_only:
      raise UsageError(
        f"nothing is saved into {self.directory}, which was opened with "
        "read_only=True; open it without"
      )
    step, numbers = savable.as_step(step), savable.as_metrics(metrics)
    pure = _pure(state)
    savable.check_state(pure)
    arrays = jax.tree.map(_array, pure)
    record = {
      "step": step,
      "config": record_lib.flat_config(config),
      "data": savable.as_data(data),
      "metrics": numbers,
      "versions": record_lib.versions(),
      "arrays": describe(arrays, checksums(arrays)),
    }
    steps = self.steps()
    if steps and step <= steps[-1]:
      raise ValueError(
        f"step {step} was not saved: {self.directory} holds step {steps[-1]} "
        "already"
      )
    if self._lock is not None:
      self._lock.check()
    self._retention.saving(step, numbers)
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(pure),
          record=ocp.args.JsonSave(record_lib.seal(record)),
        ),
        metrics=numbers,
        # Orbax would not save below a number that is no step, such as a date.
        force=True,
      )

  def restore(
    self,
    target: Any,
    *,
    step: int | None = None,
    config: Any = None,
    part: bool = False,
  ) -> Restored:
    """Restores a step into the structure, dtypes and placement of `target`.

    Args:
      target: what was saved, as arrays, `jax.ShapeDtypeStruct`s or Python
        numbers. To each of them what was saved is cast, but not a float to an
        int, and no int that is too large.
      step: by default the newest intact one. Newer steps, all damaged, are set
        aside with a warning: their folders are renamed to damaged_STEP, or
        marked in a bucket.
      config: the run's present config, to be compared with the saved one.
        Another optimizer, base, `groups`, `variant` of Mechanic or
        `accumulate_steps` does not fit.
      part: whether `target` may be a part of what was saved. Nothing else is
        read then, or verified.

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
    if not steps:
      raise UsageError(
        f"{self.directory} holds no checkpoint; name the folder that a run has "
        "saved into"
      )
    if step is not None and step not in steps:
      raise UsageError(
        f"{self.directory} holds no step {step}; it holds {sorted(steps)}"
      )
    damaged: dict[int, str] = {}
    for each in steps if step is None else [step]:
      try:
        restored = self._restore(each, target, config, part)
      except DamageError as error:
        damaged[each] = str(error)
        continue
      for newer, sentence in damaged.items():
        moved = "" if self._read_only else f"; {self._set_aside(newer)}"
        logging.warning("%s", printable(f"{sentence}{moved}"))
      return restored._replace(damaged=tuple(damaged.values()))
    raise UsageError(
      f"{'; '.join(damaged.values())}; no intact step is left in "
      f"{self.directory}; take another --workdir"
      if step is None
      else f"{damaged[step]}; leave the step out for the newest intact one"
    )

  def steps(self) -> list[int]:
    """Returns all steps, intact or not, the oldest first.

    A folder whose name is a larger number than an int32 can hold, such as a
    date and time, is no step. With `read_only` they are those of the opening
    that the run has not deleted since.
    """
    steps = sorted(
      step for step in self._manager.all_steps() if step < savable.STEPS
    )
    if not self._read_only:
      return steps
    deleting = self._retention.deleting()
    return [
      step
      for step in steps
      if step not in deleting and self._folder(step)[0].is_dir()
    ]

  def is_best(self, metrics: Mapping[str, float]) -> bool:
    """Returns whether no step that was saved has as good a value of `best`.

    Args:
      metrics: of a step that is not saved; without that of `best`, or with a
        NaN, they are no better.

    Example:
      >>> import tempfile
      >>> with Checkpointer(tempfile.mkdtemp(), best="loss") as checkpointer:
      ...   checkpointer.save(1, {"w": 1.0}, metrics={"loss": 0.5})
      ...   [checkpointer.is_best({"loss": loss}) for loss in (0.4, 0.5)]
      [True, False]
    """
    return self._retention.is_best(metrics, self.steps())

  def read(self, step: int) -> Mapping[str, Any]:
    """Returns what was saved of a step beside its arrays.

    That is "step", "config" (field -> value), "data", "metrics", "versions"
    (library -> version) and "arrays" (path -> shape, dtype and checksum).

    Raises:
      UsageError: it cannot be read.
    """
    try:
      return self._read(step)
    except DamageError as error:
      raise UsageError(str(error)) from None

  def verify(self, step: int) -> None:
    """Reads every array of a step onto one device and checks it.

    Raises:
      UsageError: the step is damaged; the message names what is.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
      descriptions = self._read(step)["arrays"]
      check_size(*self._folder(step), descriptions)
      wanted = {
        path: described(each, device) for path, each in descriptions.items()
      }
      self._arrays(step).read(wanted, descriptions)
    except DamageError as error:
      raise UsageError(str(error)) from None

  def wait(self) -> None:
    """Waits for the save in progress, and raises what it raised."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in progress and closes the directory."""
    try:
      with self._writing():
        self._manager.close()
      if not self._read_only:
        self._retention.deleted()
    finally:
      if self._lock is not None:
        self._lock.release()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def _restore(
    self, step: int, target: Any, config: Any, part: bool
  ) -> Restored:
    record = self._read(step)
    changed = record_lib.changed(record["config"], config)
    pure, descriptions = _pure(target), record["arrays"]
    leaves = by_path(pure)
    sources = saved_paths(leaves, descriptions)
    kinds = {
      path: (descriptions[source]["dtype"], _kind(leaves[path]))
      for path, source in sources.items()
      if _is_lossy(descriptions[source], leaves[path])
    }
    differences = [
      *record_lib.differences(descriptions, pure, part=part),
      *(f"{path} is {a} there and {b} here" for path, (a, b) in kinds.items()),
    ]
    meaning = record_lib.meaning(record["config"]).keys() & changed.keys()
    if meaning and not differences and not part:
      differences = ["the optimizer's state means something else"]
      changed = {field: changed[field] for field in meaning}
    blame = _blame(changed, kinds.values(), config)
    self._check_fit(step, differences, blame, config)
    if self._read_only:  # The target may be what the folder asks for.
      check_size(*self._folder(step), descriptions)
    found = self._arrays(step).read(
      {source: leaves[path] for path, source in sources.items()}, descriptions
    )

    self._check_casts(step, leaves, sources, found)

    def value(path, leaf):
      if (source := sources.get(leaf_path(path))) is None:
        sharding = getattr(leaf, "sharding", None)
        start = unknown(leaf_path(path))
        return jnp.full(leaf.shape, start, leaf.dtype, device=sharding)
      return _cast(found[source], leaf)

    arrays = jax.tree_util.tree_map_with_path(value, pure)
    return Restored(
      step,
      _like(target, arrays),
      record["data"],
      changed,
      versions=record_lib.differing(record["versions"], record_lib.versions()),
    )

  def _check_casts(
    self,
    step: int,
    targets: Mapping[str, Any],
    sources: Mapping[str, str],
    found: Mapping[str, Any],
  ) -> None:
    """Raises a UsageError, on all processes alike, for ints that are too large.

    Args:
      step: that was read.
      targets: path -> what is restored.
      sources: path -> that of what was saved.
      found: that path -> array.
    """
    narrower = {
      path: found[source]
      for path, source in sources.items()
      if _is_narrower(found[source], targets[path])
    }
    if not narrower:
      return
    fits = [_fits(each, targets[path].dtype) for path, each in narrower.items()]
    fits = np.reshape(
      multihost_utils.process_allgather(np.array(fits)), (-1, len(narrower))
    )
    for (path, array), fit in zip(
      narrower.items(), np.logical_and.reduce(fits), strict=True
    ):
      if not fit:
        raise UsageError(
          f"array {path} of {self._folder(step)[1]} is too large for "
          f"{targets[path].dtype}; restore it into {array.dtype}"
        )

  def _read(self, step: int) -> Mapping[str, Any]:
    """Returns the record of a step."""
    self.wait()
    folder, name = self._folder(step)
    record = record_lib.read(folder, name)
    if record["step"] != step:
      raise DamageError(f"{name} was saved as step {record['step']}")
    return record

  def _arrays(self, step: int) -> SavedArrays:
    """Returns the arrays of a step."""
    folder, name = self._folder(step)
    return SavedArrays(folder / "state", name)

  def _folder(self, step: int) -> tuple[Any, str]:
    """Returns the folder of a step, and what errors call it."""
    return (
      self._storage.path / str(step),
      f"step {step} in {self.directory}",
    )

  def _set_aside(self, step: int) -> str:
    """Makes room for a step to be saved again, and says where it is now."""
    moved = self._storage.set_aside(step)
    self._manager.reload()
    return moved

  def _names(self) -> list[int]:
    """Returns the numbers among the names of folders."""
    names = [each.name for each in self._storage.path.iterdir()]
    return [int(name) for name in names if name.isdecimal()]

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises a UsageError that says why nothing can be written."""
    try:
      yield
    except Exception as error:
      reason = trouble(self.directory, error)
      if not reason and not isinstance(
        error, OSError | ValueError | RuntimeError
      ):
        raise
      steps = self._manager.all_steps() if reason else self._names()
      advice = "" if reason else "make room, or make it writable, and "
      raise UsageError(
        f"saving into {self.directory} failed "
        f"({reason or no_room(error) or first_line(error)}); it holds steps "
        f"{sorted(steps) or 'none'}; {advice}the same command resumes"
      ) from error

  def _check_fit(
    self,
    step: int,
    differences: Sequence[str],
    blame: str,
    config: Any,
  ) -> None:
    if differences:
      more = len(differences) - 3
      otherwise = (
        "the init_from of Optimizer or TrainState"
        if config is None
        else f"another --workdir and --config.init_from={self.directory}"
      )
      raise UsageError(
        f"step {step} in {self.directory} does not fit this run "
        f"({', '.join(differences[:3])}{f' and {more} more' * (more > 0)}): "
        f"{blame}; set it back, or carry over what fits with {otherwise}"
      )


def _manager(
  directory: str, options: ocp.CheckpointManagerOptions
) -> ocp.CheckpointManager:
  """Opens a directory again if a step was deleted while Orbax listed it."""
  for _ in range(_OPENINGS if options.read_only else 0):
    with contextlib.suppress(FileNotFoundError):
      return ocp.CheckpointManager(directory, options=options)
  return ocp.CheckpointManager(directory, options=options)


def _array(leaf: Any) -> Any:
  """Returns a Python number as NumPy's array, and an array as it is."""
  return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _kind(leaf: Any) -> str:
  """Returns the dtype of an array, and the type of a Python number."""
  return str(getattr(leaf, "dtype", type(leaf).__name__))


def _is_lossy(saved: Mapping[str, Any], target: Any) -> bool:
  """Whether a cast to the target loses what was saved, as of float to int."""
  if saved["dtype"] == _kind(target):
    return False
  dtypes = [_array(leaf).dtype for leaf in (described(saved, None), target)]
  if any(jnp.issubdtype(each, jax.dtypes.prng_key) for each in dtypes):
    return True
  kinds = [
    next((i for i, kind in enumerate(_KINDS) if jnp.issubdtype(each, kind)), -1)
    for each in dtypes
  ]
  return kinds[0] > kinds[1]


def _is_narrower(saved: Any, target: Any) -> bool:
  """Whether integers are cast to a dtype that does not hold all of them."""
  dtypes = [getattr(each, "dtype", jnp.bool_) for each in (saved, target)]
  if not all(jnp.issubdtype(each, jnp.integer) for each in dtypes):
    return False
  old, new = map(jnp.iinfo, dtypes)
  return old.min < new.min or new.max < old.max


def _fits(array: Any, dtype: Any) -> bool:
  """Whether a dtype holds those integers of an array that this process has."""
  parts = (
    [each.data for each in array.addressable_shards if each.replica_id == 0]
    if isinstance(array, jax.Array)
    else [array]
  )
  info = jnp.iinfo(dtype)
  return all(
    # By NumPy: jax would refuse one device's part where a mesh is set.
    info.min <= int(part.min()) and int(part.max()) <= info.max
    for part in map(np.asarray, parts)
  )


def _blame(
  changed: Mapping[str, tuple[Any, Any]],
  kinds: Iterable[tuple[str, str]],
  config: Any,
) -> str:
  """Says what may have changed the state.

  Args:
    changed: config field -> (saved, present value).
    kinds: saved and present dtypes that cannot be cast to each other.
    config: the present one, or None.
  """
  for saved, present in kinds:
    if {saved, present} <= generators().keys():
      return (
        f"its random keys are of {generators()[saved]} and this run's of "
        f"{generators()[present]}, which JAX_DEFAULT_PRNG_IMPL chooses"
      )
  if config is None:
    return (
      "the optimizer, the model or an option has changed, and "
      "restore(..., config=config) names the option"
    )
  return record_lib.blame(changed)


def _cast(leaf: Any, target: Any) -> Any:
  """Returns a leaf in the target's dtype, or as a Python number."""
  dtype = getattr(target, "dtype", None)
  if dtype is None:
    return type(target)(leaf.item())
  return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def _pure(state: Any) -> Any:
  return nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state


def _like(target: Any, arrays: Any) -> Any:
  """Gives restored arrays, a tree like `_pure(target)`, target's structure."""
  if not isinstance(target, nnx.State):
    return arrays
  state = jax.tree.map(lambda leaf: leaf, target)
  nnx.replace_by_pure_dict(state, arrays)
  return state
