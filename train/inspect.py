r"""Lists a run's checkpoints and whether they are intact.

  python -m train.inspect DIR

DIR is the --workdir of a run, which may still be running. For each checkpoint
it prints the size, whether every array has the checksum that it was saved with,
and what was measured and learned by that step. One that the run deletes
meanwhile is not damaged.
"""

import functools
import sys
from collections.abc import Iterator, Sequence

from flax_mechanic.checkpoints import storage
from flax_mechanic.checkpoints.checkpointer import Checkpointer
from flax_mechanic.errors import UsageError
from train.command import run_command
from train.tables import format_table

_FIRST = ("train/loss", "eval/loss", "eval/accuracy", "learning_rate/effective")


def main(argv: Sequence[str] | None = None) -> int:
  """Prints, and returns the exit status.

  Args:
    argv: the arguments after the program's name; `sys.argv` if None.

  Returns:
    0, 1 if a checkpoint is damaged, 2 for bad input.
  """
  problems: list[str] = []
  report = functools.partial(_report, problems)
  return run_command(__doc__, report, argv) or int(bool(problems))


def _report(problems: list[str], arguments: Sequence[str]) -> Iterator[str]:
  if len(arguments) != 1:
    raise UsageError("type python -m train.inspect DIR, the --workdir of a run")
  given = storage.path(arguments[0])
  folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
  if not folder.is_dir():
    raise UsageError(f"{given} is not a directory; type the --workdir of a run")
  with Checkpointer(folder, read_only=True) as checkpointer:
    steps = checkpointer.steps()
    if not steps:
      raise UsageError(f"{given} holds no checkpoint")
    rows, record = [], {}
    for step in steps:
      size = sum(each for _, each in storage.files(folder / str(step)))
      try:
        checkpointer.verify(step)
        record = checkpointer.read(step)
        rows.append((step, size, "yes", record["metrics"]))
      except UsageError as error:
        if step not in checkpointer.steps():
          rows.append((step, size, "deleted", {}))
          continue
        problems.append(str(error))
        rows.append((step, size, "no", {}))
  seen = dict.fromkeys(name for *_, metrics in rows for name in metrics)
  names = [name for name in _FIRST if name in seen]
  names += [
    name
    for name in seen
    if name not in _FIRST and not name.startswith(("train/", "eval/"))
  ]
  table = [["step", "MB", "intact", *names]]
  for step, size, intact, metrics in rows:
    values = [f"{metrics[n]:.4g}" if n in metrics else "" for n in names]
    table.append([str(step), f"{size / 1e6:,.1f}", intact, *values])
  yield format_table(table)
  yield from problems
  if record:
    config, arrays = record["config"], record["arrays"]
    yield (
      f"step {record['step']}: optimizer {config.get('optimizer')}, "
      f"{len(arrays)} arrays, "
      + ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    )


if __name__ == "__main__":
  sys.exit(main())
