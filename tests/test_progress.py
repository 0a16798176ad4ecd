"""A dozen lines in a log, one line on a terminal, and never an exception."""

import io
import math
import re

import pytest

from train import progress


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Makes time stand still but for what a test adds to it."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def _run(file, clock, num_steps, start=0, every=1, seconds=0.5):
  with progress.Progress(num_steps, start, file) as shown:
    clock[0] += 60  # the first step compiles
    for step in range(start + every, num_steps + 1, every):
      clock[0] += seconds * every
      shown.update(step, {"train/loss": 1 / step})
  return file.getvalue()


@pytest.mark.parametrize(
  ("num_steps", "start", "every"),
  [(1000, 0, 1), (100_000, 0, 1), (1003, 17, 10), (5, 0, 1), (100, 90, 3)],
)
def test_lines_in_a_log(clock, num_steps, start, every):
  lines = _run(io.StringIO(), clock, num_steps, start, every).splitlines()
  assert 2 <= len(lines) <= 12
  begin = rf"step \d+/{num_steps}  \d+%"
  assert re.fullmatch(rf"{begin}  loss \S+", lines[0])
  for line in lines[1:]:
    assert re.fullmatch(rf"{begin}  \S+ steps/s  ETA [\d:]+  loss \S+", line)
  last = num_steps - (num_steps - start) % every
  if last == num_steps:
    assert lines[-1].startswith(f"step {last}/{num_steps}  100%")


def test_line_in_full(clock):
  lines = _run(io.StringIO(), clock, 1000).splitlines()
  # The minute of compilation is no part of the speed.
  assert lines[0] == "step 1/1000  0%  loss 1"
  assert lines[1] == "step 100/1000  10%  2 steps/s  ETA 07:30  loss 0.01"
  assert lines[-1] == "step 1000/1000  100%  2 steps/s  ETA 00:00  loss 0.001"


def test_uneven_steps_foretell_nothing(clock):
  file = io.StringIO()
  with progress.Progress(100, file=file, even=False) as shown:
    for step in (1, 10, 90, 100):
      clock[0] += 1
      shown.update(step, {})
  assert file.getvalue().splitlines() == [
    "step 1/100  1%",
    "step 10/100  10%",
    "step 90/100  90%",
    "step 100/100  100%",
  ]


def test_last_known_metrics(clock):
  file = io.StringIO()
  with progress.Progress(2, file=file) as shown:
    shown.update(
      1, {"eval/accuracy": 0.5, "learning_rate/effective": 1e-3, "other": 1}
    )
    shown.update(2, {"train/loss": 0.25, "eval/accuracy": 0.75})
  assert file.getvalue().splitlines() == [
    "step 1/2  50%  accuracy 0.5  lr 0.001",
    "step 2/2  100%  loss 0.25  accuracy 0.75  lr 0.001",
  ]


def test_metrics_are_not_read_for_nothing(clock):
  class OnDevice:
    reads = 0

    def __float__(self):
      self.reads += 1
      return 1.0

  loss = OnDevice()
  with progress.Progress(1000, file=io.StringIO()) as shown:
    for step in range(1, 1001):
      shown.update(step, {"train/loss": loss})
  assert loss.reads == 11


@pytest.mark.parametrize("file", [io.StringIO, _Terminal])
@pytest.mark.parametrize(("num_steps", "start"), [(0, 0), (5, 5), (5, 9)])
def test_never_raises(file, num_steps, start, clock):
  with progress.Progress(num_steps, start, file()) as shown:
    for step in (start, start + 1, start):
      shown.update(step, {"train/loss": math.nan, "eval/loss": -math.inf})
      shown.update(step, {})


def test_no_more_lines_after_the_last_step(clock):
  file = io.StringIO()
  with progress.Progress(1, file=file) as shown:
    for step in range(1, 50):
      shown.update(step, {})
  assert len(file.getvalue().splitlines()) == 1


def test_nothing_without_updates(clock):
  file = io.StringIO()
  with progress.Progress(5, 5, file):
    pass
  assert file.getvalue() == ""


def test_print_and_standard_output(capsys):
  with progress.Progress(5) as shown:
    shown.print("saved [bold]")
  assert capsys.readouterr().out == "saved [bold]\n"


def test_terminal(clock, monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  file = _Terminal()
  with progress.Progress(1000, file=file) as shown:
    for step in range(1, 1001):
      clock[0] += 0.5
      shown.update(step, {"train/loss": 1 / step})
    shown.print("saved [bold]")
  text = file.getvalue()
  assert "\x1b[?25l" in text  # a line that is drawn over, its cursor hidden
  assert "━" in text
  assert "1000/1000  100%  2 steps/s  ETA 00:00  loss 0.001" in text
  assert "saved [bold]" in text
  # One line below the printed text, whatever its width.
  assert text.count("\n") <= 4


def test_narrow_terminal_keeps_one_line(clock, monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "40")
  text = _run(_Terminal(), clock, 1000)
  last = text.split("\r")[-1]
  assert "━" in last
  assert "1000/1000  100%  2 steps/s…" in last
  assert text.count("\n") <= 2


def test_dumb_terminal_gets_lines(clock, monkeypatch):
  monkeypatch.setenv("TERM", "dumb")
  text = _run(_Terminal(), clock, 100)
  assert "\x1b" not in text
  assert len(text.splitlines()) == 11
