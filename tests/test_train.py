"""The job: trains, resumes exactly, says what is wrong, stays quiet."""

import functools
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx

from configs import digits, text
from flax_mechanic import Checkpointer, UsageError, methods
from flax_mechanic.checkpoints import record
from tests import optimizers
from train import job as job_lib
from train import loop
from train.fields import check_fields
from train.job import make_job

ROOT = pathlib.Path(__file__).parent.parent


def make_config(get_config=digits.get_config, variant="", **fields):
  config = get_config(variant)
  defaults = {
    "optimizer": "mechanic",
    "num_steps": 30,
    "batch_size": 32,
    "log_every": 5,
    "eval_every": 10,
    "checkpoint_every": 10,
    "schedule__warmup_steps": 5,
  }
  if config.task == "digits":
    defaults["model__widths"] = (16,)
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in (defaults | fields).items()}
  )
  return config


def metrics(workdir):
  """Returns the lines of metrics.jsonl, without what depends on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k != "steps_per_second"}
    for line in lines
  ]


def test_the_last_step_is_saved_whatever_the_interval(tmp_path):
  # Also where the one with the largest value of a metric is kept.
  best = {"checkpoint_best": "-eval/accuracy"}
  config = make_config(num_steps=10, checkpoint_every=6, **best)
  loop.train(config, tmp_path, Writer())
  steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  assert steps == {6, 10}


def test_an_evaluation_that_is_the_best_so_far_is_saved(tmp_path, monkeypatch):
  losses = iter([0.5, 0.3, 0.4, 0.6, 0.35, 0.7])
  evaluate = lambda job, state: {"eval/loss": next(losses)}
  monkeypatch.setattr(loop, "_evaluate", evaluate)
  fields = {"eval_every": 1, "checkpoint_every": 100, "checkpoint_keep": 9}
  for num_steps, saved in ((4, [1, 2, 4]), (6, [1, 2, 4, 6])):
    config = make_config(
      num_steps=num_steps,
      checkpoint_best="eval/loss",
      schedule__warmup_steps=0,
      **fields,
    )
    loop.train(config, tmp_path, Writer())
    with Checkpointer(tmp_path / "checkpoints", read_only=True) as found:
      assert found.steps() == saved


def test_the_first_step_takes_the_first_batch(tmp_path):
  config = make_config(num_steps=1, log_every=1, schedule__warmup_steps=0)
  writer = Writer()
  loop.train(config, tmp_path, writer)
  job = make_job(config)
  with jax.set_mesh(job.mesh):
    _, expected = job.train_step(job.create(), job.train_batch(0))
  loss = writer.scalars[0][1]["train/loss"]
  np.testing.assert_allclose(loss, expected["train/loss"], rtol=1e-6)


def test_a_schedule_counts_updates():
  config = make_config(num_steps=40, accumulate_steps=4)
  schedule = job_lib.make_schedule(config)
  assert schedule(5) == 1  # After the warm-up.
  assert schedule(10) == 0


def test_an_evaluation_is_the_mean_over_its_batches():
  job = types.SimpleNamespace(
    eval_batches=lambda: [1.0, 2.0, 6.0],
    eval_step=lambda state, batch: {"eval/loss": np.float32(state * batch)},
  )
  assert loop._evaluate(job, 2.0) == {"eval/loss": 6.0}


class Killed(BaseException):
  pass


class Writer:
  """What clu's MetricWriter offers, as far as the loop uses it."""

  def __init__(self, die_at=None):
    self.scalars, self.texts, self.hparams = [], {}, {}
    self.closed = False
    self._die_at = die_at

  def write_scalars(self, step, scalars):
    self.scalars.append((step, dict(scalars)))
    if step == self._die_at:
      raise Killed

  def write_texts(self, step, texts):
    self.texts |= texts

  def write_hparams(self, hparams):
    self.hparams = dict(hparams)

  def flush(self):
    pass

  def close(self):
    self.closed = True


