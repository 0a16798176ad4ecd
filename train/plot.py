r"""Plots the metrics of runs over their steps.

  python -m train.plot DIR [DIR ...]

DIR  the --workdir of a run, which may still be running

writes metrics.png and metrics.svg in the first DIR, with a panel for each
metric in metrics.jsonl and a line for each run. Where a metric has a minimum
and a maximum, such as mechanic/scale over the leaves, the band between them is
filled.
"""

import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError, not_installed
from train import files
from train.command import run_command

_COLUMNS = 3
# Metrics without a panel: the edges of bands, and what is not a result.
_LEFT_OUT = ("_min", "_max", "steps_per_second", "skipped_in_a_row")

# A run's metrics -> their steps and values.
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


def main(argv: Sequence[str] | None = None) -> int:
  """Draws, and returns the exit status: 2 for bad input."""
  return run_command(__doc__, _report, argv)


def _report(arguments: Sequence[str]) -> Iterator[str]:
  if not arguments:
    raise UsageError("type python -m train.plot DIR")
  folders = [storage.path(each) for each in arguments]
  runs = {str(folder): read(folder) for folder in folders}
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise not_installed("train.plot needs matplotlib", "train") from error
  names = sorted(
    name for name in set().union(*runs.values()) if not name.endswith(_LEFT_OUT)
  )
  if not names:
    raise UsageError(
      f"there is nothing to draw in {', '.join(runs)}; wait for losses"
    )
  rows = math.ceil(len(names) / _COLUMNS)
  figure = Figure((4 * _COLUMNS, 2.6 * rows + 0.6), layout="constrained")
  grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
  for axes, name in zip(grid, names, strict=False):
    for curves in runs.values():
      _draw(axes, name, curves)
    axes.set_title(name, fontsize="medium", parse_math=False)
  for axes in grid[len(names) :]:
    axes.set_visible(False)
  figure.supxlabel("step")
  # Labels of lines may not begin with an underscore.
  legend = figure.legend(grid[0].lines, list(runs), loc="outside upper center")
  for text in legend.get_texts():
    text.set_parse_math(False)
  for kind in ("png", "svg"):
    file = folders[0] / f"metrics.{kind}"
    image = io.BytesIO()
    figure.savefig(image, format=kind)
    files.write(file, image.getvalue())
    yield str(file)


def read(folder: Any) -> Curves:
  """Returns the curves of a run, without values that are not finite.

  Args:
    folder: its --workdir.

  Raises:
    UsageError: it holds no metrics.
  """
  file = folder / "metrics.jsonl"
  text = files.log(file).read()
  if text is None:
    raise UsageError(f"{folder} holds no metrics.jsonl; type a run's --workdir")
  curves: dict[str, dict[int, float]] = {}
  # A line without a newline is still being written.
  for line in text.splitlines(keepends=True):
    try:
      row = json.loads(line) if line.endswith(b"\n") else {}
      for name, value in row.items():
        if name != "step" and value is not None:
          curves.setdefault(name, {})[int(row["step"])] = float(value)
    except Exception:  # Whatever such a line leads to.
      raise UsageError(
        f"{file} has a line that no run has written; delete it: "
        f"{line[:60].decode(errors='replace').strip()}"
      ) from None
  if not curves:
    raise UsageError(f"{file} is empty; wait for the run's first steps")
  return {
    name: (np.asarray(list(points)), np.asarray(list(points.values())))
    for name, points in curves.items()
  }


def _draw(axes: Any, name: str, curves: Curves) -> None:
  """Plots a metric of a run, and its band if it has one."""
  # A run without the metric is in the legend too.
  steps, values = curves.get(name, ([], []))
  (line,) = axes.plot(steps, values)
  if {f"{name}_min", f"{name}_max"} <= curves.keys():
    (of_low, low), (of_high, high) = (
      curves[name + end] for end in ("_min", "_max")
    )
    both, i, j = np.intersect1d(of_low, of_high, return_indices=True)
    axes.fill_between(
      both, low[i], high[j], color=line.get_color(), alpha=0.2, linewidth=0
    )
  if np.size(values) and np.min(values) > 0 and "accuracy" not in name:
    axes.set_yscale("log")


if __name__ == "__main__":
  sys.exit(main())
