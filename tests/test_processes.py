"""Several real processes on this machine: one run, whoever takes part."""

import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from flax_mechanic import UsageError
from train import flags, main, processes

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
  "--config.mesh.fsdp=2",
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


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


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


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k != "steps_per_second"}
    for line in lines
  ]


def assert_same_run(found, wanted):
  assert len(found) == len(wanted)
  for line, expected in zip(found, wanted, strict=True):
    assert line == pytest.approx(expected, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "more"), [(DIGITS, False), (TEXT, True)], ids=["digits", "text"]
)
def test_processes_train_save_and_resume_as_one(tmp_path, job, more):
  whole = tmp_path / "whole"
  run_alone(whole, *job, "--config.num_steps=12")
  together = tmp_path / "together"
  first, second = run(together, 2, 4, *job, "--config.num_steps=8")
  assert "2 processes" in first
  assert "step" not in second
  saved = {"4", "8", "12"}
  if more:
    # Another number of processes goes on, and then a single one.
    run(together, 4, 2, *job, "--config.num_steps=10")
    saved = {"8", "10", "12"}
  output = run_alone(together, *job, "--config.num_steps=12")
  assert f"at step {10 if more else 8}" in output
  last = [line for line in metrics(together) if line["step"] > 10]
  assert_same_run(last, [line for line in metrics(whole) if line["step"] > 10])
  first = [line for line in metrics(together) if line["step"] < 8]
  assert_same_run(first, [each for each in metrics(whole) if each["step"] < 8])
  assert {path.name for path in (together / "checkpoints").iterdir()} == saved


# What a state may hold beside arrays like mechanic's: averages, random keys.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule_free", "dpsgd"])
def test_every_kind_of_state_goes_from_one_process_to_two(tmp_path, name):
  job = [*DIGITS, f"--config.optimizer={name}"]
  run_alone(tmp_path / "whole", *job, "--config.num_steps=8")
  split = ["--config.mesh.fsdp=2", "--config.shard_optimizer_state"]
  run_alone(tmp_path / "run", *job, "--config.num_steps=4", *split)
  other = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
  run(tmp_path / "run", 2, 4, *job, "--config.num_steps=8", *other)
  assert_same_run(metrics(tmp_path / "run"), metrics(tmp_path / "whole"))


@pytest.mark.slow
def test_processes_start_from_another_run(tmp_path):
  job = [*DIGITS, "--config.mesh.fsdp=-1", "--config.mesh.data=1"]
  run_alone(tmp_path / "first", *job, "--config.num_steps=4")
  new = [*job, "--config.num_steps=4", f"--config.init_from={tmp_path}/first"]
  run_alone(tmp_path / "one", *new)
  output, _ = run(tmp_path / "two", 2, 4, *new)
  assert f"starting from {tmp_path}/first/checkpoints/4" in output
  assert_same_run(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


@pytest.mark.slow
def test_damage_that_one_process_alone_reads(tmp_path):
  # Small arrays lie in a file that all read. In as wide an MLP one ReLU's gate
  # that rounding turns would change the run by 1e-3.
  job = [*TEXT, "--config.mesh.fsdp=-1", "--config.mesh.tensor=1"]
  job += ["--config.mesh.data=1"]
  run_alone(tmp_path / "whole", *job, "--config.num_steps=10")
  run(tmp_path / "run", 2, 4, *job, "--config.num_steps=8")
  step = tmp_path / "run" / "checkpoints" / "8"
  for each in step.rglob("ocdbt.process_1/d/*"):
    os.truncate(each, each.stat().st_size // 2)
  outputs = run(tmp_path / "run", 2, 4, *job, "--config.num_steps=10")
  assert "resuming" in outputs[0]
  assert "at step 4" in outputs[0]
  assert (step.parent / "damaged_8").is_dir()
  assert_same_run(metrics(tmp_path / "run"), metrics(tmp_path / "whole"))


def start_endless(workdir, count):
  """Starts a job that does not end, and waits for its first 20 steps."""
  arguments = [*DIGITS, "--config.num_steps=100000", "--config.log_every=1"]
  started = start([workdir] * count, 2 if count > 1 else 1, *arguments)
  log = workdir / "metrics.jsonl"
  while not log.exists() or log.read_text().count("\n") < 20:
    time.sleep(0.1)
    assert all(process.poll() is None for process in started)
  return started


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_at_one_step(tmp_path, number):
  # A shell's background jobs ignore it, and so would what they start.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  started = start_endless(tmp_path, 2)
  started[1].send_signal(number)
  statuses, texts = finish(started)
  assert statuses == [0, 0], texts
  assert "the same command resumes" in texts[0][0]
  step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert f"stopped at step {step}" in texts[0][0]
  # What was written ends where the checkpoint does.
  assert metrics(tmp_path)[-1]["step"] == step
  if number == signal.SIGINT:
    return  # All the rest is the same.
  more = f"--config.num_steps={step + 4}"
  resumed, whole = tmp_path, tmp_path / "whole"
  run(resumed, 2, 2, *DIGITS, "--config.log_every=1", more)
  run(whole, 2, 2, *DIGITS, "--config.log_every=1", more)
  last = lambda workdir: [
    each for each in metrics(workdir) if each["step"] > step
  ]
  assert last(resumed) == last(whole)


@pytest.mark.slow
def test_a_signal_to_a_lone_process(tmp_path):
  started = start_endless(tmp_path, 1)
  started[0].send_signal(signal.SIGTERM)
  (status,), ((output, _),) = finish(started)
  assert status == 0
  step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert f"stopped at step {step}; the same command resumes" in output


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
  # jax warns of what does not fit into its cache.
  monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
  arguments = [*DIGITS, "--config.num_steps=100000", "--config.log_every=1"]
  started = start([tmp_path] * 2, 2, *arguments)
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
