"""The fault campaign: a few of its trials, and that its judge is strict."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from flax_mechanic.checkpoints import record
from train.faults import damage, judge
from train.faults.jobs import STEPS, Job
from train.faults.runs import Ended

ROOT = pathlib.Path(__file__).parent.parent
DONE = f"done at step {STEPS}: eval/loss 1\n"


@pytest.mark.slow
def test_some_trials():
  # Of four kinds, and of one job, which is cheap.
  numbers = (22, 24, 140, 507)
  process = subprocess.run(
    [
      *(sys.executable, "-m", "train.faults", "--seed=1"),
      *(f"--trial={number}" for number in numbers),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stdout + process.stderr
  assert "| all " in process.stdout


@pytest.mark.parametrize(
  ("ended", "outcome"),
  [
    (Ended(None, DONE, ""), "hang"),
    (Ended(0, DONE, "Traceback (most recent call last)"), "traceback"),
    (Ended(1, "", ""), "other"),
    (Ended(-6, "", ""), "other"),
    (Ended(0, DONE, "a line\n" * 40), "other"),
    (Ended(2, "", ""), "silent"),
    (Ended(2, "", "error: a\nerror: b\n"), "silent"),
    (Ended(75, "", ""), "silent"),
    (Ended(0, "step 1\n", ""), "silent"),
    (Ended(2, "", "error: No space left on device\n"), None),
    (Ended(0, DONE, ""), None),
  ],
)
def test_how_a_run_may_end(ended, outcome):
  found = judge.of_ends([Ended(0, DONE, ""), ended], {0, 2, 75})
  assert (found and found.outcome) == outcome


@pytest.fixture
def job(tmp_path):
  """A job of which two steps, one of them damaged, are left."""
  job = Job("", 1, tmp_path)
  for step in (30, 35):
    (job.checkpoints / str(step)).mkdir(parents=True)
    (job.checkpoints / str(step) / "array").write_text(str(step))
  return job


def resumed(step, words=""):
  output = f"{words}\nresuming {step}/checkpoints at step {step}\n{DONE}"
  return Ended(0, output, "")


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_a_flip_is_one_of_any_bit(tmp_path, byte):
  path = tmp_path / "30" / "array"
  path.parent.mkdir()
  for seed in range(8):
    path.write_bytes(100 * byte)
    damage.flip(tmp_path, np.random.default_rng(seed))
    assert path.read_bytes() != 100 * byte


def test_damage_has_to_be_said(job):
  before = judge.files(job.checkpoints)
  newest = job.checkpoints / "35"
  assert judge.of_damage(job, before, resumed(35)) is None
  newest.rename(job.checkpoints / "damaged_35")
  for step in (30, 34):
    assert judge.of_damage(job, before, resumed(step)).outcome == "silent"
  said = resumed(30, "step 35 in checkpoints cannot be read")
  assert judge.of_damage(job, before, said) is None
  (job.checkpoints / "damaged_35" / "array").unlink()
  assert judge.of_damage(job, before, said).outcome == "other"


def test_a_run_that_does_not_start_has_to_leave_everything(job):
  before = judge.files(job.checkpoints)
  error = Ended(2, "", "error: no intact step is left\n")
  assert judge.of_damage(job, before, error).outcome == "one sentence"
  (job.checkpoints / "30" / "array").unlink()
  assert judge.of_damage(job, before, error).outcome == "other"


def save(job, loss, checksum):
  line = {"step": STEPS, "train/loss": loss, "steps_per_second": loss}
  (job.workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  fields = {
    "step": STEPS,
    "config": {},
    "data": {},
    "metrics": {},
    "versions": {},
    "arrays": {"w": {"shape": [1], "dtype": "int32", "checksum": checksum}},
  }
  folder = job.checkpoints / str(STEPS) / "record"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "metadata").write_text(json.dumps(record.seal(fields)))


def test_numbers_have_to_be_the_same(job):
  save(job, 1.0, "a")
  wanted = job.numbers()
  assert judge.of_numbers(job, wanted).outcome == "same numbers"
  save(job, 1.0, "b")
  assert judge.of_numbers(job, wanted).outcome == "silent"
  save(job, 2.0, "a")
  assert judge.of_numbers(job, wanted).outcome == "silent"
  # From the step after one on.
  assert judge.of_numbers(job, wanted, STEPS - 1).outcome == "silent"
  assert judge.of_numbers(job, wanted, STEPS).outcome == "same numbers"
  (job.workdir / "metrics.jsonl").unlink()
  assert judge.of_numbers(job, wanted).outcome == "silent"
