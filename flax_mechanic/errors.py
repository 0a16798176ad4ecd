"""The one exception for bad input, and what its sentence is made of."""

import difflib
import errno
import os
from collections.abc import Iterable


class UsageError(ValueError):
  """Bad input: what was given, what is accepted, what to type instead.

  The message is one sentence for the person who typed it. `train.main` prints
  it and exits with status 2.
  """


def not_installed(what: str, extra: str) -> UsageError:
  """Returns what to raise where a library is missing.

  Args:
    what: what needs it, and its name.
    extra: of this package, that installs it.

  Example:
    >>> print(not_installed("a plot needs it", "train"))
    a plot needs it, which is not installed; type pip install -e ".[train]"
  """
  return UsageError(
    f'{what}, which is not installed; type pip install -e ".[{extra}]"'
  )


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


def first_line(error: BaseException) -> str:
  r"""Returns the first words of an error's message, or its type's name.

  Example:
    >>> first_line(ValueError("\n  what is wrong\nwhere"))
    'what is wrong'
    >>> first_line(ValueError())
    'ValueError'
  """
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


# A full disk, a quota, and a limit such as `ulimit -f`.
_NO_ROOM = tuple(
  os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
)


def no_room(error: BaseException | None) -> str | None:
  """Returns "No space left on device" or its like, if that caused an error.

  Orbax and TensorStore have the words in errors of other types.

  Example:
    >>> no_room(OSError(28, "No space left on device"))
    'No space left on device'
    >>> no_room(OSError(13, "Permission denied"))
  """
  while error is not None:
    for words in _NO_ROOM:
      if words in str(error):
        return words
    error = error.__cause__ or error.__context__
  return None
