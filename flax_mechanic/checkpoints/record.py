"""What a checkpoint tells beside its arrays, and how it differs from a run."""

import json
import re
import zlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from flax_mechanic.paths import leaf_path

# Path -> "shape", "dtype" and "checksum".
Described = Mapping[str, Mapping[str, Any]]

_LIBRARIES = ("flax", "jax", "optax", "orbax-checkpoint")

# Fields that change no shape: how long, how often, and where the state lies.
_SHAPELESS = re.compile(
  r"_every$|^num_steps$|^batch_size$|^learning_rate$|^seed$"
  r"|^init_|^checkpoint_|^mesh\.|_optimizer_state$"
)


def seal(record: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a record, anything JSON can hold, with a checksum of its text."""
  text = json.dumps(record, sort_keys=True)
  return {"record": text, "crc32": zlib.crc32(text.encode())}


def unseal(sealed: Mapping[str, Any]) -> Mapping[str, Any]:
  """Undoes `seal`; raises ValueError if it is not what was sealed."""
  if zlib.crc32(sealed["record"].encode()) != sealed["crc32"]:
    raise ValueError("its record is damaged")
  return json.loads(sealed["record"])


def versions() -> Mapping[str, str]:
  """Returns library -> version."""
  return {name: metadata.version(name) for name in _LIBRARIES}


def describe(
  tree: Any, sums: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
  """Returns path -> shape, dtype and, if given, checksum."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = leaf_path(path)
    found[name] = {
      "shape": list(jnp.shape(leaf)),
      "dtype": str(leaf.dtype if hasattr(leaf, "dtype") else type(leaf)),
    } | ({"checksum": sums[name]} if sums else {})
  return found


def target(
  described: Mapping[str, Any], sharding: jax.sharding.Sharding
) -> Any:
  """Returns what to restore a described leaf into."""
  name = described["dtype"]
  if name.startswith("<class"):  # A number of Python's.
    return 0
  key = jax.eval_shape(jax.random.key, 0).dtype
  dtype = key if name.startswith("key") else jnp.dtype(name)
  return jax.ShapeDtypeStruct(described["shape"], dtype, sharding=sharding)


def flat_config(config: ConfigDict | None) -> dict[str, Any]:
  """Returns field -> value, such as "schedule.name" -> "constant"."""
  if config is None:
    return {}
  nested = json.loads(config.to_json_best_effort())
  return traverse_util.flatten_dict(nested, sep=".")


def changed(
  saved: Mapping[str, Any], config: ConfigDict | None
) -> dict[str, tuple[Any, Any]]:
  """Returns config field -> (saved, present value), where they differ."""
  present = flat_config(config)
  return {
    field: (saved.get(field), present.get(field))
    for field in sorted(saved.keys() | present.keys() if present else ())
    if saved.get(field) != present.get(field)
  }


def differences(described: Described, tree: Any) -> list[str]:
  """Returns a phrase for each leaf in which a tree is not what was saved."""
  saved = {path: each["shape"] for path, each in described.items()}
  wanted = {path: each["shape"] for path, each in describe(tree).items()}
  reshaped = {
    path for path in wanted.keys() & saved.keys() if wanted[path] != saved[path]
  }
  return [
    f"{path} {what}"
    for paths, what in (
      (wanted.keys() - saved.keys(), "is not in it"),
      (saved.keys() - wanted.keys(), "is not wanted"),
      (reshaped, "has another shape"),
    )
    for path in sorted(paths)
  ]


def blame(changed: Mapping[str, tuple[Any, Any]]) -> str:
  """Says which options may have changed the state's shape."""
  # The broadest fields first: what a whole group hangs on decides the shapes.
  fields = sorted(changed, key=lambda field: field.count("."))
  telling = [field for field in fields if not _SHAPELESS.search(field)]
  return (
    "; ".join(
      f"config.{field} was {changed[field][0]!r} and is {changed[field][1]!r}"
      for field in telling[:3]
    )
    or "the config is the same, so the code has changed"
  )
