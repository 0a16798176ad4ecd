"""The benchmark's command, on small trees."""

import itertools
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from configs import text
from train.cost import data, measure, saving, updates
from train.cost.updates import UPDATES

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_prints_a_row_an_update_in_each_table():
  output = subprocess.run(
    [
      *(sys.executable, "-m", "train.benchmark"),
      *("--quick", "--rounds=1", "--base=sgd"),
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  tables = [
    [
      [cell.strip() for cell in line.split("|")[1:-1]]
      for line in table.splitlines()
      if "|" in line
    ]
    for table in output.split(":\n\n")[1:]
  ]
  plain = [name for name, update in UPDATES.items() if not update.options]
  names = [[row[0] for row in table[2:]] for table in tables]
  every = list(UPDATES)
  assert names == [every, every, plain, every, every, ["save", "restore"]]
  for table in tables:
    assert all(cell for row in table for cell in row[1:])
  compilation = tables[2]
  assert compilation[0][1:] == ["2 s", "2 ratio", "4 s", "4 ratio"]
  seconds = [[float(cell) for cell in row[1:]] for row in compilation[2:]]
  assert seconds[0][1::2] == [1, 1]
  assert all(row[0] > 0 and row[2] > 0 for row in seconds)


@pytest.mark.slow
def test_compile_times_ask_no_cache():
  events = []
  jax.monitoring.register_event_listener(
    lambda event, **_: events.append(event)
  )
  asked = "/jax/compilation_cache/compile_requests_use_cache"
  updates.register_reference()
  measure.compile_times("sgd", 2)
  assert asked not in events
  jax.jit(lambda x: x * 3)(1.0)
  assert asked in events


TINY = SimpleNamespace(get_config=lambda: text.get_config("tiny"))


@pytest.mark.slow
def test_text_of_two_sizes_is_measured(capsys, monkeypatch):
  monkeypatch.setattr(data, "text", TINY)
  monkeypatch.setattr(data, "_STEPS", 2)
  monkeypatch.setattr(
    data, "_run", lambda folder: data._measure(folder) | {"memory": 1.0}
  )
  data.main(["1", "2"])
  rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
  assert [row[1].strip() for row in rows] == ["MB", "---", "1", "2"]
  assert {len(row) for row in rows} == {10}


@pytest.mark.slow
def test_turns_with_a_save_and_without_are_measured(capsys, monkeypatch):
  monkeypatch.setattr(saving, "text", TINY)
  saving.main(["2"])
  head, _, row = capsys.readouterr().out.splitlines()
  assert head.count("|") == row.count("|") == 5
  step, waiting, _, cost = row.split("|")[1:-1]
  assert float(step) > 0
  assert float(waiting) > 0
  assert cost.strip().endswith("%")


def test_a_save_costs_a_part_of_the_steps_between_two(capsys, monkeypatch):
  turns = lambda: itertools.repeat((0.3, 0.2, 0.01))
  monkeypatch.setattr(saving, "_turns", turns)
  saving.main(["3"])
  row = capsys.readouterr().out.splitlines()[2]
  every = text.get_config().checkpoint_every
  assert [cell.strip() for cell in row.split("|")[1:-1]] == [
    *("20.0", "10", "100"),
    f"{0.1 / (0.02 * every):.1%}",
  ]
