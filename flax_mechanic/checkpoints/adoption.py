"""Starts a run from another's checkpoint: one of ours, or a plain Orbax job's.

Only names in the checkpoint are relied on. A parameter is found by its path; a
state of optax, such as Adam's count, mu and nu, by the names of its fields,
wherever it is nested, so that Adam's moments are found under Mechanic.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flax_mechanic.checkpoints import record as record_lib
from flax_mechanic.checkpoints import storage
from flax_mechanic.checkpoints.arrays import (
  DamageError,
  Descriptions,
  SavedArrays,
)
from flax_mechanic.checkpoints.renamed import TUNER, former, is_size
from flax_mechanic.errors import UsageError
from flax_mechanic.paths import by_path, leaf_path
from flax_mechanic.placement import on_device

_OFFSETS = ("x0", "delta")
# How prefixes of parameters usually end.
_USUAL = re.compile(r"(?:(?:^|(?<=/))(?:params|model)/)+$")

# The fields of each of optax's states.
_STATES = [
  set(each._fields)
  for each in (*vars(optax).values(), *vars(optax.contrib).values())
  if hasattr(each, "_fields")
]

# Field -> path of a parameter, or "" for a field that is one leaf -> path.
_Fields = Mapping[str, Mapping[str, str]]
# Path of a state of optax -> its fields.
_States = Mapping[str, _Fields]


class Adopted(NamedTuple):
  """What `adopt` returns.

  Attributes:
    params: a tree like the parameters.
    opt_state: the optimizer's state over them.
    notes: sentences on what was taken and what restarts.
  """

  params: optax.Params
  opt_state: optax.OptState
  notes: Sequence[str]


def load_params(
  directory: str | os.PathLike[str], params: optax.Params
) -> optax.Params:
  """Loads parameters, or anything else with their paths, of another run.

  Args:
    directory: a run's --workdir, or a folder that Orbax wrote: of several
      steps, of which the newest is taken, of one step, or of one item. It may
      be in a bucket: gs://BUCKET/FOLDER.
    params: a tree of arrays, or of their shapes, dtypes and shardings. Each is
      read straight into its placement, and cast. The folder may hold more.

  Returns:
    A tree like `params`.

  Raises:
    UsageError: they are not there, have other shapes, or are damaged; or there
      are none in `params`.

  Example:
    >>> import tempfile
    >>> from flax_mechanic import Checkpointer
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.save(7, {"params": {"w": jnp.ones(2)}})
    ...   checkpointer.wait()
    ...   load_params(checkpointer.directory, {"w": jnp.zeros(2)})
    {'w': Array([1., 1.], dtype=float32)}
  """
  return _load_params(_Checkpoint(directory), params)[0]


def adopt(
  directory: str | os.PathLike[str],
  params: optax.Params,
  init: Callable[[optax.Params], optax.OptState],
  *,
  params_only: bool = False,
  new: Collection[str] = (),
  config: Any = None,
) -> Adopted:
  """Starts an optimizer where another run's checkpoint ended.

  Under Mechanic, the moments of a plain adamw, sgd or lion run are kept, and
  the tuner restarts with the parameters as x0. A run of Mechanic, ours or
  `optax.contrib.mechanize`'s, keeps its tuner too; x0 and Delta are recovered
  from each other where only one of them was saved. Schedules restart.

  Args:
    directory: as for `load_params`.
    params: as for `load_params`.
    init: parameters -> the optimizer's state, its arrays placed where they
      belong, such as `tx.init`.
    params_only: whether to ignore the saved optimizer's state.
    new: paths, such as "head/kernel", of parameters that the folder may lack;
      those that it lacks stay as they are in `params`.
    config: the new run's, to be compared with one that `Checkpointer` saved:
      the tuner restarts if its `groups`, `variant` or base are others. Without
      it, that is told by shapes and the names of fields alone.

  Returns:
    The parameters, the state over them, and notes on both.

  Raises:
    UsageError: as `load_params`; or a parameter is not finite.

  Example:
    >>> import tempfile
    >>> from flax_mechanic import Checkpointer, mechanize
    >>> tx, params = optax.sgd(1.0, momentum=0.9), {"w": jnp.ones(2)}
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.save(7, {"params": params, "opt_state": tx.init(params)})
    ...   checkpointer.wait()
    ...   adopted = adopt(checkpointer.directory, params, mechanize(tx).init)
    >>> adopted.notes[1].split("; ")[0]
    'taken from its optimizer: trace'
  """
  saved = _Checkpoint(directory)
  params, missing, where = _load_params(saved, params, new)
  _check_finite(params, where)
  notes = [f"starting from {where}"]
  if missing:
    notes.append(f"not in it, and new: {len(missing)} parameters")
  opt_state = init(params)
  if not params_only:
    keeps_tuner = record_lib.same_tuner(
      saved.config, record_lib.flat_config(config)
    )
    opt_state, note = _load_opt_state(saved, params, opt_state, keeps_tuner)
    notes.append(note)
  return Adopted(params, opt_state, notes)


class _Checkpoint:
  """A checkpoint that Orbax wrote, of one or more items.

  Attributes:
    name: its folder, that of the newest step if there are several.
    shapes: `_unboxed` path of a leaf -> its shape. The path starts with the
      item's name.
    config: field -> value, if a run of ours saved it.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    given = storage.path(directory)
    if not storage.is_bucket(given):
      given = given.absolute()
    self.name, self._folders = _find(given)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.config: Mapping[str, Any] = {}
    self._items: list[_Item] = []
    for name, folder in self._folders.items():
      with _advice():
        arrays = SavedArrays(folder, self.name)
        record = _record(folder, self.name)
      paths = {}
      for path, shape in arrays.shapes.items():
        short = _unboxed(path)
        full = f"{name}/{short}" if name else short
        paths[full], self.shapes[full] = path, shape
      self.config = record.get("config", self.config)
      self._items.append(_Item(arrays, paths, record.get("arrays")))

  def load(self, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns path -> array, placed and cast as wanted.

    Args:
      wanted: path -> an array, or a shape, dtype and sharding.
    """
    loaded: dict[str, jax.Array] = {}
    for item in self._items:
      paths = {each: item.paths[each] for each in wanted if each in item.paths}
      if not paths:
        continue
      with _advice():
        found = item.arrays.read(
          {path: wanted[each] for each, path in paths.items()},
          item.descriptions,
        )
      loaded |= {
        each: found[path].astype(wanted[each].dtype)
        for each, path in paths.items()
      }
    return loaded

  def where(self, prefix: str) -> str:
    """Returns the folder of the tree at a prefix, a step or one alone."""
    folder = self._folders.get(prefix.partition("/")[0])
    if folder is None or _is_step(folder.parent):
      return self.name
    return str(folder)


class _Item(NamedTuple):
  """An item of a checkpoint.

  Attributes:
    arrays: its arrays.
    paths: path in `_Checkpoint.shapes` -> path in `arrays`.
    descriptions: what a run of ours saved of them, to verify them.
  """

  arrays: SavedArrays
  paths: Mapping[str, str]
  descriptions: Descriptions | None


def _unboxed(path: str) -> str:
  """Returns a leaf's path without the name of what an NNX variable or Linen's
  `Partitioned` holds.

  A parameter that is called so itself loses it here and in what was saved.
  """
  return path.removesuffix("/value")


def _name(path: Any) -> str:
  return _unboxed(leaf_path(path))


def _record(item: Any, name: str) -> Mapping[str, Any]:
  """Returns what a run of ours saved beside an item, if it is of one."""
  if item.name != "state" or not (item.parent / "record").is_dir():
    return {}
  record = record_lib.read(item.parent, name)
  number = item.parent.name
  if number.isdecimal() and int(number) != record["step"]:
    raise UsageError(
      f"{item.parent} was saved as step {record['step']}; rename the folder to "
      f"{record['step']}, or name the folder of another step"
    )
  return record


@contextlib.contextmanager
def _advice() -> Iterator[None]:
  """Says what to do about damage."""
  try:
    yield
  except DamageError as error:
    raise UsageError(f"{error}; name the folder of another step") from None


def _find(given: Any) -> tuple[str, dict[str, Any]]:
  """Returns the newest step's folder, and the folders of its items by name."""
  if not given.is_dir():
    raise UsageError(
      f"{given} is not a directory; name the --workdir of a run, or a folder "
      "that Orbax wrote"
    )
  if (given / "checkpoints").is_dir():
    return _find(given / "checkpoints")
  if (given / "_METADATA").is_file():
    return str(given), {"": given}
  runs = [each.parent for each in given.glob("*/checkpoints") if each.is_dir()]
  if runs and not _is_step(given):
    names = sorted(run.name for run in runs)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UsageError(
      f"{given} is a folder of runs, {', '.join(names[:3])}{more}; name one of "
      f"them, such as {given / names[0]}, or another folder in it"
    )
  items = {each.parent.name: each.parent for each in given.glob("*/_METADATA")}
  # A folder of steps of one item each looks the same, but is not described.
  if items and (_is_step(given) or not any(map(_is_numbered, items))):
    return str(given), items
  saved = [
    each
    for each in given.iterdir()
    if storage.is_complete(each)
    and any(file.name == "_METADATA" for file, _ in storage.files(each))
  ]
  steps = [
    each
    for each in saved
    if _is_numbered(each.name) and not each.name.startswith("damaged_")
  ]
  if not saved:
    raise UsageError(f"{given} holds no checkpoint that Orbax wrote")
  if not steps:
    raise UsageError(
      f"{given} holds no step under its number; name one of its folders, such "
      f"as {max(saved)}"
    )
  return _find(max(steps, key=lambda step: int(step.name.split("_")[-1])))


def _is_step(folder: Any) -> bool:
  """Whether Orbax describes a folder as one step."""
  return (folder / "_CHECKPOINT_METADATA").is_file()


def _is_numbered(name: str) -> bool:
  """Whether a folder's name is a step's, such as "12" or "checkpoint_12"."""
  return bool(re.fullmatch(r"(.*_)?\d+", name))


def _load_params(
  saved: _Checkpoint, params: optax.Params, new: Collection[str] = ()
) -> tuple[optax.Params, Sequence[str], str]:
  """Returns the parameters, the paths of those that were not saved, and the
  folder of the others.
  """
  wanted = by_path(params, _name)
  prefix = _prefix(saved, [path for path in wanted if path not in new])
  missing = [path for path in wanted if prefix + path not in saved.shapes]
  wanted = {k: v for k, v in wanted.items() if k not in missing}
  other = [
    f"{path} has shape {saved.shapes[prefix + path]} there and "
    f"{tuple(leaf.shape)} here"
    for path, leaf in wanted.items()
    if saved.shapes[prefix + path] != leaf.shape
  ]
  if other:
    raise UsageError(
      f"the parameters in {saved.name} are of another model: "
      f"{', '.join(other[:3])}; train the model that was saved"
    )
  loaded = saved.load({prefix + path: leaf for path, leaf in wanted.items()})
  found = jax.tree_util.tree_map_with_path(
    lambda path, leaf: loaded.get(prefix + _name(path), leaf), params
  )
  return found, missing, saved.where(prefix)


def _check_finite(params: optax.Params, where: str) -> None:
  """Raises a UsageError, on all processes alike, for a NaN or an Inf."""
  leaves = by_path(params, _name)
  # Device -> its part of each array. No program has a collective.
  parts: dict[Any, dict[str, jax.Array]] = {}
  for path, leaf in leaves.items():
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
      for each in leaf.addressable_shards:
        if each.replica_id == 0:
          parts.setdefault(each.device, {})[path] = on_device(each.data)
  finite = dict.fromkeys(leaves, True)
  for device, arrays in parts.items():
    with jax.set_mesh(Mesh([device], ("device",))):  # A job may have set its.
      found = jax.device_get(_finite(arrays))
    finite |= {path: finite[path] and bool(ok) for path, ok in found.items()}
  votes = np.reshape(
    multihost_utils.process_allgather(np.array([*finite.values()])),
    (-1, len(finite)),
  )
  for path, ok in zip(finite, np.logical_and.reduce(votes), strict=True):
    if not ok:
      raise UsageError(
        f"array {path} of {where} is not finite, so the run had diverged by "
        "then; name the folder of another step"
      )


@jax.jit
def _finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {path: jnp.isfinite(each).all() for path, each in arrays.items()}


def _prefix(saved: _Checkpoint, wanted: Collection[str]) -> str:
  """Returns the prefix of the parameters' paths in what was saved."""
  if not wanted:
    raise UsageError(
      f"no parameter is asked for that {saved.name} has to hold; give the "
      "parameters of the model that was saved"
    )
  first = next(iter(wanted))
  starts = {
    path.removesuffix(first)
    for path in saved.shapes
    if path == first or path.endswith(f"/{first}")
  }
  complete = sorted(
    start for start in starts if all(start + p in saved.shapes for p in wanted)
  )
  if not complete:
    best = max(
      starts or {""},
      key=lambda start: sum(start + p in saved.shapes for p in wanted),
    )
    missing = [path for path in wanted if best + path not in saved.shapes]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise UsageError(
      f"{saved.name} holds no {', '.join(missing[:3])}{more}; train the model "
      "that was saved"
    )
  found = _choose(saved.name, complete)
  if _is_optimizer_s(saved, found):
    raise UsageError(
      f"{saved.name} holds no parameters, only an optimizer's {found[:-1]}; "
      "name the folder that they are in, or one with both in it"
    )
  return found


def _is_optimizer_s(saved: _Checkpoint, prefix: str) -> bool:
  """Whether the tree at a prefix is a field of a state of optax."""
  node, slash, _ = prefix[:-1].rpartition("/")
  inside = [path for path in saved.shapes if path.startswith(node + slash)]
  fields = {path.removeprefix(node + slash).split("/")[0] for path in inside}
  return bool(prefix) and (fields in _STATES or _is_mechanic(fields))


def _choose(name: str, starts: Sequence[str]) -> str:
  """Returns which of the prefixes is that of the parameters.

  An optimizer's trees like the parameters are nested deeper. An average of them
  may not be, but has no optimizer beside it.

  Args:
    name: of the checkpoint.
    starts: the prefixes of all trees like the parameters.
  """
  folder = lambda start: _USUAL.sub("", start)
  depth = lambda start: folder(start).count("/")
  is_within = lambda start, other: start != other and start.startswith(other)
  starts = [s for s in starts if not any(is_within(s, o) for o in starts)]
  least = min(map(depth, starts))
  rivals = [start for start in starts if depth(start) == least]
  trained = [
    start
    for start in rivals
    if any(
      depth(other) > least and other.startswith(folder(start))
      for other in starts
    )
  ]
  for found in (rivals, trained):
    if len(found) == 1:
      return found[0]
  raise UsageError(
    f"{name} holds such parameters under each of {', '.join(rivals)}; name a "
    "folder with one of them, or load one by its path: "
    f"load_params(FOLDER, {{{rivals[0][:-1]!r}: params}})"
  )


def _load_opt_state(
  saved: _Checkpoint,
  params: optax.Params,
  opt_state: optax.OptState,
  keeps_tuner: bool,
) -> tuple[optax.OptState, str]:
  """Returns the state with all that fits of the saved one, and a note on it."""
  leaves, parameters = by_path(opt_state, _name), by_path(params, _name)
  here, there = _states(leaves, parameters), _states(saved.shapes, parameters)
  values: dict[str, jax.Array] = {}
  taken, restarts = set(), set()
  for node, fields in here.items():
    if not _is_mechanic(fields) and not _holds_parameters(fields):
      continue  # A schedule's count, an injected learning rate.
    names = {field.split("/")[0] for field in fields}
    source = _find_state(node, here, there, leaves, saved.shapes)
    if source is None or (_is_mechanic(fields) and not keeps_tuner):
      restarts |= names
      continue
    if _is_mechanic(fields):
      found = _load_mechanic(saved, source, fields, leaves, parameters)
    else:
      pairs = {
        fields[field][key]: source[field][key]
        for field in fields
        for key in fields[field]
      }
      loaded = saved.load({path: leaves[mine] for mine, path in pairs.items()})
      found = {mine: loaded[path] for mine, path in pairs.items()}
    values |= found
    taken |= {
      field.split("/")[0]
      for field, paths in fields.items()
      if found.keys() & paths.values()
    }
  state = jax.tree_util.tree_map_with_path(
    lambda path, leaf: values.get(_name(path), leaf), opt_state
  )
  note = (
    f"taken from its optimizer: {', '.join(sorted(taken))}"
    if taken
    else "nothing of its optimizer fits"
  )
  if restarts - taken:
    note += f"; restarts: {', '.join(sorted(restarts - taken))}"
  return state, note


def _states(
  paths: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, str]]]:
  """Groups the leaves of a state by the states of optax that they belong to.

  Returns:
    Path of a state -> its fields.
  """
  found: dict[str, dict[str, dict[str, str]]] = {}
  for path in paths:
    names = path.split("/")
    starts = range(1, len(names))
    start = next(
      (i for i in starts if "/".join(names[i:]) in parameters), len(names)
    )
    # What is known of gradients' sizes belongs to Mechanic's own state.
    end = start - 2 if start == len(names) and is_size(path) else start - 1
    node, field = "/".join(names[:end]), "/".join(names[end:start])
    fields = found.setdefault(node, {}).setdefault(field, {})
    fields["/".join(names[start:])] = path
  return found


