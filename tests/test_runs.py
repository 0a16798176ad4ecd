"""Runs trained together are the runs of the job, one by one."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from train.job import make_job
from train.sweep.runs import Runs, make_tasks

pytestmark = pytest.mark.slow

RUNS = [(rate, seed) for rate in (1e-3, 1e-2) for seed in (0, 1)]


def make_config(optimizer="adamw", **fields):
  config = digits.get_config()
  config.model.widths = (8,)
  config.batch_size = 16
  config.num_steps = 10
  config.schedule.warmup_steps = 2
  config.optimizer = optimizer
  config.update_from_flattened_dict(fields)
  return config


def make_runs(config, at_once=0):
  return Runs(config, make_tasks(config, seeds=2), 20, at_once)


def alone(config: ConfigDict, num_steps: int, rate: float, seed: int):
  """Returns what the job itself reaches with one learning rate and seed."""
  config = config.copy_and_resolve_references()
  config.seed, config.num_steps = seed, num_steps
  config.schedule.warmup_steps = num_steps // 5
  config.learning_rate = rate
  job = make_job(config, jax.devices()[:1])
  with jax.set_mesh(job.mesh):
    state = job.create()
    for step in range(num_steps):
      state, metrics = job.train_step(state, job.train_batch(step))
    (held_out,) = job.task.eval_batches()
    split = lambda start: {k: v[start::2] for k, v in held_out.items()}
    found = {
      name: job.eval_step(state, split(start))
      for name, start in (("validation", 0), ("test", 1))
    }
  reached = {
    f"{split}/{name}": float(values[f"eval/{name}"])
    for split, values in found.items()
    for name in ("loss", "accuracy")
  }
  effective = float(metrics["learning_rate/effective"])
  return reached | {"learning_rate/effective": effective}


@pytest.mark.parametrize(
  "num_steps", [pytest.param(10, marks=pytest.mark.slow), 20]
)
def test_tuned_runs_are_the_jobs(num_steps):
  config = make_config()
  runs = make_runs(config)
  *_, last = runs.train(RUNS, num_steps, evaluate_every=5, call_every=5)
  assert [(row["learning_rate"], row["seed"]) for row in last] == RUNS
  for row in last:
    want = alone(config, num_steps, row["learning_rate"], row["seed"])
    assert row["step"] == num_steps
    got = {name: row[name] for name in want}
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
  ("optimizer", "rate"),
  [("momo", 1.0), ("mechanic", 1.0), ("schedule_free", 0.1)],
)
def test_wrapped_and_learned_runs_are_the_jobs(optimizer, rate):
  config = make_config(optimizer)
  *_, last = make_runs(config).train([(rate, 1)], 10, 10, call_every=10)
  want = alone(config, 10, rate, 1)
  got = {name: last[0][name] for name in want}
  assert got == pytest.approx(want, rel=2e-3)


def test_a_factor_is_the_bases_own_learning_rate():
  runs = make_runs(make_config("mechanic"))
  *_, last = runs.train([(1.0, 0), (1e-3, 0)], 10, 10, call_every=10)
  rates = [row["learning_rate/effective"] for row in last]
  scales = [row["mechanic/scale"] for row in last]
  assert scales[1] > 100 * scales[0]
  assert rates[1] == pytest.approx(rates[0], rel=0.5)


def test_evaluations_and_calls_change_no_run():
  runs = make_runs(make_config())
  often = list(runs.train(RUNS, 10, evaluate_every=4, call_every=2))
  assert [rows[0]["step"] for rows in often] == [0, 4, 8, 10]
  *_, last = runs.train(RUNS[2:], 10, evaluate_every=10, call_every=10)
  for one, other in zip(often[-1][2:], last, strict=True):
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 3])
def test_few_at_once_are_the_same_runs(at_once):
  config = make_config("mechanic")
  *_, want = make_runs(config).train(RUNS, 10, 10, call_every=10)
  *_, got = make_runs(config, at_once).train(RUNS, 10, 10, call_every=10)
  for one, other in zip(got, want, strict=True):
    assert one == pytest.approx(other, rel=1e-3)


def test_the_training_loss_is_over_training_examples():
  config = make_config()
  first = next(make_runs(config).train(RUNS[:1], 10, 10, 10))[0]
  job = make_job(config, jax.devices()[:1])
  with jax.set_mesh(job.mesh):
    state = job.create()
    losses = [
      job.eval_step(state, job.train_batch(i))["eval/loss"] for i in range(8)
    ]
  assert first["step"] == 0
  assert first["train/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_is_not_finite_is_none():
  config = make_config("sgd")
  *_, last = make_runs(config).train(
    [(1e30, 0), (0.1, 0)], 10, 10, call_every=10
  )
  assert last[0]["train/loss"] is None
  assert np.isfinite(last[1]["train/loss"])
