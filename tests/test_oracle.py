"""A sweep with `config.oracle`: the base with constant scales."""

import os
import threading
import time

import jax
import numpy as np
import pytest

import configs.sweep
from flax_mechanic import UsageError
from train.sweep import __main__ as sweep
from train.sweep import oracle, plan
from train.sweep.runs import Runs, make_tasks

# Two layers, each with a kernel and a bias.
JOB = "configs/tabular.py:iris model.widths=(8,) schedule.warmup_steps=2"


@pytest.fixture
def unit():
  config = configs.sweep.get_config("oracle")
  config.update(jobs=(), interpolating=(JOB,), seeds=2)
  (unit,) = plan.make_units(config)
  return unit


def make(kind, unit, **fields):
  config = unit.config.copy_and_resolve_references()
  config.update(fields)
  return kind(config, make_tasks(config, 2), 10)


# A frozen leaf has neither a scale nor a rate.
FROZEN = pytest.mark.parametrize("frozen", [(), ("hidden/0/bias",)])


@pytest.mark.slow
@FROZEN
def test_one_rate_for_all_leaves_is_the_learning_rate(unit, frozen):
  rates = np.array([[0.1, 0.1], [0.01, 0.01]])
  base = {"optimizer": "adamw", "freeze": frozen}
  wanted = oracle._train(unit, make(Runs, unit, **base), 10, rates)
  by_leaf = make(oracle._ByLeaf, unit, **base)
  leaves = 4 - len(frozen)
  each = np.stack([rates] * leaves, -1)
  found = oracle._train(unit, by_leaf, 10, each)
  np.testing.assert_allclose(found.reported, wanted.reported, rtol=1e-4)
  # A leaf that has no rate is not trained.
  last = np.arange(leaves) == leaves - 1
  other = oracle._train(unit, by_leaf, 10, np.where(last, 0.0, each))
  assert np.all(other.reported > found.reported + 1e-3)


@pytest.mark.slow
@FROZEN
def test_the_scales_are_those_that_mechanic_ends_with(unit, frozen):
  runs = make(oracle._Learning, unit, freeze=frozen)
  *_, ((row, _)) = runs.train([(1.0, 0), (1.0, 1)], 10, 10, 10)
  assert runs.scales.shape == (2, 4 - len(frozen))
  mean = runs.scales[0].mean()
  np.testing.assert_allclose(mean, row["mechanic/scale"], rtol=1e-5)


@pytest.mark.parametrize(
  ("interpolates", "splits"),
  [(True, ("train", "train")), (False, ("validation", "test"))],
)
def test_which_losses_count(unit, interpolates, splits):
  losses = {"train": 1.0, "validation": 2.0, "test": None}

  class Fake(Runs):
    def train(self, runs, *unused):
      row = {f"{split}/loss": loss for split, loss in losses.items()}
      yield [row for _ in runs]

  unit = unit._replace(interpolates=interpolates)
  found = oracle._train(unit, make(Fake, unit), 10, np.ones([1, 2]))
  tuned, reported = (losses[split] or np.inf for split in splits)
  np.testing.assert_array_equal(found.tuned, [[tuned, tuned]])
  np.testing.assert_array_equal(found.reported, [[reported, reported]])


def test_the_search_finds_each_leaf_s_rate():
  def train(rows):
    loss = (np.log(rows / [9.0, 1 / 3, 1.0]) ** 2).sum(-1)
    return oracle.Losses(loss, loss)

  found = oracle._search(train, np.ones([1, 3]))
  assert found.of_best == pytest.approx(0.0, abs=1e-12)


def test_the_search_makes_one_move_a_leaf_where_both_help():
  def train(rows):
    # By the power of 3: of 1 and -1, which are better than 0, the first one.
    power = np.round(np.log(rows) / np.log(3.0)).astype(int)
    loss = np.array([2.0, 0.0, 3.0, 3.0, 1.0])[power].sum(-1)
    return oracle.Losses(loss, loss)

  assert oracle._search(train, np.ones([1, 3])).of_best == 0.0


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


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_an_accelerator_trains_one_job_at_a_time(
  unit, tmp_path, monkeypatch, backend
):
  now, most, lock = 0, 0, threading.Lock()

  def analyze(*unused):
    nonlocal now, most
    with lock:
      now += 1
      most = max(most, now)
    time.sleep(0.05)
    with lock:
      now -= 1
    raise UsageError("as a test")

  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  monkeypatch.setattr(oracle, "analyze", analyze)
  with pytest.raises(UsageError, match="as a test"):
    list(oracle.report([unit] * 2, tmp_path))
  assert most == (2 if backend == "cpu" else 1)


@pytest.mark.parametrize("name", ["dog", "adamw", "sam", "mechanize"])
def test_a_method_without_a_scale_for_each_leaf_is_refused(
  tmp_path, capsys, name
):
  arguments = ["--config=configs/sweep.py:oracle", f"--workdir={tmp_path}"]
  assert sweep.main([*arguments, f"--config.methods=('{name}',)"]) == 2
  error = capsys.readouterr().err
  assert f"{name} does not learn a scale for each leaf" in error