def test_writes_what_it_promises(tmp_path, tmp_path_factory):
  precious = tmp_path_factory.mktemp("elsewhere") / "precious"
  precious.write_text("mine")
  links = ("config.json", "parameters.txt.new", "metrics.jsonl.new")
  for link in links:
    (tmp_path / link).symlink_to(precious)
  evaluation = loop.train(make_config(), tmp_path)
  lines = metrics(tmp_path)
  assert [line["step"] for line in lines if "train/loss" in line] == [
    *range(5, 31, 5)
  ]
  assert [line["step"] for line in lines if "eval/loss" in line] == [10, 20, 30]
  assert lines[-1] == {"step": 30, **evaluation}
  assert {"mechanic/scale", "learning_rate/effective"} <= lines[0].keys()
  names = {path.name for path in tmp_path.iterdir()}
  assert {"checkpoints", "config.json", "parameters.txt"} <= names
  assert precious.read_text() == "mine"
  assert not any(path.is_symlink() for path in tmp_path.iterdir())
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["optimizer"] == "mechanic"
  steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  assert steps == {10, 20, 30}


def test_a_checkpoint_tells_what_was_measured_at_its_step(tmp_path):
  loop.train(make_config(eval_every=30), tmp_path)
  with Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpointer:
    first, last = (checkpointer.read(step)["metrics"] for step in (10, 30))
  assert {"train/loss", "mechanic/scale"} <= first.keys()
  assert "eval/loss" not in first
  assert "eval/loss" in last


def test_a_writer_with_clu_s_interface_can_be_passed_in(tmp_path):
  writer = Writer()
  loop.train(make_config(), tmp_path, writer=writer)
  assert writer.closed
  assert writer.hparams["opt.mechanic.s_init"] == 1e-6
  assert len(writer.scalars) == 9
  assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("get_config", "variant", "fields"),
  [
    # Its batch statistics are state that no gradient changes.
    (digits.get_config, "augmented", {}),
    (
      text.get_config,
      "tiny",
      {"model__dropout": 0.1, "data__eval_windows": 16, "sample_length": 8},
    ),
  ],
)
def test_a_resumed_run_writes_the_same_numbers(
  tmp_path, get_config, variant, fields
):
  config = make_config(get_config, variant, **fields)
  expected = Writer()
  loop.train(config, tmp_path / "whole", writer=expected)
  first, second = Writer(die_at=25), Writer()
  with pytest.raises(Killed):
    loop.train(config, tmp_path / "cut", writer=first)
  loop.train(config, tmp_path / "cut", writer=second)

  def after(writer, step):
    return [
      (at, {k: v for k, v in s.items() if k != "steps_per_second"})
      for at, s in writer.scalars
      if at > step
    ]

  assert after(second, 0) == after(expected, 20)


def test_a_finished_run_is_evaluated_and_more_steps_go_on(tmp_path):
  first = loop.train(make_config(num_steps=10), tmp_path)
  assert loop.train(make_config(num_steps=10), tmp_path) == first
  loop.train(make_config(), tmp_path)
  steps = [line["step"] for line in metrics(tmp_path) if "eval/loss" in line]
  assert steps == [10, 20, 30]


def test_a_resumed_run_tells_what_changed_of_the_methods_in_use(
  tmp_path, capsys
):
  loop.train(make_config(num_steps=10), tmp_path)
  capsys.readouterr()
  changed = {"opt__mechanic__eps": 1e-9, "opt__lion__b1": 0.5}
  loop.train(make_config(num_steps=20, **changed), tmp_path)
  lines = capsys.readouterr().out.splitlines()
  assert sorted(line for line in lines if "is now" in line) == [
    "config.num_steps was 10 and is now 20",
    "config.opt.mechanic.eps was 1e-20 and is now 1e-09",
  ]


