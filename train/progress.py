"""How far the run is: a live line on a terminal, a few lines elsewhere."""

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Self, TextIO

import rich.console
import rich.progress
import rich.table
import rich.text

from flax_mechanic.errors import printable

_NAMES = {
  "train/loss": "loss",
  "eval/accuracy": "accuracy",
  "eval/loss": "eval loss",
  "learning_rate/effective": "lr",
}
_LINES = 10


class Progress:
  """Shows a run's progress.

  On a terminal: one line at the bottom with a bar, the step, the speed, the
  time left and the last metrics. Elsewhere (a pipe, a log): a line at the first
  update and at each tenth of the run, however often `update` is called.

  Usage:
    with Progress(num_steps, start=step) as progress:
      ...
      progress.update(step, {"train/loss": 0.5})
  """

  def __init__(
    self,
    num_steps: int,
    start: int = 0,
    file: TextIO | None = None,
    *,
    even: bool = True,
  ):
    """Prepares to show steps `start` to `num_steps`.

    Args:
      num_steps: the last step.
      start: the step that a resumed run starts from.
      file: where to write; standard output if None.
      even: whether all steps take about the same time. If not, neither the
        speed nor the time left is shown.
    """
    self._start = start
    self._file = file or sys.stdout
    self._live = self._file.isatty() and os.environ.get("TERM") != "dumb"
    self._metrics: dict[str, float] = {}
    self._lines = -1  # the tenths of the run that have been printed
    self._rich = rich.progress.Progress(
      rich.progress.BarColumn(bar_width=12),
      # With `expand`, a narrow terminal cuts the end of the text.
      _Line(rich.table.Column(no_wrap=True, overflow="ellipsis", ratio=1)),
      console=rich.console.Console(file=self._file),
      # The speed is that since the first update, before which the step
      # compiles, or over the last 1000 updates.
      speed_estimate_period=math.inf,
      get_time=lambda: time.monotonic(),
      refresh_per_second=4,
      expand=True,
    )
    self._rich.add_task(
      "", total=num_steps, completed=start, metrics=self._metrics, even=even
    )
    (self._task,) = self._rich.tasks

  def __enter__(self) -> Self:
    if self._live:
      self._rich.start()
    return self

  def __exit__(self, *unused_exception: object) -> None:
    if self._live:
      self._rich.stop()

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Reports that `step` is done.

    Args:
      step: how many steps are done.
      metrics: new values; the line keeps showing the last values of the others.
        They are read only when a line is drawn, so that not every step waits
        for a metric that a device is still computing.
    """
    self._metrics.update(metrics)
    self._rich.update(self._task.id, completed=step)
    if self._live:
      return
    total = int(self._task.total or 0)
    done, steps = step - self._start, max(total - self._start, 1)
    tenths = min(_LINES * done // steps, _LINES)
    if tenths > self._lines:
      self._lines = tenths
      self.print(f"step {_text(self._task)}")

  def print(self, text: str) -> None:
    """Prints a text, on a terminal above the live line."""
    text = printable(text)
    if self._live:
      self._rich.console.print(text, markup=False, highlight=False)
    else:
      print(text, file=self._file, flush=True)


class _Line(rich.progress.ProgressColumn):
  """A task as text."""

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    return rich.text.Text(_text(task))


_TIME_LEFT = rich.progress.TimeRemainingColumn(compact=True)


def _text(task: rich.progress.Task) -> str:
  parts = [f"{task.completed:.0f}/{task.total:.0f}", f"{int(task.percentage)}%"]
  if task.fields["even"] and task.speed:
    left = _TIME_LEFT.render(task).plain
    parts += [f"{task.speed:.3g} steps/s", f"ETA {left}"]
  metrics = task.fields["metrics"]
  parts += [
    f"{name} {float(metrics[key]):.4g}"
    for key, name in _NAMES.items()
    if key in metrics
  ]
  return "  ".join(parts)
