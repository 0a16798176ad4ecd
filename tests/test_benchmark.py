"""The benchmark's command, on small trees."""

import os
import pathlib
import subprocess
import sys

import pytest

from train.cost import facts

pytestmark = pytest.mark.usefixtures("optimized")
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_prints_a_row_an_update_in_each_table():
  output = subprocess.run(
    [sys.executable, "-m", "train.benchmark", "--quick", "--rounds=3"],
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  *tables, checkpoint = output.split(":\n\n")[1:]
  assert len(tables) == 4
  assert [line.split()[1] for line in checkpoint.splitlines()[2:]] == [
    "save",
    "restore",
  ]
  for table in tables:
    rows = [line.split("|")[1:-1] for line in table.splitlines() if "|" in line]
    names = [row[0].strip() for row in rows[2:]]
    assert names == list(facts.UPDATES)
    assert all(cell.strip() for row in rows for cell in row)
