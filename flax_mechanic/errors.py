"""The one exception that bad input raises, and what its sentence is made of."""

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


def printable(text: str) -> str:
  r"""Replaces what a terminal would obey, such as escape sequences.

  Example:
    >>> printable("a\tb\x1b[2J") == "a\tb\N{REPLACEMENT CHARACTER}[2J"
    True
  """
  return "".join(
    c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
    for c in text
  )
