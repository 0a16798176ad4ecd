r"""What the update costs: the base, optax's mechanize and ours, side by side.

  python -m train.benchmark [--base=adamw] [--rounds=30] [--quick]

--base=NAME   the optimizer that the updates are over
--rounds=N    rounds that times are medians of
--quick       smaller trees, the smallest job and a smaller checkpoint

prints tables with a row for each update. Times are relative to the base's; in a
round, each update runs once. Bytes and temporaries are those of the compiled,
donated program of a step after the first, in float32 copies of the parameters.
With the extra [tpu] it is also compiled for a TPU v5e, which need not be there.
"""

import argparse
import functools
from collections.abc import Callable, Mapping

import jax

from configs import digits, text
from train.cost import measure, updates
from train.tables import format_table

_JOBS = {"digits": digits, "text": text}


def main(argv: list[str] | None = None) -> None:
  """Measures and prints the tables."""
  updates.register_reference()
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  bases = updates.bases()
  parser.add_argument("--base", choices=bases, default=bases[0])
  parser.add_argument("--rounds", type=int, default=30)
  parser.add_argument("--quick", action="store_true")
  arguments = parser.parse_args(argv)
  base, rounds, quick = arguments.base, arguments.rounds, arguments.quick
  leaves = (2, 4) if quick else (10, 150, 500)
  arrays = ("one",) if quick else ("one", "six")
  jobs = {"digits": digits} if quick else _JOBS

  device = jax.devices()[0]
  print(f"over {base}, on {device.device_kind} ({device.platform})\n")
  _print_table(
    "update time over the base's, by number of leaves",
    {
      str(n): functools.partial(measure.update_times, base, n, rounds)
      for n in leaves
    },
  )
  _print_table(
    "time of a whole training step over the base's",
    {
      name: functools.partial(
        measure.step_times, job.get_config, base, max(rounds // 2, 5)
      )
      for name, job in jobs.items()
    },
  )
  _print_table(
    "time to trace, lower and compile an update, by number of leaves",
    {str(n): functools.partial(measure.compile_times, base, n) for n in leaves},
  )
  _print_table(
    f"compiled for {device.platform}, {leaves[-1]} leaves, in copies",
    {"": functools.partial(measure.compiled_here, base, leaves[-1])},
  )
  _print_table(
    "on 8 CPU devices, leaves of four placements, by Optimizer",
    {"": functools.partial(measure.compiled_elsewhere, base, arrays)},
  )
  megabytes = 8 if quick else 500
  _print_table(
    f"saving and verifying a checkpoint of {megabytes} MB",
    {"": functools.partial(measure.checkpoint_times, megabytes)},
  )


def _print_table(
  title: str, columns: Mapping[str, Callable[[], measure.Rows]]
) -> None:
  """Prints a table whose columns are measured one after the other."""
  head: list[str] = [""]
  cells: dict[str, list[str]] = {}
  for label, measured in columns.items():
    rows = measured()
    names = list(next(iter(rows.values())))
    head += [f"{label} {name}".strip() for name in names]
    for name, row in rows.items():
      cells.setdefault(name, [name]).extend(row[column] for column in names)
  print(f"{title}:\n")
  print(format_table([head, *cells.values()]), end="\n\n", flush=True)


if __name__ == "__main__":
  main()
