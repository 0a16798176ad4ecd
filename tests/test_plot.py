"""`python -m train.plot`: what a run wrote, drawn."""

import json

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from train import plot


def write(folder, rows, rest=""):
  folder.mkdir()
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / "metrics.jsonl").write_text("".join(lines) + rest)
  return folder


def test_each_metric_of_each_run_is_drawn(tmp_path, capsys):
  one = write(
    tmp_path / "one",
    [
      {
        "step": step,
        "train/loss": 1 / step,
        "mechanic/scale": 0.1,
        "mechanic/scale_min": 0.01,
        "mechanic/scale_max": 0.3,
        "steps_per_second": 9.0,
      }
      for step in (10, 20)
    ],
  )
  other = write(tmp_path / "other", [{"step": 10, "eval/loss": 2.0}])
  assert plot.main([str(one), str(other)]) == 0
  files = [one / f"metrics.{kind}" for kind in ("png", "svg")]
  assert capsys.readouterr().out.split() == [str(file) for file in files]
  assert image.imread(files[0]).std() > 0.01
  drawn = files[1].read_text()
  for text in (
    "train/loss",
    "eval/loss",
    "mechanic/scale",
    str(one),
    str(other),
  ):
    assert f"<!-- {text} -->" in drawn
  assert "steps_per_second" not in drawn
  assert "scale_min" not in drawn
  assert "FillBetweenPolyCollection" in drawn


@pytest.mark.parametrize(("high", "both"), [([10, 30], [10, 30]), ([], None)])
def test_a_band_is_where_both_of_its_edges_are(tmp_path, high, both):
  rows = [{"step": 10 * i, "a": 1.0, "a_min": 0.1 * i} for i in (1, 2, 3)]
  rows += [{"step": step, "a_max": 0.1 * step} for step in high]
  curves = plot.read(write(tmp_path / "run", rows))
  axes = Figure().subplots()
  plot._draw(axes, "a", curves)
  bands = axes.collections
  assert len(bands) == (both is not None)
  for band in bands:
    drawn = {*map(tuple, band.get_paths()[0].vertices.round(6))}
    assert drawn == {(s, y * s) for s in both for y in (0.01, 0.1)}


def test_a_run_has_any_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = ["_one", "$^$"]
  for name in names:
    write(tmp_path / name, [{"step": 1, "eval/loss": 2.0}])
  assert plot.main(names) == 0
  drawn = (tmp_path / "_one" / "metrics.svg").read_text()
  assert all(f"<!-- {name} -->" in drawn for name in names)


@pytest.mark.parametrize(
  ("name", "least", "scale"),
  [
    ("train/loss", 0.5, "log"),
    ("skipped", 0.0, "linear"),
    ("eval/accuracy", 0.5, "linear"),
  ],
)
def test_what_may_be_small_has_a_logarithmic_axis(name, least, scale):
  axes = Figure().subplots()
  plot._draw(axes, name, {name: (np.array([1, 2]), np.array([least, 1]))})
  assert axes.get_yscale() == scale


def test_what_is_not_finite_or_not_whole_is_left_out(tmp_path):
  rows = [{"step": 10, "a": 1.0}, {"step": 20, "a": None, "b": 3.0}]
  folder = write(tmp_path / "run", rows, rest='{"step": 30, "a"')
  curves = plot.read(folder)
  np.testing.assert_array_equal(curves["a"], [[10], [1.0]])
  np.testing.assert_array_equal(curves["b"], [[20], [3.0]])


def test_a_resumed_run_is_one_curve(tmp_path):
  rows = [
    {"step": step, "a": value} for step, value in ((1, 1), (2, 9), (2, 3))
  ]
  curves = plot.read(write(tmp_path / "run", rows))
  np.testing.assert_array_equal(curves["a"], [[1, 2], [1, 3]])


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (None, "holds no metrics.jsonl; type a run's"),
    ([], "is empty; wait"),
    ([{"step": 1, "steps_per_second": 9.0}], "there is nothing to draw in"),
  ],
)
def test_errors(tmp_path, capsys, rows, message):
  folder = tmp_path / "run"
  if rows is not None:
    write(folder, rows)
  assert plot.main([str(folder)]) == 2
  assert message in capsys.readouterr().err
  assert plot.main([]) == 2
  assert "type python -m train.plot DIR" in capsys.readouterr().err


def test_a_link_is_replaced_and_not_followed(tmp_path):
  folder = write(tmp_path / "run", [{"step": 1, "$x": 1.0}])
  precious = tmp_path / "precious"
  precious.write_text("mine")
  for name in ("metrics.png", "metrics.svg.new"):
    (folder / name).symlink_to(precious)
  assert plot.main([str(folder)]) == 0
  assert precious.read_text() == "mine"
  assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  "line",
  [
    "{",
    "[1]",
    '{"a": 1}',
    '{"step": 1, "a": "b"}',
    "[" * 10**5,
    '{"step": 1e999, "a": 1}',
    "\x1b",
  ],
)
def test_a_line_that_no_run_has_written(tmp_path, capsys, line):
  folder = write(tmp_path / "run", [{"step": 1, "a": 1.0}], line + "\n")
  assert plot.main([str(folder)]) == 2
  error = capsys.readouterr().err
  assert "a line that no run has written" in error
  assert "\x1b" not in error
