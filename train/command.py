"""What the commands of `train` share."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence

from flax_mechanic.errors import UsageError, printable


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
    The exit status: 2 for bad input, 1 if nothing reads the output any more.
  """
  arguments = sys.argv[1:] if argv is None else argv
  if not {"-h", "--help"}.isdisjoint(arguments):
    print((doc or "").strip())
    return 0
  try:
    for line in report(arguments):
      print(printable(line), flush=True)
  except UsageError as error:
    print(printable(f"error: {error}"), file=sys.stderr)
    return 2
  except BrokenPipeError:
    return closed_output()
  return 0


def closed_output() -> int:
  """Says that the reader of standard output has gone, as after `| head`.

  Call it while handling a BrokenPipeError.

  Returns:
    The exit status.

  Raises:
    BrokenPipeError: the one being handled, if it is another pipe's.
  """
  try:
    print(flush=True)
  except BrokenPipeError:
    # Python flushes standard output when it exits, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  else:
    raise
  print(
    "error: the reader of this output has gone; the same command resumes",
    file=sys.stderr,
  )
  return 1
