"""State fields that older checkpoints hold under another name, or alone.

Those with another name are all `MechanicState`'s, whose other fields tell them
from fields of the same name that a base has.
"""

import re
from collections.abc import Container, Iterable, Mapping

# Mechanic's state, ours or optax's, has these fields, whatever else it has.
TUNER = frozenset({"r", "m", "v", "s"})

# Present name -> the name in checkpoints of 0.1.0's development versions.
_FORMER = {"usual_norm": "grad_norm", "initial_scale": "s_init"}
# The count of the schedule, which the count of the updates next to it equals.
_GONE = re.compile(r"(^|/)hyperparams_states/learning_rate/count$")


def is_gone(path: str) -> bool:
  """Whether a saved leaf is one that states no longer have."""
  return bool(_GONE.search(path))


def former(field: str) -> str:
  """Returns the former name of a field of `MechanicState`, or `field`."""
  return _FORMER.get(field, field)


def saved_paths(
  wanted: Iterable[str], saved: Container[str]
) -> Mapping[str, str]:
  """Returns path -> the path under which it is saved, for those that are."""
  found = {}
  for path in wanted:
    node, slash, field = path.rpartition("/")
    old = node + slash + former(field)
    is_mechanic = all(node + slash + each in saved for each in TUNER)
    if path in saved:
      found[path] = path
    elif old in saved and is_mechanic:
      found[path] = old
  return found
