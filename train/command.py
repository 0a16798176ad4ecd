"""What the commands of `train` have in common."""

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
    The exit status: 2 for bad input.
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
  return 0
