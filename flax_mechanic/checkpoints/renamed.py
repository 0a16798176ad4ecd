"""What older checkpoints hold under another name, or not at all.

A checkpoint without what the guard knows, or of a run that had no guard, is
read as one whose gradients are not known yet.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from flax_mechanic.mechanic.sizes import YOUNG, Sizes

# Mechanic's state, ours or optax's, has these fields, whatever else it has.
TUNER = frozenset({"r", "m", "v", "s"})

# Of its fields: present name -> that in checkpoints of 0.1.0's development
# versions. Its other fields tell them from fields of that name in a base.
_FORMER = {"initial_scale": "s_init", "sizes/skipped": "skipped"}
# What the readers of cocob, momo and momo_adam read, and its former path.
_FACTOR, _FORMER_FACTOR = "scalars/factor", "scalars/learning_rate"
# The count of the schedule, which the count of the updates next to it equals.
_GONE = re.compile(r"(^|/)hyperparams_states/learning_rate/count$")
# The mean norm that Mechanic's spikes were measured against.
_GONE_OF_MECHANIC = re.compile("(usual_norm|grad_norm)$")
# What the guard puts around a state, and what it adds.
_INNER, _PEAK = "inner_state/", "sizes/peak"
_SIZES = re.compile(rf"(^|/)sizes/({'|'.join(Sizes._fields)})$")


def is_gone(path: str, saved: Collection[str]) -> bool:
  """Whether a leaf that was saved is one that this run does not have.

  Args:
    path: of the leaf.
    saved: all paths that were saved.
  """
  of_mechanic = _GONE_OF_MECHANIC.search(path) and _is_mechanic(
    _GONE_OF_MECHANIC.sub("", path), saved
  )
  return bool(of_mechanic or _GONE.search(path) or _SIZES.search(path))


def is_size(path: str) -> bool:
  """Whether a leaf, which a checkpoint may lack, is what the guard knows."""
  return bool(_SIZES.search(path))


def unknown(path: str) -> int:
  """Returns the value of a leaf that a checkpoint lacks."""
  return -YOUNG if path.endswith("sizes/young") else 0


def former(field: str) -> str:
  """Returns the former name of a field of `MechanicState`, or `field`."""
  return _FORMER.get(field, field)


def saved_paths(
  wanted: Iterable[str], saved: Collection[str]
) -> Mapping[str, str]:
  """Returns path -> the path under which it is saved, for those that are."""
  wanted = list(wanted)
  # Where the guard has been put around a state since, or taken off it.
  unguarded = dict.fromkeys(
    path[: match.start()]
    for path in wanted
    for match in re.finditer(_INNER, path)
  )
  guarded = [path.removesuffix(_PEAK) for path in saved if path.endswith(_PEAK)]
  ways = [
    ("", ""),
    *((node + _INNER, node) for node in unguarded),
    *((node, node + _INNER) for node in guarded),
  ]

  def found(way: tuple[str, str]) -> dict[str, str]:
    here, there = way
    sources = {
      path: _renamed(there + path.removeprefix(here), saved)
      if path.startswith(here)
      else _renamed(path, saved)
      for path in wanted
    }
    return {path: source for path, source in sources.items() if source}

  return max(map(found, ways), key=len)


def _renamed(path: str, saved: Collection[str]) -> str | None:
  """Returns the name of a leaf in `saved`, if it has one."""
  if path in saved:
    return path
  for field, old in _FORMER.items():
    node = path.removesuffix(field)
    renamed = node + old
    if node != path and renamed in saved and _is_mechanic(node, saved):
      return renamed
  factor = path.removesuffix(_FACTOR) + _FORMER_FACTOR
  return factor if path.endswith(_FACTOR) and factor in saved else None


def _is_mechanic(node: str, saved: Collection[str]) -> bool:
  """Whether a path, which ends with a slash, is that of Mechanic's state."""
  return all(node + field in saved for field in TUNER)