def _find_state(
  node: str,
  here: _States,
  there: _States,
  leaves: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
) -> _Fields | None:
  """Returns the saved state that fits one of the optimizer's, if just one does.

  Args:
    node: path of the optimizer's state.
    here: the optimizer's states.
    there: the saved states.
    leaves: path -> leaf of the optimizer's state.
    shapes: path -> shape of what was saved.
  """
  fields = here[node]
  same_shapes = lambda field, other: all(
    key in other[field] and shapes[other[field][key]] == leaves[path].shape
    for key, path in fields[field].items()
  )
  if _is_mechanic(fields):
    # A scale that was learned for another base means nothing.
    found = [
      other
      for path, other in there.items()
      if _is_mechanic(other)
      and same_shapes("s", other)
      and _has_offsets(fields, other, leaves)
      and _base_fields(path, there) == _base_fields(node, here)
    ]
  else:
    found = [
      other
      for other in there.values()
      if other.keys() == fields.keys()
      and all(same_shapes(field, other) for field in fields)
    ]
  return found[0] if len(found) == 1 else None


def _is_mechanic(fields: Collection[str]) -> bool:
  return set(fields) >= TUNER


def _has_offsets(
  fields: _Fields, source: _Fields, leaves: Mapping[str, Any]
) -> bool:
  """Whether x0 and Delta are there, or can be recovered from each other."""
  missing = [
    (other, key)
    for field, other in (_OFFSETS, _OFFSETS[::-1])
    for key in fields.get(field, {}).keys() - source.get(field, {}).keys()
  ]
  # The state does not say which leaves share the scale of a group.
  groups = leaves[fields["s"][""]].shape[:-1]
  is_known = groups in ((), (len(_offset_keys(fields)),))
  return not missing or (
    is_known and all(key in source.get(other, {}) for other, key in missing)
  )


