"""Processes that end, as the others see it; here without jax."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
# What each does: it connects, says so, and does what it is told.
PROCESS = """
import pathlib, sys, time, types
from train import lifeline

path, i, count = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
lifeline._GRACE = 0.5
lifeline._CONNECT = float(sys.argv[4])

class Store:
  def key_value_set(self, key, value):
    path.with_suffix(".new").write_text(value)
    path.with_suffix(".new").rename(path)

  def blocking_key_value_get(self, key, timeout_ms):
    while not path.exists():
      time.sleep(0.01)
    return path.read_text()

lifeline.delay_abort()
state = types.SimpleNamespace(
  process_id=i, num_processes=count, client=Store(),
  coordinator_address="localhost:1",
)
with lifeline.Lifeline(state):
  print("connected", flush=True)
  exec(input())
"""


def start(folder, count, *, of=None, seconds=20):
  """Starts the first ones of a job; they wait so long for the others."""
  numbers = [str(of or count), str(seconds)]
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, folder / "port", str(i), *numbers],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  assert [each.stdout.readline() for each in started] == ["connected\n"] * count
  return started


def finish(started, commands):
  """Tells each what to do; returns statuses and errors."""
  for process, command in zip(started, commands, strict=True):
    if command is not None:
      process.stdin.write(command + "\n")
      process.stdin.flush()
  errors = [process.communicate(timeout=20)[1] for process in started]
  return [process.returncode for process in started], errors


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_every_other_process_names_the_one_that_is_lost(tmp_path, lost):
  started = start(tmp_path, 3)
  started[lost].kill()
  statuses, errors = finish(started, [None] * 3)
  assert statuses.pop(lost) == -signal.SIGKILL
  assert statuses == [75, 75]
  errors.pop(lost)
  for error in errors:
    assert error.startswith(f"error: process {lost} on ")
    assert error.endswith(
      " was lost; start the job again, with as many processes or fewer, and "
      "it resumes\n"
    )


def test_an_abort_of_jax_waits_for_the_sentence(tmp_path):
  started = start(tmp_path, 2)
  abort = "import ctypes; print('x', flush=True); ctypes.CDLL(None).abort()"
  started[1].stdin.write(abort + "\n")
  started[1].stdin.flush()
  assert started[1].stdout.read(1) == "x"
  time.sleep(0.3)
  started[0].kill()
  statuses, errors = finish(started, [None] * 2)
  assert statuses == [-signal.SIGKILL, 75]
  assert "process 0 on localhost was lost" in errors[1]


def test_what_is_printed_of_the_loss_of_process_0_is_dropped(tmp_path):
  started = start(tmp_path, 3)
  # As jax's threads do, past Python.
  noise = "import os, threading; os.write(2, b'{}'); print('x', flush=True)"
  for process, command in zip(
    started[1:], [noise.format("early"), noise.format("late")], strict=True
  ):
    time.sleep(1.2 if process is started[2] else 0)
    process.stdin.write(command + "; time.sleep(20)\n")
    process.stdin.flush()
    assert process.stdout.read(1) == "x"
  started[0].kill()
  statuses, errors = finish(started, [None] * 3)
  assert statuses == [-signal.SIGKILL, 75, 75]
  assert errors[1].startswith("earlyerror: process 0 on ")
  assert errors[2].startswith("error: process 0 on ")


def test_all_that_is_printed_appears(tmp_path):
  started = start(tmp_path, 2)
  much = "import os; os.write(2, b'a' * 2**15)"
  fail = "print('b', file=sys.stderr); 1 / 0"
  _, errors = finish(started, ["time.sleep(20)", f"{much}; {fail}"])
  printed, _, rest = errors[1].partition("b\n")
  assert printed == "a" * 2**15
  assert rest.startswith("Traceback")


def test_a_process_that_is_done_is_not_lost(tmp_path):
  # The others take longer than they have after one that fails.
  commands = ["time.sleep(1.5)", "pass", "time.sleep(1)"]
  statuses, errors = finish(start(tmp_path, 3), commands)
  assert statuses == [0, 0, 0]
  assert errors == [""] * 3


@pytest.mark.parametrize("first", [0, 1])
def test_the_others_end_after_one_that_fails_alone(tmp_path, first):
  commands = ["time.sleep(20)"] * 3
  # At its end jax would wait for the others.
  commands[first] = "import atexit; atexit.register(time.sleep, 20); 1 / 0"
  statuses, errors = finish(start(tmp_path, 3), commands)
  assert statuses.pop(first) == 2
  assert statuses == [75, 75]
  errors.pop(first)
  for error in errors:
    assert error.startswith(f"error: process {first} on ")
    assert "has ended; see its error; start the job again" in error


def test_where_not_all_can_connect_the_job_goes_on(tmp_path):
  started = start(tmp_path, 2, of=3, seconds=1)
  statuses, errors = finish(started, ["time.sleep(0.5)", "time.sleep(1)"])
  assert statuses == [0, 0]
  assert "a lost process will be noticed by jax alone" in errors[0]
  assert not errors[1]
