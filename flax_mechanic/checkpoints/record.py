"""What a checkpoint says beside its arrays, and how it differs from a run."""

import dataclasses
import itertools
import json
import re
import zlib
from collections.abc import Mapping
from importlib import metadata
from types import UnionType
from typing import Any

import orbax.checkpoint as ocp
from flax import traverse_util
from ml_collections import ConfigDict

from flax_mechanic.checkpoints.arrays import (
  Descriptions,
  describe,
  read_on_all,
)
from flax_mechanic.checkpoints.renamed import is_gone, is_size, saved_paths

_LIBRARIES = ("flax", "jax", "optax", "orbax-checkpoint")

# Fields that change no shape: how long, how often, and the state's placement.
_SHAPELESS = re.compile(
  r"_every$|^num_steps$|^batch_size$|^learning_rate$|^seed$"
  r"|^init_|^checkpoint_|^mesh\.|_optimizer_state$"
)


def seal(record: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a record, anything JSON can hold, with a checksum of its text."""
  text = json.dumps(record, sort_keys=True)
  return {"record": text, "crc32": zlib.crc32(text.encode())}


def unseal(sealed: Mapping[str, Any]) -> Mapping[str, Any]:
  """Undoes `seal`; raises ValueError if it is not a record that was sealed."""
  text = _field(sealed, "record", str)
  if zlib.crc32(text.encode()) != _field(sealed, "crc32", int):
    raise ValueError("its record is damaged")
  record = json.loads(text)
  _field(record, "step", int)
  for field in ("config", "data"):
    _field(record, field, dict)
  for field, kind in (("metrics", float | int), ("versions", str)):
    for name in _field(record, field, dict):
      _field(record[field], name, kind)
  for path in _field(record, "arrays", dict):
    for field, kind in (("shape", list), ("dtype", str), ("checksum", str)):
      _field(record["arrays"][path], field, kind)
    if not all(isinstance(n, int) for n in record["arrays"][path]["shape"]):
      raise ValueError(f"the shape of {path} in its record is not of numbers")
  return record


def _field(group: Any, name: str, kind: type | UnionType) -> Any:
  """Returns a field; raises ValueError if it is missing or of another type."""
  if not isinstance(group, dict) or not isinstance(group.get(name), kind):
    raise ValueError(f"its record has no {name!r} that a run has saved")
  return group[name]


def read(step: Any, name: str) -> Mapping[str, Any]:
  """Returns the record of a step.

  Args:
    step: the step's folder.
    name: what errors call it.

  Raises:
    DamageError: it cannot be read, or is not what was saved.
  """
  handler: Any = ocp.JsonCheckpointHandler()
  args = ocp.args.JsonRestore()
  return read_on_all(
    name, lambda: unseal(handler.restore(step / "record", args=args)), step
  )


def versions() -> Mapping[str, str]:
  """Returns library -> version."""
  return {name: metadata.version(name) for name in _LIBRARIES}


def flat_config(config: Any) -> dict[str, Any]:
  """Returns field -> value, such as "schedule.name" -> "constant".

  Args:
    config: an ml_collections one, or any that `make_optimizer` takes, such as a
      dataclass.
  """
  if config is None:
    return {}
  if not isinstance(config, ConfigDict):
    fields = _as_dicts(config)
    config = ConfigDict(fields if isinstance(fields, dict) else vars(config))
  nested = json.loads(config.to_json_best_effort())
  return traverse_util.flatten_dict(nested, sep=".")


def _as_dicts(group: Any) -> Any:
  """Returns dataclasses and mappings, nested ones too, as dicts."""
  if dataclasses.is_dataclass(group) and not isinstance(group, type):
    names = (field.name for field in dataclasses.fields(group))
    group = {name: getattr(group, name) for name in names}
  if isinstance(group, Mapping):
    return {name: _as_dicts(value) for name, value in group.items()}
  return group


def changed(
  saved: Mapping[str, Any], config: Any
) -> dict[str, tuple[Any, Any]]:
  """Returns config field -> (saved, present value), where they differ."""
  present = flat_config(config)
  return differing(saved, present) if present else {}


def differing(
  saved: Mapping[str, Any], present: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns key -> (saved, present value), where they differ."""
  return {
    key: (saved.get(key), present.get(key))
    for key in sorted(saved.keys() | present.keys())
    if saved.get(key) != present.get(key)
  }


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields that say what an optimizer's state means.

  Moments of two optimizers may have the same names and shapes, and so may the
  scales of other groups. A schedule counts updates, each of so many batches.

  Args:
    config: field -> value, as `flat_config` returns it.

  Returns:
    Field -> value: the batches per update, if there are several; of each method
    in use, the outermost first, how it groups the parameters and by which rule
    it tunes them, and which one it wraps.
  """
  found: dict[str, Any] = {}
  batches, field = config.get("accumulate_steps"), "optimizer"
  if field in config and batches not in (None, 1):
    found["accumulate_steps"] = batches
  while field in config and field not in found:
    name = found[field] = config[field]
    groups, variant = f"opt.{name}.groups", f"opt.{name}.variant"
    if groups in config:
      found |= {
        each: config[each] for each in (groups, variant) if each in config
      }
    field = f"opt.{name}.base"
  return found


def same_tuner(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
  """Whether two configs, as far as they tell, learn the same scales.

  That is for the same groups, by the same rule and over the same base, whatever
  is around the tuner.
  """

  def learned_for(config):
    is_outside = lambda field: not field.endswith(".groups")
    fields = meaning(config)
    return [fields[each] for each in itertools.dropwhile(is_outside, fields)]

  here, there = learned_for(present), learned_for(saved)
  return here == there or not here or not there


def differences(
  descriptions: Descriptions, tree: Any, *, part: bool = False
) -> list[str]:
  """Returns a phrase for each leaf in which a tree is not what was saved.

  Args:
    descriptions: what was saved.
    tree: what is wanted of it.
    part: whether more may have been saved.
  """
  wanted = {path: each["shape"] for path, each in describe(tree).items()}
  sources = saved_paths(wanted, descriptions)
  missing = [
    path for path in wanted.keys() - sources.keys() if not is_size(path)
  ]
  unwanted = [
    path
    for path in descriptions.keys() - set(sources.values())
    if not part and not is_gone(path, descriptions)
  ]
  reshaped = [
    path
    for path, source in sources.items()
    if wanted[path] != descriptions[source]["shape"]
  ]
  return [
    f"{path} {what}"
    for paths, what in (
      (missing, "is not in it"),
      (unwanted, "is not wanted"),
      (reshaped, "has another shape"),
    )
    for path in sorted(paths)
  ]


def blame(changed: Mapping[str, tuple[Any, Any]]) -> str:
  """Says which options may have changed the state's structure or shapes."""
  # The least nested fields first: config.optimizer decides more than opt.*.
  fields = sorted(changed, key=lambda field: field.count("."))
  telling = [field for field in fields if not _SHAPELESS.search(field)]
  return (
    "; ".join(
      f"config.{field} was {changed[field][0]!r} and is {changed[field][1]!r}"
      for field in telling[:3]
    )
    or "the config is the same, so the code has changed"
  )
