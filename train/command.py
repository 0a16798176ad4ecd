"""What the commands of `train` share."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import absl.logging

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError, no_room, printable


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
    The exit status: 2 for bad input and a full disk, 1 if nothing reads the
    output any more.
  """
  quieten(absl.logging.ERROR)
  arguments = sys.argv[1:] if argv is None else argv
  if not {"-h", "--help"}.isdisjoint(arguments):
    return print_help([(doc or "").strip()])
  try:
    for line in report(arguments):
      print(printable(line), flush=True)
  except Exception as error:
    return failed(error)
  return 0


def print_help(parts: Iterable[str]) -> int:
  """Prints a command's help, as far as it is read.

  Args:
    parts: of the help, one below the other.

  Returns:
    The exit status: 1 if nothing reads the output any more.
  """
  for part in parts:
    try:
      print(part, flush=True)
    except BrokenPipeError:
      _discard_output()
      return 1
  return 0


def quieten(verbosity: int) -> None:
  """Sets what is logged, without the errors that Orbax raises as well.

  Its threads and TensorStore's print hundreds of lines for a full disk or a
  damaged step, some of them after the error has been raised and reported.
  """
  absl.logging.set_verbosity(verbosity)
  for logger in (absl.logging.get_absl_logger(), logging.getLogger("asyncio")):
    logger.addFilter(_is_news)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _unraisablehook


def failed(error: Exception) -> int:
  """Says in one sentence what ended a command.

  Call it while handling the error.

  Returns:
    The exit status: 2 for bad input and a full disk, 1 if nothing reads the
    output any more.

  Raises:
    Exception: the error itself if it is a defect.
  """
  if isinstance(error, BrokenPipeError):
    return _closed_output()
  words = no_room(error)
  if isinstance(error, UsageError):
    sentence = str(error)
  elif words:
    file = getattr(error, "filename", None)
    sentence = (
      f"{f'{file}: ' * bool(file)}{words}; make room or lift the limit, and "
      "give the same command again"
    )
  elif reason := storage.trouble(None, error):
    sentence = f"the bucket cannot be used: {reason}"
  else:
    raise error
  with contextlib.suppress(OSError):  # It may be on the full disk too.
    print(printable(f"error: {sentence}"), file=sys.stderr, flush=True)
  return 2


def _closed_output() -> int:
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
    _discard_output()
  else:
    raise
  print(
    "error: the reader of this output has gone; the same command resumes",
    file=sys.stderr,
  )
  return 1


def _discard_output() -> None:
  """Has standard output go nowhere.

  Python flushes it at exit, which would fail where nothing reads it.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a record is no error of Orbax, or of its tasks in asyncio."""
  if record.levelno < logging.ERROR:
    return True
  error = record.exc_info[1] if record.exc_info else None
  # A task's name has the path of its code.
  source = record.pathname + record.getMessage()
  return "orbax" not in source and no_room(error) is None


def _unraisablehook(unraisable: Any) -> None:
  # TensorStore's threads still report to an event loop that Orbax has closed.
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)