def _offset_keys(fields: _Fields) -> set[str]:
  """Returns the paths of the parameters that Mechanic's state is over."""
  return set().union(*(fields.get(field, {}) for field in _OFFSETS))


def _base_fields(node: str, states: _States) -> set[frozenset[str]]:
  """Returns the fields of the states inside one that hold parameters."""
  return {
    frozenset(fields)
    for path, fields in states.items()
    if path != node
    and path.startswith(f"{node}/" if node else "")
    and _holds_parameters(fields)
  }


def _holds_parameters(fields: _Fields) -> bool:
  return any(key for keys in fields.values() for key in keys)


def _load_mechanic(
  saved: _Checkpoint,
  source: _Fields,
  fields: _Fields,
  leaves: Mapping[str, Any],
  parameters: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Returns path -> value of Mechanic's state.

  Args:
    saved: the checkpoint.
    source: the saved state's fields.
    fields: the optimizer's.
    leaves: path -> leaf of the optimizer's state.
    parameters: path -> parameter.
  """
  scalars = {}
  for field in fields.keys() - set(_OFFSETS):
    name = field if field in source else former(field)
    if name in source:
      scalars[fields[field][""]] = source[name][""]
  # In the parameters' placement, in which x0 and Delta are recovered.
  offsets = {
    path: jax.ShapeDtypeStruct(
      parameters[key].shape,
      jnp.promote_types(parameters[key].dtype, jnp.float32),
      sharding=parameters[key].sharding,
    )
    for field in _OFFSETS
    for key, path in source.get(field, {}).items()
  }
  wanted = {path: leaves[mine] for mine, path in scalars.items()}
  loaded = saved.load(wanted | offsets)
  values = {mine: loaded[path] for mine, path in scalars.items()}
  # optax's state does not hold it.
  S = values.setdefault(
    fields["scale"][""], jnp.sum(values[fields["s"][""]], -1)
  )
  keys = [key for key in parameters if key in _offset_keys(fields)]
  S_of = lambda key: S[keys.index(key)] if S.ndim else S
  for field, other in (_OFFSETS, _OFFSETS[::-1]):
    for key, mine in fields.get(field, {}).items():
      path = source.get(field, {}).get(key)
      value = (
        loaded[path]
        if path
        else _recover(
          field, parameters[key], S_of(key), loaded[source[other][key]]
        )
      )
      values[mine] = jax.device_put(
        value.astype(leaves[mine].dtype), leaves[mine].sharding
      )
  return values


def _recover(
  field: str, x: jax.Array, S: jax.Array, other: jax.Array
) -> jax.Array:
  """Returns x0 or Delta from the other one, by x = x0 + S Delta."""
  if field == "x0":
    return x - S * other
  return jnp.where(S > 0, (x - other) / S, 0.0)