@pytest.mark.slow
def test_text_is_learned(tmp_path):
  config = make_config(
    text.get_config,
    "tiny",
    num_steps=150,
    log_every=50,
    eval_every=150,
    checkpoint_every=150,
    data__path=str(ROOT / "flax_mechanic"),
  )
  evaluation = loop.train(config, tmp_path)
  uniform = 8.0
  assert evaluation["eval/bits_per_byte"] < 0.65 * uniform


def test_parameters_are_kept_in_param_dtype():
  def draw(dtype):
    job = make_job(make_config(param_dtype=dtype))
    with jax.set_mesh(job.mesh):
      return nnx.to_pure_dict(job.create()["model"])

  wide, narrow = draw("float32"), draw("bfloat16")
  rounded = jax.tree.map(lambda x: x.astype("bfloat16"), wide)
  assert jax.tree.all(jax.tree.map(np.array_equal, rounded, narrow))
  assert {x.dtype for x in jax.tree.leaves(narrow)} == {np.dtype("bfloat16")}


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.STEPS[3:])
def test_the_job_runs_every_kind_of_step(tmp_path, name):
  config = optimizers.configure(
    make_config(num_steps=10, eval_every=10, model__widths=(8,)), name
  )
  evaluation = loop.train(config, tmp_path)
  assert np.isfinite(evaluation["eval/loss"])
  assert metrics(tmp_path)[0]["learning_rate/effective"] >= 0


def test_the_job_names_no_optimizer():
  files = [ROOT / "train" / name for name in ("loop.py", "job.py", "main.py")]
  for path in [*files, *(ROOT / "train" / "tasks").glob("*.py")]:
    words = set(re.findall(r"\w+", path.read_text()))
    assert not words & set(methods()), path


def test_the_readme_lists_every_optimizer():
  readme = (ROOT / "README.md").read_text()
  assert not [name for name in methods() if f"`{name}`" not in readme]


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"num_steps": 0}, r"config\.num_steps=0 must be at least 1"),
    ({"accumulate_steps": 0}, r"config\.accumulate_steps=0 must be at least 1"),
    (
      {"accumulate_steps": 50},
      r"config\.num_steps=30 must be at least config\.accumulate_steps=50",
    ),
    ({"eval_every": -1}, r"config\.eval_every=-1 must be at least 1"),
    ({"num_steps": 10**20}, r"config\.num_steps=1\d* must be .* below \d+"),
    (
      {"num_steps": None},
      "num_steps is of type NoneType; .* int, such as 1000",
    ),
    ({"num_steps": True}, "num_steps is of type bool; it must be of type int"),
    ({"schedule__name": None}, "schedule.name is of type NoneType; .* such as"),
    ({"mesh": None}, "config.mesh is of type NoneType; .* of type ConfigDict$"),
    ({"seed": 2**32}, r"config\.seed=4\d* must be at least 0, and below 4\d*"),
    (
      {"checkpoint_keep_every": -1},
      "checkpoint_keep_every=-1 must be at least",
    ),
    (
      {"checkpoint_best": "eval/los"},
      "'eval/los' is the name of no .* eval/lo",
    ),
    ({"optimizer": "mechanik"}, "did you mean 'mechanic'"),
    ({"schedule__name": "cosin"}, "config.schedule.name='cosin'"),
    ({"dtype": "float3"}, "config.dtype='float3'"),
    ({"task": "digit"}, "did you mean 'digits'"),
  ],
)
def test_bad_values_end_before_anything_is_written(tmp_path, fields, words):
  with pytest.raises(UsageError, match=words) as error:
    loop.train(make_config(**fields), tmp_path)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, False, True])
def test_a_field_whose_default_is_none_takes_its_type(value):
  config = make_config(guard=value)
  check_fields(config)
  with config.ignore_type():
    config.guard = 1
  with pytest.raises(UsageError, match=r"guard is of type int; .* type bool$"):
    check_fields(config)


