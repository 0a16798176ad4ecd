"""What the commands of `train` have in common."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence

from flax_mechanic.errors import UsageError


def run_command(
  doc: str | None,
  report: Callable[[Sequence[str]], Iterator[str]],
  argv: Sequence[str] | None,
) -> int:
  """Prints what a command reports, line by line.

  Args:
    doc: the command's help.
    report: arguments -> lines.
    argv: the arguments after the program's name; `sys.argv` if None.

  Returns:
    The exit status: 2 for bad input, 1 if nobody reads what it prints.
  """
  arguments = sys.argv[1:] if argv is None else argv
  if not {"-h", "--help"}.isdisjoint(arguments):
    print((doc or "").strip())
    return 0
  try:
    for line in report(arguments):
      print(line, flush=True)
  except UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:
    return closed_output()
  return 0


def closed_output() -> int:
  """Says that what read standard output has gone, as `| head` does.

  To be called while a BrokenPipeError is handled.

  Returns:
    The exit status.

  Raises:
    BrokenPipeError: the one that is handled, if it is another pipe's.
  """
  try:
    print(flush=True)
  except BrokenPipeError:
    # Python flushes it at the end, which would fail once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  else:
    raise
  print(
    "error: what read this output has gone; the same command goes on",
    file=sys.stderr,
  )
  return 1
