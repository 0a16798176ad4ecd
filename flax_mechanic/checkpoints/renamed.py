"""State fields that older checkpoints hold under another name, or needlessly.

They are all `MechanicState`'s, whose other fields tell them from fields and
parameters of the same name, such as the "scale" of a LayerNorm.
"""

from collections.abc import Container, Iterable, Mapping

# Mechanic's state, ours or optax's, has these fields, whatever else it has.
TUNER = frozenset({"r", "m", "v", "s"})

# Present name -> the name in checkpoints of 0.1.0's development versions.
_FORMER = {"usual_norm": "grad_norm", "initial_scale": "s_init"}
# What those versions saved as well: scale, the sum of s.
_DROPPED = frozenset({"scale"})


def former(field: str) -> str:
  """Returns the former name of a field of `MechanicState`, or `field`."""
  return _FORMER.get(field, field)


def saved_paths(
  wanted: Iterable[str], saved: Container[str]
) -> Mapping[str, str]:
  """Returns path -> the path under which it is saved, for those that are."""
  found = {}
  for path in wanted:
    node, field = _split(path)
    old = node + former(field)
    if path in saved:
      found[path] = path
    elif old in saved and _is_mechanic(node, saved):
      found[path] = old
  return found


def is_dropped(path: str, saved: Container[str]) -> bool:
  """Whether a saved path is of a field that is no longer part of the state."""
  node, field = _split(path)
  return field in _DROPPED and _is_mechanic(node, saved)


def _split(path: str) -> tuple[str, str]:
  """Returns a leaf's node, with its "/", and its field."""
  node, slash, field = path.rpartition("/")
  return node + slash, field


def _is_mechanic(node: str, saved: Container[str]) -> bool:
  return all(node + field in saved for field in TUNER)
