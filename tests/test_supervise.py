"""The supervisor: when it restarts a job, and when it does not."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from flax_mechanic.checkpoints import storage
from train import files, supervise
from train.supervise import Ended

ROOT = pathlib.Path(__file__).parent.parent
JOB = [
  f"--config={ROOT / 'configs' / 'digits.py'}",
  "--config.optimizer=mechanic",
  "--config.model.widths=(16,)",
  "--config.batch_size=32",
]
KILLED = Ended([-9, 75], {0: 9})


def supervised(monkeypatch, folder, ends, *arguments, saves=None):
  """Supervises a job whose starts end so; returns the status and the counts.

  Starts that are in `saves` write that file of a step.
  """
  saves = saves or {}
  left, counts = list(ends), []

  def run(job, count, signals):
    del job, signals
    if len(counts) in saves:
      step = folder / "checkpoints" / str(10 * (len(counts) + 1))
      step.mkdir(parents=True)
      (step / saves[len(counts)]).write_bytes(b"")
    counts.append(count)
    return left.pop(0)

  monkeypatch.setattr(supervise, "_run", run)
  own = ["--processes=4", f"--workdir={folder}", *arguments]
  return supervise.main([*own, *JOB]), counts


@pytest.mark.parametrize(
  ("end", "status", "starts"),
  [
    (Ended([0, 0], {}), 0, 1),
    (Ended([2, 2], {}), 2, 1),
    (Ended([75, 2], {}), 2, 1),
    (Ended([1, 75], {}), 1, 1),
    (Ended([75, 75], {}), 0, 2),
    # One that hung was ended by the supervisor.
    (Ended([75, -9], {}), 0, 2),
    (Ended([1, -9], {}), 1, 1),
    (KILLED, 0, 2),
    (Ended([1, -11], {1: 11}), 0, 2),
  ],
)
def test_what_restarts(monkeypatch, tmp_path, end, status, starts):
  ends = [end, Ended([0, 0], {})]
  found, counts = supervised(monkeypatch, tmp_path, ends)
  assert (found, counts) == (status, [4] * starts)


@pytest.mark.parametrize("in_bucket", [False, True])
def test_restarts_in_vain_end(
  request, monkeypatch, tmp_path, capsys, in_bucket
):
  folder = tmp_path
  if in_bucket:
    request.getfixturevalue("bucket")
    folder = storage.path(f"gs://test/{tmp_path.name}")
  more = ["--max_restarts=2", "--min_processes=2"]
  saves = {1: "commit_success.txt"} | ({2: "cut short"} if in_bucket else {})
  status, counts = supervised(
    monkeypatch, folder, [KILLED] * 9, *more, saves=saves
  )
  assert (status, counts) == (2, [4, 2, 2, 2, 2])
  *_, error = capsys.readouterr().err.splitlines()
  assert error.startswith("error: process 0 was ended by SIGKILL, and 2 ")


@pytest.mark.parametrize(
  ("reaction", "signals", "status"),
  [
    ("touch saved; exit 0", 1, 0),
    ("touch saved; exit 75", 1, 143),
    ("touch saved", 2, 143),
  ],
)
def test_sigterm_is_passed_on_and_ends_the_job(
  monkeypatch, tmp_path, reaction, signals, status
):
  """A second one ends processes that do not end by themselves."""
  folders = [tmp_path / str(i) for i in range(2)]
  started = []

  def start(job, count, errors):
    del job, errors
    started.append(count)
    for folder in folders:
      folder.mkdir()
      code = (
        f"trap '{reaction}' TERM; touch started; "
        "for i in {1..200}; do sleep 0.05; done"
      )
      yield subprocess.Popen(["bash", "-c", code], cwd=folder)

  def terminate():
    for name in ["started", "saved"][:signals]:
      while not all((folder / name).exists() for folder in folders):
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(supervise, "_start", start)
  thread = threading.Thread(target=terminate, daemon=True)
  thread.start()
  own = ["--processes=2", f"--workdir={tmp_path}"]
  assert supervise.main([*own, *JOB]) == status
  thread.join(10)
  assert started == [2]
  assert all((folder / "saved").exists() for folder in folders)


def test_places_are_the_supervisor_s_to_give(tmp_path, capsys):
  places = ["--coordinator=a:1", "--num_processes=2", "--process_id=0"]
  own = ["--processes=2", f"--workdir={tmp_path}"]
  assert supervise.main([*own, *JOB, *places]) == 2
  assert "leave them out" in capsys.readouterr().err


def children(process):
  file = f"/proc/{process.pid}/task/{process.pid}/children"
  return [int(word) for word in pathlib.Path(file).read_text().split()]


def running(pid):
  return pathlib.Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_and_then_a_killed_supervisor(bucket, tmp_path):
  """In a bucket that does not answer some of its requests."""
  bucket.fail(0.01)
  workdir = f"gs://test/{tmp_path.name}"
  log = files.log(storage.path(workdir) / "metrics.jsonl")
  more = ["--config.num_steps=100000", "--config.log_every=1"]
  more += ["--config.checkpoint_every=10", "--processes=2"]
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "train.supervise", f"--workdir={workdir}"),
      *(*JOB, *more),
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )

  def wait_for(step):
    last = 0
    while last < step:
      assert process.poll() is None
      time.sleep(0.1)
      lines = (log.read() or b"").splitlines()
      last = json.loads(lines[-1])["step"] if lines else 0
    return last

  wait_for(20)
  first = children(process)
  os.kill(first[1], signal.SIGKILL)
  # Process 0 may say so before, and jax as well.
  while "restarting" not in (line := process.stderr.readline()):
    assert line
  assert line.startswith("process 1 was ended by SIGKILL; restarting with 2 ")
  while len(second := children(process)) < 2:
    time.sleep(0.05)
  assert not {*first} & {*second}
  # Or from the start, where no checkpoint was complete yet.
  resumed = re.search(r"from step (\d+)", line)
  wait_for((int(resumed[1]) if resumed else 0) + 20)
  process.kill()
  process.communicate(timeout=20)
  deadline = time.monotonic() + 5
  while any(map(running, second)) and time.monotonic() < deadline:
    time.sleep(0.05)
  bucket.fail(0)
  assert not any(map(running, second))
