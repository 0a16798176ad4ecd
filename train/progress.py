"""How far the run is: a line that moves on a terminal, a few elsewhere."""

import collections
import os
import sys
import time
from collections.abc import Mapping
from typing import Self, TextIO

import rich.console
import rich.progress
import rich.table

_NAMES = {
  "train/loss": "loss",
  "eval/accuracy": "accuracy",
  "eval/loss": "eval loss",
  "learning_rate/effective": "lr",
}
_LINES = 10
_REDRAW_SECONDS = 0.1


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
      file: where to; standard output if None.
      even: whether all steps take about the same time; where they do not,
        neither a speed nor the time left is shown.
    """
    self._num_steps = num_steps
    self._start = start
    self._file = file or sys.stdout
    self._even = even
    self._metrics: dict[str, float] = {}
    self._lines = 0  # the tenths of the run that have had their line
    self._drawn = 0.0
    # (seconds, step) of the last updates. The first update is the earliest:
    # before it, the step compiles.
    self._recent = collections.deque(maxlen=100)
    self._bar = None
    if self._file.isatty() and os.environ.get("TERM") != "dumb":
      self._bar = rich.progress.Progress(
        rich.progress.BarColumn(bar_width=12),
        rich.progress.TextColumn(
          "{task.fields[text]}",
          markup=False,
          table_column=rich.table.Column(
            no_wrap=True, overflow="ellipsis", ratio=1
          ),
        ),
        console=rich.console.Console(file=self._file),
        refresh_per_second=4,
        expand=True,  # With ratio=1, a narrow terminal cuts the text's end.
      )

  def __enter__(self) -> Self:
    if self._bar:
      self._bar.start()
      self._task = self._bar.add_task(
        "",
        total=self._num_steps,
        completed=self._start,
        text=self._text(self._start),
      )
    return self

  def __exit__(self, *unused_exception: object) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Tells that `step` is done.

    Args:
      step: how many steps are done.
      metrics: what is known anew; the line keeps showing the others' last
        values. They are read only when a line is drawn, so that a metric still
        being computed on a device is not waited for each time.
    """
    now = time.monotonic()
    self._recent.append((now, step))
    self._metrics.update(metrics)
    if self._bar:
      if now - self._drawn > _REDRAW_SECONDS or step >= self._num_steps:
        self._drawn = now
        self._bar.update(self._task, completed=step, text=self._text(step))
      return
    done, steps = step - self._start, self._num_steps - self._start
    tenths = min(_LINES * done // max(steps, 1), _LINES)
    if tenths > self._lines or len(self._recent) == 1:
      self._lines = tenths
      self.print(f"step {self._text(step)}")

  def print(self, text: str) -> None:
    """Prints a text, on a terminal above the line that moves."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, file=self._file, flush=True)

  def _text(self, step: int) -> str:
    percent = 100 * step // max(self._num_steps, 1)
    parts = [f"{step}/{self._num_steps}", f"{percent}%"]
    speed = self._steps_per_second()
    if speed > 0:
      left = max(self._num_steps - step, 0) / speed
      parts += [f"{speed:.3g} steps/s", f"ETA {_clock(left)}"]
    parts += [
      f"{name} {float(self._metrics[key]):.4g}"
      for key, name in _NAMES.items()
      if key in self._metrics
    ]
    return "  ".join(parts)

  def _steps_per_second(self) -> float:
    """Returns the speed of late, or 0 where it is not known."""
    if not self._even or len(self._recent) < 2:
      return 0.0
    (began, first), (ended, last) = self._recent[0], self._recent[-1]
    return (last - first) / (ended - began) if ended > began else 0.0


def _clock(seconds: float) -> str:
  """Formats a duration: 65 is 1:05, 3665 is 1:01:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"
