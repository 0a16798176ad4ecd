"""A job with grain's iterator resumes exactly, on any number of processes."""

import numpy as np
import pytest
from test_recipes import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job():
  pytest.importorskip("grain", reason='pip install -e ".[test]"')
  return load("grain_data")


@pytest.mark.parametrize("count", [2, 4])
def test_other_processes_go_on_with_the_same_examples(job, count):
  one = job.Batches(seed=3)
  whole = [next(one)["y"] for _ in range(30)]
  parts = [job.Batches(3, 10 * job.BATCH, i, count) for i in range(count)]
  for expected in whole[10:]:
    got = np.concatenate([next(part)["y"] for part in parts])
    np.testing.assert_array_equal(np.sort(got, 0), np.sort(expected, 0))
  assert {one.position, *(p.position for p in parts)} == {30 * job.BATCH}
  assert not np.array_equal(whole[0], next(job.Batches(seed=4))["y"])


def test_a_killed_run_goes_on_with_the_batches_it_would_have_seen(
  job, tmp_path
):
  whole = job.train(tmp_path / "whole", num_steps=15, save_every=5)
  assert np.isfinite(whole).all()
  job.train(tmp_path / "killed", num_steps=8, save_every=5)
  resumed = job.train(tmp_path / "killed", num_steps=15, save_every=5)
  assert resumed == whole[5:]
