r"""Trains jobs with many methods, learning rates, lengths and seeds; compares.

  python -m train.sweep --config=configs/sweep.py[:VARIANT] --workdir=DIR

--config.FIELD=VALUE       replaces a field of configs/sweep.py, which says what
                           is run and explains each field

appends a line to DIR/runs.jsonl for each evaluation of each run, prints tables,
writes them to DIR/tables.md, and draws DIR/*.png and *.svg. The runs of a
method that differ only in learning rate and seed are one compiled program; as
many programs run at a time as there are CPU cores, and one on an accelerator.
The same command, also with other fields or after a job's config was edited,
runs only what is missing from the file.

With config.oracle it writes DIR/oracle.md and draws DIR/oracle.png and .svg in
place of these: what Mechanic loses by on each job (train/sweep/oracle.py).

For example, on your own job:

  python -m train.sweep --config=configs/sweep.py --workdir=runs/mine \
    --config.jobs="('configs/digits.py',)" --config.interpolating="()" \
    --config.methods="('adamw','mechanic','prodigy')" \
    --config.num_steps="(400,)"
"""

import concurrent.futures
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError, not_installed
from train import files, flags
from train.command import run_command
from train.progress import Progress
from train.sweep import plan
from train.sweep.runs import Row, pool

# What tables and figures need to know of a row's unit.
_OF_UNIT = ("interpolates", "method", "tuned")


def main(argv: Sequence[str] | None = None) -> int:
  """Trains, prints and draws; returns the exit status, 2 for bad input."""
  return run_command(__doc__, _report, argv)


def _report(arguments: Sequence[str]) -> Iterator[str]:
  config, given = flags.read(arguments, ["config", "workdir"])
  if "methods" not in config:
    raise UsageError(
      f"--config={given['config']} describes a job, not a sweep; type"
      f""" --config=configs/sweep.py --config.jobs="('{given["config"]}',)" """
      '--config.interpolating="()"'
    )
  try:
    from train.sweep import comparison, figures, oracle
  except ImportError as error:
    raise not_installed(f"train.sweep needs {error.name}", "sweep") from error
  units = plan.make_units(config)
  flags.check_workdir(given["workdir"])
  workdir = storage.path(given["workdir"])
  if config.get("oracle", False):
    yield from oracle.report(units, workdir)
    return
  file = workdir / "runs.jsonl"
  train(units, file)
  data = comparison.frame(rows_of(units, file))
  tables = comparison.tables(data)
  files.write(workdir / "tables.md", f"{tables}\n".encode())
  yield tables
  for name in figures.draw(data, workdir):
    yield f"{workdir / name}"


def train(units: Sequence[plan.Unit], file: Any) -> None:
  """Runs what is missing from the file, and appends it.

  Args:
    units: from `plan.make_units`.
    file: a line for each evaluation of each run. The lines of a unit at one
      length are written at once.

  Raises:
    UsageError: a run that a job starts from is not there.
  """
  log = files.log(file)
  done = {plan.key(row) for row in read(file)}
  missing = []
  for unit in units:
    lengths = tuple(
      n for n in unit.sweep.num_steps if not done.issuperset(unit.keys(n))
    )
    if lengths:
      missing.append((unit, lengths))
  if not missing:
    return
  for unit, _ in missing:
    unit.check()
  lock, stopped = threading.Lock(), threading.Event()
  steps = 0

  def work(unit: plan.Unit, lengths: tuple[int, ...]) -> None:
    nonlocal steps
    before, lines = 0, ""
    for num_steps, rows in unit.train(lengths):
      lines += "".join(json.dumps(row) + "\n" for row in rows)
      step = rows[0]["step"]
      with lock:
        steps += len(rows) * (step - before)
        progress.update(steps, {})
        if step == num_steps:
          log.write(lines.encode())
          log.flush()
      before, lines = (0, "") if step == num_steps else (step, lines)
      if stopped.is_set():
        return

  total = sum(len(unit.runs()) * sum(lengths) for unit, lengths in missing)
  with Progress(total, even=False) as progress, pool() as threads:
    progress.print(f"{len(missing)} programs, {total} steps over all runs")
    futures = [threads.submit(work, *each) for each in missing]
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
    except BaseException:
      stopped.set()
      threads.shutdown(cancel_futures=True)
      raise
    finally:
      log.close()


def rows_of(units: Sequence[plan.Unit], file: Any) -> list[Row]:
  """Returns the file's rows of these units, with the units' attributes."""
  found = {plan.key(row): row for row in read(file)}
  return [
    found[key] | {name: getattr(unit, name) for name in _OF_UNIT}
    for unit in units
    for num_steps in unit.sweep.num_steps
    for key in unit.keys(num_steps)
  ]


def read(file: Any) -> list[Row]:
  """Returns the lines of a file; none if there is no file.

  A line that a kill cut short is removed.
  """
  log = files.log(file)
  text = (log.read() or b"").decode()
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    log.start(whole.encode())
  return [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
  sys.exit(main())
