"""The one exception that bad input raises, and the hint that goes with it."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
  """Bad input: what was given, what is accepted, what to type instead.

  The message is one sentence for the person who typed it. `train.main` prints
  it and exits with status 2.
  """


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """Returns "; did you mean 'x'?" for the nearest of `names`, else the list.

  Example:
    >>> did_you_mean("mechanik", ["adamw", "mechanic"])
    "; did you mean 'mechanic'?"
    >>> did_you_mean("qqq", ["adamw", "mechanic"])
    '; it is one of adamw, mechanic'
  """
  names = sorted(names)
  near = difflib.get_close_matches(name, names, n=1)
  if near:
    return f"; did you mean {near[0]!r}?"
  return f"; it is one of {', '.join(names)}"
