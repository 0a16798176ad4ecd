"""Several real processes on this machine: one run, whoever takes part."""

import contextlib
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from flax_mechanic import UsageError
from tests.test_train import metrics
from train import flags, main, processes
from train.processes import free_port

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = [
  f"--config={ROOT / 'configs' / 'digits.py'}",
  "--config.model.widths=(16,)",
  "--config.batch_size=32",
]
TEXT = [
  f"--config={ROOT / 'configs' / 'text.py'}:tiny",
  f"--config.data.path={ROOT / 'flax_mechanic'}",
  "--config.data.eval_windows=16",
  "--config.sample_length=8",
  # Both processes hold and save a part of each large array.
  "--config.mesh.data=1",
  "--config.mesh.fsdp=4",
  "--config.mesh.tensor=2",
]
MECHANIC = ["--config.optimizer=mechanic", "--config.opt.mechanic.s_init=1e-3"]
EVERY = [
  "--config.log_every=2",
  "--config.eval_every=4",
  "--config.checkpoint_every=4",
  "--config.schedule.name=warmup",  # It does not hang on num_steps.
  "--config.schedule.warmup_steps=2",
]


def with_every(arguments):
  """Returns a job's arguments, with those that every job has."""
  named = any(word.startswith("--config.optimizer=") for word in arguments)
  return [*EVERY, *([] if named else MECHANIC), *arguments]


def start(workdirs, devices, *arguments):
  """Starts a process a directory, which together have 8 devices or so."""
  port, count = free_port(), len(workdirs)
  together = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "train.main", f"--workdir={workdir}"),
        *with_every(arguments),
        *(together if count > 1 else []),
        *([f"--process_id={i}"] if count > 1 else []),
      ],
      cwd=ROOT,
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, workdir in enumerate(workdirs)
  ]


def finish(started):
  """Returns the exit statuses, and what each process printed and complained."""
  texts = [process.communicate(timeout=300) for process in started]
  return [process.returncode for process in started], texts


def run(workdir, count, devices, *arguments):
  statuses, texts = finish(start([workdir] * count, devices, *arguments))
  assert statuses == [0] * count, texts
  return [out for out, _ in texts]


def run_alone(workdir, *arguments):
  """Runs the job in this process, on its 8 devices; returns what it prints."""
  with contextlib.redirect_stdout(io.StringIO()) as output:
    assert main.main([f"--workdir={workdir}", *with_every(arguments)]) == 0
  return output.getvalue()


def assert_same_run(found, wanted):
  assert len(found) == len(wanted)
  for line, expected in zip(found, wanted, strict=True):
    assert line == pytest.approx(expected, rel=2e-4)


@pytest.mark.slow
def test_processes_train_save_and_resume_as_one(tmp_path):
  """Also past damage that one of them alone reads."""
  whole, together = tmp_path / "whole", tmp_path / "together"
  run_alone(whole, *TEXT, "--config.num_steps=12")
  job = [*TEXT, "--config.num_steps=8"]
  first, second = run(together, 2, 4, *job)
  assert "2 processes" in first
  assert "step" not in second
  measured = metrics(together)
  newest = together / "checkpoints" / "8"
  for each in newest.rglob("ocdbt.process_1/d/*"):
    os.truncate(each, 0)  # Of a half, all that is read can be left.
  # As many processes go on, and then a single one.
  output, _ = run(together, 2, 4, *job)
  assert "resuming" in output
  assert "at step 4" in output
  assert metrics(together) == measured
  assert "at step 8" in run_alone(together, *TEXT, "--config.num_steps=12")
  assert_same_run(metrics(together), metrics(whole))
  saved = {path.name for path in newest.parent.iterdir()}
  assert saved == {"4", "8", "12", "damaged_8"}


def forget(workdir, step):
  """Deletes a run's newest step; returns what was measured by then."""
  shutil.rmtree(workdir / "checkpoints" / str(step))
  return metrics(workdir)


