"""State fields that older checkpoints hold under another name, or alone."""

import re
from collections.abc import Container, Iterable, Mapping

# Mechanic's state, ours or optax's, has these fields, whatever else it has.
TUNER = frozenset({"r", "m", "v", "s"})

# Of its fields: present name -> that in checkpoints of 0.1.0's development
# versions. Its other fields tell them from fields of that name in a base.
_FORMER = {"usual_norm": "grad_norm", "initial_scale": "s_init"}
# What the readers of cocob, momo and momo_adam read, and its former path.
_FACTOR, _FORMER_FACTOR = "scalars/factor", "scalars/learning_rate"
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
    elif path.endswith(_FACTOR):
      factor = path.removesuffix(_FACTOR) + _FORMER_FACTOR
      if factor in saved:
        found[path] = factor
  return found
