"""A sweep with `config.oracle`: the base with constant scales."""

import numpy as np
import pytest

import configs.sweep
from train.sweep import __main__ as sweep
from train.sweep import oracle, plan

# Two layers, each with a kernel and a bias.
JOB = "configs/tabular.py:iris model.widths=(8,) schedule.warmup_steps=2"


def make_unit():
  config = configs.sweep.get_config("oracle")
  config.update(jobs=(), interpolating=(JOB,), seeds=2)
  (unit,) = plan.make_units(config)
  return unit


@pytest.mark.slow
def test_one_rate_for_all_leaves_is_the_learning_rate():
  unit = make_unit()
  config = unit.config.copy_and_resolve_references()
  config.optimizer = "adamw"
  rates = 0.1, 0.01
  wanted, _ = oracle._train(unit, config, 10, [(rate,) for rate in rates])
  each = np.broadcast_to(np.reshape(rates, (2, 1, 1)), (2, 2, 4))
  found, _ = oracle._train(unit, config, 10, each)
  np.testing.assert_allclose(found.reported, wanted.reported, rtol=1e-4)
  # A leaf that has no rate is not trained.
  one = each * np.array([1.0, 1.0, 1.0, 0.0])
  other, _ = oracle._train(unit, config, 10, one)
  assert np.all(other.reported > found.reported + 1e-3)


@pytest.mark.slow
def test_the_scales_are_those_that_mechanic_ends_with():
  unit = make_unit()
  _, runs = oracle._train(unit, unit.config, 10, [(1.0,)])
  scales = oracle._scales(runs.state)
  assert scales.shape == (2, 4)
  (row, *_), *_ = [
    rows for rows in runs.train([(1.0, 0)], 10, 10, 10) if rows[0]["step"]
  ]
  np.testing.assert_allclose(scales[0].mean(), row["mechanic/scale"], rtol=1e-5)


@pytest.mark.parametrize(
  ("interpolates", "splits"),
  [(True, ("train", "train")), (False, ("validation", "test"))],
)
def test_which_losses_count(monkeypatch, interpolates, splits):
  losses = {"train": 1.0, "validation": 2.0, "test": None}

  class Fake(oracle.Runs):
    def train(self, runs, *unused):
      row = {f"{split}/loss": loss for split, loss in losses.items()}
      yield [row for _ in runs]

  monkeypatch.setattr(oracle, "Runs", Fake)
  unit = make_unit()._replace(interpolates=interpolates)
  found, _ = oracle._train(unit, unit.config, 10, [(1.0,)])
  tuned, reported = (losses[split] or np.inf for split in splits)
  np.testing.assert_array_equal(found.tuned, [[tuned, tuned]])
  np.testing.assert_array_equal(found.reported, [[reported, reported]])


def test_the_search_finds_each_leaf_s_rate():
  def train(rows):
    loss = (np.log(rows / [9.0, 1 / 3, 1.0]) ** 2).sum(-1)
    return oracle.Losses(loss, loss)

  found = oracle._search(train, np.ones([1, 3]))
  assert found.of_best == pytest.approx(0.0, abs=1e-12)


def test_the_search_moves_one_leaf_where_all_together_are_worse():
  def train(rows):
    apart = np.log(rows).sum(-1) - np.log(3.0)
    return oracle.Losses(apart**2, apart**2)

  found = oracle._search(train, np.ones([1, 3]))
  assert found.of_best == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_prints_a_row_and_draws_a_panel_a_job(tmp_path, capsys):
  status = sweep.main(
    [
      "--config=configs/sweep.py:oracle",
      f"--workdir={tmp_path}",
      "--config.jobs=()",
      f"--config.interpolating=('{JOB} num_steps=(10,)',)",
      "--config.learning_rates=(0.01,0.1)",
      "--config.seeds=2",
    ]
  )
  assert status == 0
  told, head, _, row, file = capsys.readouterr().out.splitlines()
  assert told.startswith("1 of 1: tabular:iris")
  assert (tmp_path / "oracle.md").read_text().splitlines()[0] == head
  cells = [cell.strip() for cell in row.split("|")[1:-1]]
  assert cells[1] == "10"
  assert all(cells)
  assert file == f"{tmp_path}/oracle.png"
  assert (tmp_path / "oracle.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["dog", "adamw", "sam", "mechanize"])
def test_a_method_without_a_scale_for_each_leaf_is_refused(
  tmp_path, capsys, name
):
  arguments = ["--config=configs/sweep.py:oracle", f"--workdir={tmp_path}"]
  assert sweep.main([*arguments, f"--config.methods=('{name}',)"]) == 2
  error = capsys.readouterr().err
  assert f"{name} does not learn a scale for each leaf" in error