@pytest.mark.slow
def test_a_state_with_random_keys_goes_from_one_process_to_two(tmp_path):
  job = [*DIGITS, "--config.optimizer=dpsgd", "--config.num_steps=8"]
  split = ["--config.mesh.fsdp=2", "--config.shard_optimizer_state"]
  run_alone(tmp_path, *job, *split)
  whole = forget(tmp_path, 8)
  other = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
  output, _ = run(tmp_path, 2, 4, *job, *other)
  assert "at step 4" in output
  assert_same_run(metrics(tmp_path), whole)


@pytest.mark.slow
def test_processes_start_from_another_run(tmp_path):
  job = [*DIGITS, "--config.mesh.fsdp=-1", "--config.mesh.data=1"]
  run_alone(tmp_path / "first", *job, "--config.num_steps=4")
  new = [*job, "--config.num_steps=4", f"--config.init_from={tmp_path}/first"]
  run_alone(tmp_path / "one", *new)
  output, _ = run(tmp_path / "two", 2, 4, *new)
  assert f"starting from {tmp_path}/first/checkpoints/4" in output
  assert_same_run(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


ENDLESS = [*DIGITS, "--config.num_steps=100000", "--config.log_every=1"]


def start_endless(workdir, count):
  """Starts a job that does not end, and waits for 20 steps more."""
  log = workdir / "metrics.jsonl"
  lines = lambda: log.read_text().count("\n") if log.exists() else 0
  before = lines()
  started = start([workdir] * count, 2 if count > 1 else 1, *ENDLESS)
  while lines() < before + 20:
    time.sleep(0.1)
    assert all(process.poll() is None for process in started)
  return started


def stopped_at(workdir, output):
  """Returns the step that a job said it stopped at, and has saved."""
  step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
  assert f"stopped at step {step}; the same command resumes" in output
  # What was written ends where the checkpoint does.
  assert metrics(workdir)[-1]["step"] == step
  return step


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step(tmp_path):
  # A shell's background jobs ignore it, and so would what they start.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  stopped, whole = tmp_path / "stopped", tmp_path / "whole"
  step = 0
  for number in (signal.SIGTERM, signal.SIGINT):
    started = start_endless(stopped, 2)
    started[1].send_signal(number)
    statuses, ((output, _), _) = finish(started)
    assert statuses == [0, 0]
    if step:
      assert f"at step {step}" in output
    step = stopped_at(stopped, output)
  more = f"--config.num_steps={step}"
  run(whole, 2, 2, *DIGITS, "--config.log_every=1", more)
  trained = lambda workdir: [
    line for line in metrics(workdir) if "train/loss" in line
  ]
  assert trained(stopped) == trained(whole)


@pytest.mark.slow
def test_a_signal_to_a_lone_process(tmp_path):
  started = start_endless(tmp_path, 1)
  started[0].send_signal(signal.SIGTERM)
  (status,), ((output, _),) = finish(started)
  assert status == 0
  stopped_at(tmp_path, output)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost(tmp_path, lost):
  started = start_endless(tmp_path, 2)
  started[lost].kill()
  other = started[1 - lost]
  # jax's C++ may have its say before.
  *_, error = other.communicate(timeout=20)[1].splitlines()
  assert other.returncode == 75
  assert error.startswith(f"error: process {lost} on ")
  assert "was lost; start the job again" in error
  step = max(
    int(path.name)
    for path in (tmp_path / "checkpoints").iterdir()
    if path.name.isdecimal()
  )
  more = f"--config.num_steps={step + 4}"
  assert f"at step {step}" in run_alone(tmp_path, *DIGITS, more)


@pytest.mark.slow
def test_a_process_that_fails_alone(tmp_path, monkeypatch):
  # It writes nothing into jax's cache, which would warn of what does not fit.
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1000")
  started = start([tmp_path] * 2, 2, *ENDLESS)
  # The first process writes the metrics.
  size = (30_000, 30_000)
  resource.prlimit(started[0].pid, resource.RLIMIT_FSIZE, size)
  statuses, texts = finish(started)
  assert statuses == [2, 75]
  assert texts[0][1].startswith("error: ")
  assert "File too large; make room" in texts[0][1]
  assert "error: process 0 on localhost has ended" in texts[1][1]


@pytest.mark.slow
def test_processes_that_disagree_say_so(tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  statuses, texts = finish(start([first, second], 1, *DIGITS))
  assert statuses == [2, 2]
  for _, error in texts:
    assert "error: process 1 does not see what process 0 writes to" in error

  port = free_port()
  together = [f"--coordinator=localhost:{port}", "--num_processes=2"]
  started = [
    *start([first], 1, *DIGITS, *together, "--process_id=0"),
    *start([first], 1, *DIGITS, *together, "--process_id=1", "--config.seed=1"),
  ]
  statuses, texts = finish(started)
  assert statuses == [2, 2]
  for _, error in texts:
    assert "error: process 1 has another config than process 0" in error
  assert not list(first.glob("metrics*"))


def parse(*arguments):
  return flags.parse(
    ["--config=configs/digits.py", "--workdir=/tmp/digits", *arguments]
  ).processes


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_peers_do_not_come(index):
  given = f"flags.Processes('localhost:{free_port()}', 2, {index})"
  code = (
    "from train import flags, processes; processes._PATIENCE = 1;"
    f"processes.connect({given})"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 75
  assert "did not come in 1 seconds; start all of them" in done.stderr


def test_flags():
  assert parse() is None
  assert parse(
    "--coordinator=10.0.0.1:1234", "--num_processes=4", "--process_id=3"
  ) == ("10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--process_id=0"], "--coordinator is missing; type --coordinator=10"),
    (
      ["--coordinator=a:1", "--process_id=0"],
      "--num_processes is missing; type --num_processes=2, or none of",
    ),
    (
      ["--coordinator=a", "--process_id=0", "--num_processes=2"],
      "--coordinator=a is not HOST:PORT",
    ),
    (
      ["--coordinator=a:1", "--process_id=x", "--num_processes=2"],
      "--process_id=x is not a number",
    ),
    (
      ["--coordinator=a:1", "--process_id=2", "--num_processes=2"],
      "--process_id=2 must be below --num_processes=2",
    ),
    (["--proces_id=0"], "did you mean --process_id"),
  ],
)
def test_bad_flags(arguments, words):
  with pytest.raises(UsageError, match=words):
    parse(*arguments)


