"""Starts a run from another's checkpoint: one of ours, or a plain Orbax job's.

Nothing but names is asked of what was saved. A parameter is found by its path;
a state of optax, such as Adam's count, mu and nu, by the names of its fields,
wherever it is nested, so that Adam's moments are found under Mechanic.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from flax_mechanic.checkpoints.checkpointer import Checkpointer, read_item
from flax_mechanic.checkpoints.checksum import checksums
from flax_mechanic.errors import UsageError
from flax_mechanic.paths import by_path, leaf_path

# What makes a state Mechanic's, ours or optax's, whatever it keeps beside it.
_TUNER = frozenset({"r", "m", "v", "s"})

_OFFSETS = ("x0", "delta")

# Field -> path of a parameter, or "" for a leaf of the field's own -> path.
_Fields = Mapping[str, Mapping[str, str]]
# Path of a state of optax -> its fields.
_States = Mapping[str, _Fields]


class Adopted(NamedTuple):
  """What `adopt` returns.

  Attributes:
    params: a tree like the parameters.
    opt_state: the optimizer's state over them.
    notes: sentences on what was taken and what starts afresh.
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
      steps, whose newest is taken, of one step, or of one item.
    params: a tree of arrays, or of their shapes, dtypes and shardings; each is
      read straight into its placement, and cast. The folder may hold more.

  Returns:
    A tree like `params`.

  Raises:
    UsageError: they are not there, have other shapes, or are damaged.

  Example:
    >>> import tempfile
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.save(7, {"params": {"w": jnp.ones(2)}})
    ...   checkpointer.wait()
    ...   load_params(checkpointer.directory, {"w": jnp.zeros(2)})
    {'w': Array([1., 1.], dtype=float32)}
  """
  return _load_params(_Saved(directory), params)


def adopt(
  directory: str | os.PathLike[str],
  params: optax.Params,
  init: Callable[[optax.Params], optax.OptState],
  *,
  params_only: bool = False,
) -> Adopted:
  """Starts an optimizer where another run's checkpoint ended.

  The moments of a plain adamw, sgd or lion run are put under Mechanic, whose
  tuner starts afresh with the parameters as x0; those of a run of
  `optax.contrib.mechanize` are taken with its tuner; x0 becomes Delta, or the
  reverse, if the options say so. Schedules start from 0.

  Args:
    directory: as for `load_params`.
    params: as for `load_params`.
    init: parameters -> the optimizer's state, arrays that lie where they
      belong, such as `tx.init`.
    params_only: whether to leave the saved optimizer's state.

  Returns:
    The parameters, the state over them, and what to tell of both.

  Raises:
    UsageError: as `load_params`.

  Example:
    >>> import tempfile
    >>> from flax_mechanic import mechanize
    >>> tx, params = optax.sgd(1.0, momentum=0.9), {"w": jnp.ones(2)}
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.save(7, {"params": params, "opt_state": tx.init(params)})
    ...   checkpointer.wait()
    ...   adopted = adopt(checkpointer.directory, params, mechanize(tx).init)
    >>> adopted.notes[1].split("; ")[0]
    'of its optimizer trace'
  """
  saved = _Saved(directory)
  params = _load_params(saved, params)
  notes = [f"starting from {saved.name}"]
  opt_state = init(params)
  if not params_only:
    opt_state, told = _load_opt_state(saved, params, opt_state)
    notes.append(told)
  return Adopted(params, opt_state, notes)


class _Saved:
  """A folder that Orbax wrote.

  Attributes:
    name: its path, that of the newest step if there are several.
    shapes: path of a leaf -> its shape; NNX's "value" at the end is left out.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    given = Path(directory).expanduser().absolute()
    self.name, self._items = _find(given)
    self._trees = {item: _metadata(path) for item, path in self._items.items()}
    # An nnx.State's leaves are variables, each with a value.
    self._of_nnx = {
      item: all(path.endswith("/value") for path in by_path(tree))
      for item, tree in self._trees.items()
    }
    self.shapes: dict[str, tuple[int, ...]] = {}
    for item, tree in self._trees.items():
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        self.shapes[self._path(item, path)] = tuple(leaf.shape or ())

  def load(self, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns leaves, placed and cast as those that they are wanted for.

    Args:
      wanted: path -> an array, or a shape, dtype and sharding.
    """
    loaded: dict[str, jax.Array] = {}
    for item, tree in self._trees.items():

      def as_saved(path, leaf, item=item):
        like = wanted.get(self._path(item, path))
        if like is None:
          return ocp.PLACEHOLDER
        return jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=getattr(like, "sharding", None)
        )

      target = jax.tree_util.tree_map_with_path(as_saved, tree)
      if all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(target)):
        continue
      restored = _read(
        self._items[item],
        ocp.args.PyTreeRestore(
          item=target,
          restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        ),
      )
      found = {
        self._path(item, path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
        if leaf is not ocp.PLACEHOLDER
      }
      self._verify(item, found)
      loaded |= found
    return {
      path: leaf.astype(wanted[path].dtype) for path, leaf in loaded.items()
    }

  def _path(self, item: str, path: Any) -> str:
    """Returns the path of a leaf of an item, as NNX has it in a model."""
    name = leaf_path(path)
    if self._of_nnx[item]:
      name = name.removesuffix("/value")
    return f"{item}/{name}" if item else name

  def _verify(self, item: str, found: Mapping[str, jax.Array]) -> None:
    """Compares a run of ours with the checksums that it saved."""
    step = self._items[item].parent
    if not (step / "record").is_dir():
      return
    with Checkpointer(step.parent, read_only=True) as checkpointer:
      arrays = checkpointer.read(int(step.name))["arrays"]
    for path, checksum in checksums(found).items():
      name = path.removeprefix("state/")
      if arrays[name]["checksum"] != checksum:
        raise UsageError(
          f"array {name} of {step} is damaged; name the folder of another step"
        )


def _find(given: Path) -> tuple[str, dict[str, Path]]:
  """Returns the folder of the newest step, and its items by name."""
  if not given.is_dir():
    raise UsageError(
      f"{given} is not a directory; name the --workdir of a run, or a folder "
      "that Orbax wrote"
    )
  if (given / "checkpoints").is_dir():
    return _find(given / "checkpoints")
  if (given / "_METADATA").is_file():
    return str(given), {"": given}
  items = {each.parent.name: each.parent for each in given.glob("*/_METADATA")}
  if items:
    return str(given), items
  steps = [
    each
    for each in given.iterdir()
    if re.fullmatch(r"(.*_)?\d+", each.name)
    and not each.name.startswith("damaged_")
    and any(each.rglob("_METADATA"))
  ]
  if not steps:
    raise UsageError(f"{given} holds no checkpoint that Orbax wrote")
  return _find(max(steps, key=lambda step: int(step.name.split("_")[-1])))


def _read(item: Path, args: Any) -> Any:
  try:
    return read_item(item, ocp.PyTreeCheckpointHandler(), args)
  except OSError as error:
    raise UsageError(
      f"{item} cannot be read ({error}); name the folder of another step"
    ) from None


def _metadata(item: Path) -> Any:
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      return checkpointer.metadata(item).item_metadata.tree
  except Exception as error:  # Whatever reading a damaged file leads to.
    raise UsageError(
      f"{item} cannot be read ({str(error)[:200]}); name the folder of another "
      "step"
    ) from None


def _load_params(saved: _Saved, params: optax.Params) -> optax.Params:
  wanted = by_path(params)
  prefix = _prefix(saved, wanted)
  other = [
    f"{path} has shape {saved.shapes[prefix + path]} there and "
    f"{tuple(leaf.shape)} here"
    for path, leaf in wanted.items()
    if saved.shapes[prefix + path] != leaf.shape
  ]
  if other:
    raise UsageError(
      f"the parameters in {saved.name} are of another model: "
      f"{', '.join(other[:3])}; train the model that they are of"
    )
  loaded = saved.load({prefix + path: leaf for path, leaf in wanted.items()})
  return jax.tree_util.tree_map_with_path(
    lambda path, _: loaded[prefix + leaf_path(path)], params
  )


def _prefix(saved: _Saved, wanted: Mapping[str, Any]) -> str:
  """Returns what stands before the parameters' paths."""
  first = next(iter(wanted))
  starts = {
    path.removesuffix(first)
    for path in saved.shapes
    if path == first or path.endswith(f"/{first}")
  }
  # What an optimizer keeps of the parameters' paths lies deeper.
  whole = sorted(
    (
      start
      for start in starts
      if all(start + p in saved.shapes for p in wanted)
    ),
    key=lambda start: (start.count("/"), start),
  )
  if not whole:
    best = max(
      starts or {""},
      key=lambda start: sum(start + p in saved.shapes for p in wanted),
    )
    missing = [path for path in wanted if best + path not in saved.shapes]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise UsageError(
      f"{saved.name} holds no {', '.join(missing[:3])}{more}; train the model "
      "that it is of"
    )
  rivals = [s for s in whole if s.count("/") == whole[0].count("/")]
  usual = [s for s in rivals if s.split("/")[-2:-1] in (["params"], ["model"])]
  if len(rivals) > 1 and len(usual) != 1:
    raise UsageError(
      f"{saved.name} holds such parameters under each of {', '.join(rivals)}; "
      "name a folder with one of them"
    )
  return (usual if len(rivals) > 1 else whole)[0]


def _load_opt_state(
  saved: _Saved, params: optax.Params, opt_state: optax.OptState
) -> tuple[optax.OptState, str]:
  """Returns a state with what is found of it, and what to tell of that."""
  leaves, parameters = by_path(opt_state), by_path(params)
  here, there = _states(leaves, parameters), _states(saved.shapes, parameters)
  values: dict[str, jax.Array] = {}
  taken, afresh = set(), set()
  for node, fields in here.items():
    if not fields.keys() >= _TUNER and not _holds_parameters(fields):
      continue  # A schedule's count, an injected learning rate.
    source = _counterpart(node, here, there, leaves, saved.shapes)
    if source is None:
      afresh |= fields.keys()
      continue
    taken |= fields.keys()
    if fields.keys() >= _TUNER:
      values |= _tuner(saved, source, fields, leaves, parameters)
      continue
    pairs = {
      fields[field][key]: source[field][key]
      for field in fields
      for key in fields[field]
    }
    loaded = saved.load({path: leaves[mine] for mine, path in pairs.items()})
    values |= {mine: loaded[path] for mine, path in pairs.items()}
  found = jax.tree_util.tree_map_with_path(
    lambda path, leaf: values.get(leaf_path(path), leaf), opt_state
  )
  told = f"of its optimizer {', '.join(sorted(taken)) or 'nothing fits'}"
  if afresh - taken:
    told += f"; afresh are {', '.join(sorted(afresh - taken))}"
  return found, told


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
    node, field = "/".join(names[: start - 1]), names[start - 1]
    fields = found.setdefault(node, {}).setdefault(field, {})
    fields["/".join(names[start:])] = path
  return found


def _counterpart(
  node: str,
  here: _States,
  there: _States,
  leaves: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
) -> _Fields | None:
  """Returns the one saved state that a state of the optimizer's stands for."""
  fields = here[node]
  alike = lambda field, each: all(
    key in each[field] and shapes[each[field][key]] == leaves[path].shape
    for key, path in fields[field].items()
  )
  if fields.keys() >= _TUNER:
    # A scale that was learned for another base means nothing.
    found = [
      each
      for other, each in there.items()
      if each.keys() >= _TUNER
      and alike("s", each)
      and _is_reckonable(fields, each, leaves)
      and _below(other, there) == _below(node, here)
    ]
  else:
    found = [
      each
      for each in there.values()
      if each.keys() == fields.keys()
      and all(alike(field, each) for field in fields)
    ]
  return found[0] if len(found) == 1 else None


def _is_reckonable(
  fields: _Fields, source: _Fields, leaves: Mapping[str, Any]
) -> bool:
  """Whether x0 and Delta are there, or follow from each other and a known S."""
  missing = any(
    fields.get(field, {}).keys() - source.get(field, {}).keys()
    for field in _OFFSETS
  )
  # A group of several leaves is not told by the state.
  known = ((), (len(_offset_keys(fields)),))
  return not missing or leaves[fields["scale"][""]].shape in known


def _offset_keys(fields: _Fields) -> set[str]:
  """Returns the paths of the parameters that Mechanic's state is over."""
  return set().union(*(fields.get(field, {}) for field in _OFFSETS))


def _below(node: str, states: _States) -> set[frozenset[str]]:
  """Returns the fields of each state below one that holds parameters."""
  return {
    frozenset(fields)
    for path, fields in states.items()
    if path != node
    and path.startswith(f"{node}/" if node else "")
    and _holds_parameters(fields)
  }


def _holds_parameters(fields: _Fields) -> bool:
  return any(key for keys in fields.values() for key in keys)


def _tuner(
  saved: _Saved,
  source: _Fields,
  fields: _Fields,
  leaves: Mapping[str, Any],
  parameters: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Returns path -> value of Mechanic's state."""
  numbers = {
    fields[field][""]: source[field][""]
    for field in fields.keys() & source.keys() - set(_OFFSETS)
  }
  # In the parameters' placement, where x0 and Delta are reckoned up.
  offsets = {
    path: jax.ShapeDtypeStruct(
      parameters[key].shape,
      jnp.promote_types(parameters[key].dtype, jnp.float32),
      sharding=parameters[key].sharding,
    )
    for field in _OFFSETS
    for key, path in source.get(field, {}).items()
  }
  wanted = {path: leaves[mine] for mine, path in numbers.items()}
  loaded = saved.load(wanted | offsets)
  values = {mine: loaded[path] for mine, path in numbers.items()}
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
        else _reckon(
          field, parameters[key], S_of(key), loaded[source[other][key]]
        )
      )
      values[mine] = jax.device_put(
        value.astype(leaves[mine].dtype), leaves[mine].sharding
      )
  return values


def _reckon(
  field: str, x: jax.Array, S: jax.Array, other: jax.Array
) -> jax.Array:
  """Returns x0 or Delta from the other one, by x = x0 + S Delta."""
  if field == "x0":
    return x - S * other
  return jnp.where(S > 0, (x - other) / S, 0.0)