@pytest.mark.parametrize("path", ["eval_every", "mesh.fsdp", "opt"])
def test_a_field_that_is_missing_is_named(tmp_path, path):
  config = make_config()
  *groups, name = path.split(".")
  with config.unlocked():
    del functools.reduce(getattr, groups, config)[name]
  with pytest.raises(UsageError, match=f"config.{path} is missing; start the"):
    loop.train(config, tmp_path)


def test_a_run_does_not_read_its_own_files_as_text(tmp_path):
  (tmp_path / "text").mkdir()
  config = make_config(text.get_config, "tiny", data__path=str(tmp_path))
  with pytest.raises(UsageError, match="its own files as text; take a --work"):
    loop.train(config, tmp_path / "runs" / "text")
  # What is hidden is not read.
  with pytest.raises(UsageError, match="holds no UTF-8 text"):
    loop.train(config, tmp_path / ".runs")
  assert not (tmp_path / "runs").exists()


def test_a_writer_is_closed_when_a_run_fails(tmp_path, monkeypatch):
  def evaluate(*unused):
    raise UsageError("as a test")

  monkeypatch.setattr(loop, "_evaluate", evaluate)
  writer = Writer()
  with pytest.raises(UsageError, match="as a test"):
    loop.train(make_config(num_steps=10, eval_every=5), tmp_path, writer)
  assert writer.closed


def test_a_run_that_diverged_does_not_end_well(tmp_path):
  config = make_config(num_steps=10, optimizer="sgd", learning_rate=1e30)
  with pytest.raises(UsageError, match="eval/loss is nan at step 10"):
    loop.train(config, tmp_path)
  assert (tmp_path / "checkpoints" / "10").is_dir()


def test_a_run_says_that_it_stopped_when_it_is_saved(tmp_path, monkeypatch):
  said, wait = [], Checkpointer.wait

  def waits(checkpointer):
    wait(checkpointer)
    said.append("saved")

  monkeypatch.setattr(Checkpointer, "wait", waits)
  monkeypatch.setattr(loop.Progress, "print", lambda _, text: said.append(text))
  monkeypatch.setattr(loop.processes.Stop, "agreed", lambda _, step: step == 3)
  loop.train(make_config(), tmp_path)
  stopped = next(i for i, text in enumerate(said) if "stopped at" in text)
  assert said[stopped - 1] == "saved"
  assert (tmp_path / "checkpoints" / "3").is_dir()


def test_a_resume_under_other_versions_says_so(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(record, "versions", lambda: {"jax": "0.1", "flax": "0.2"})
  loop.train(make_config(num_steps=10), tmp_path)
  monkeypatch.setattr(record, "versions", lambda: {"jax": "0.3", "flax": "0.2"})
  capsys.readouterr()
  loop.train(make_config(), tmp_path)
  lines = capsys.readouterr().out.splitlines()
  assert [line for line in lines if "was saved and is now" in line] == [
    "jax was 0.1 when step 10 was saved and is now 0.3"
  ]


def test_another_optimizer_in_the_same_workdir_is_refused(tmp_path):
  loop.train(make_config(num_steps=10), tmp_path)
  before = metrics(tmp_path)
  with pytest.raises(
    UsageError, match=r"config\.optimizer was 'mechanic' and is 'adamw'"
  ):
    loop.train(make_config(num_steps=20, optimizer="adamw"), tmp_path)
  assert metrics(tmp_path) == before


def command(workdir, *arguments):
  return [
    *(sys.executable, "-m", "train.main", "--config=configs/digits.py"),
    *("--config.optimizer=mechanic", f"--workdir={workdir}", *arguments),
  ]


@pytest.mark.slow
def test_output_fits_on_a_screen(tmp_path):
  run = subprocess.run(
    command(tmp_path, "--config.num_steps=500", "--config.model.widths=(16,)"),
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  lines = (run.stdout + run.stderr).splitlines()
  assert 5 < len(lines) <= 40
  assert max(map(len, lines)) <= 140
  assert "done at step 500" in lines[-1]