ENVIRONMENTS = {
  "SLURM": {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "{count}",
    "SLURM_PROCID": "{i}",
    "SLURM_LOCALID": "{i}",
    "JAX_COORDINATOR_PORT": "{port}",
  },
  "in part": {"JAX_COORDINATOR_ADDRESS": "localhost:{port}"},
}
CONNECT = """
import jax
from train import processes
with processes.connect(None):
  print(jax.process_index(), jax.process_count(), jax.local_device_count())
"""


def connect(environment, count, devices=1):
  port = free_port()
  started = [
    subprocess.Popen(
      [sys.executable, "-c", CONNECT],
      cwd=ROOT,
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
      | {
        name: value.format(count=count, i=i, port=port)
        for name, value in ENVIRONMENTS.get(environment, {}).items()
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  return finish(started)


@pytest.mark.slow
def test_slurm_says_who_takes_part():
  _, texts = connect("SLURM", 2)
  assert [out for out, _ in texts] == ["0 2 1\n", "1 2 1\n"]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["SLURM", "none"])
def test_a_process_that_is_alone_has_all_its_devices(environment):
  _, ((out, _),) = connect(environment, 1, devices=4)
  assert out == "0 1 4\n"


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_process_that_is_alone_keeps_all_its_devices(monkeypatch, variable):
  def initialize():
    raise AssertionError("jax would take one device for it")

  monkeypatch.setenv(variable, "1")
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  processes.connect(None)


@pytest.mark.slow
def test_an_environment_that_says_it_in_part():
  (status,), ((_, error),) = connect("in part", 1)
  assert status == 1
  assert "UsageError: the environment describes the other processes" in error


def test_where_jax_runs_already_it_is_too_late_and_fine():
  processes.connect(None)


def test_the_second_signal_ends_at_once():
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with processes.Stop() as stop:
    assert not stop.agreed(1)
    signal.raise_signal(signal.SIGINT)
    assert stop.agreed(1)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored(monkeypatch):
  previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
  with processes.Stop() as stop:
    signal.raise_signal(signal.SIGINT)
    assert not stop.agreed(1)
  signal.signal(signal.SIGINT, previous)
