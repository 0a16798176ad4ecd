"""Bad input is one sentence and status 2; everything else parses."""

import errno
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import absl.logging
import pytest
from ml_collections import ConfigDict, config_dict

import flax_mechanic
import train
from train import command, flags, main

_CONFIG = '''
"""A job for these tests."""
import flax_mechanic
from ml_collections import ConfigDict, config_dict

def get_config(variant="small"):
  if variant not in ("small", "large"):
    raise flax_mechanic.UsageError(f"there is no variant {variant!r}")
  config = ConfigDict({
    "learning_rate": 1e-3,
    "num_steps": 100 if variant == "small" else 1000,
    "schedule": {"name": "constant", "warmup_steps": 0},
    "init_from": "",
    "anything": None,
    "limit": config_dict.placeholder(int),
    "sizes": (1, 2),
    "no_sizes": (),
    "names": ["a", "b"],
  })
  config.opt = ConfigDict({"sgd": {"nesterov": False, "momentum": 0.9}})
  config.opt.mechanic = ConfigDict({"base": "adamw", "s_init": 1e-6})
  config.opt.sam = ConfigDict({"base": "sgd", "rho": 0.05})
  config.opt.prodigy = ConfigDict({"beta1": 0.9})
  config.opt.adamw = ConfigDict({"b1": 0.9, "eps": 1e-8})
  config.optimizer = "adamw"
  return config
'''


@pytest.fixture
def job(tmp_path, monkeypatch):
  """A directory with configs/job.py, and a train.loop that records its call."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/job.py").write_text(_CONFIG)
  (tmp_path / "configs/none.py").write_text("x = 1\n")
  (tmp_path / "configs/plain.py").write_text("def get_config():\n  return {}\n")
  (tmp_path / "configs/text.txt").write_text("")
  (tmp_path / "configs/wants.py").write_text("def get_config(size):\n  ...\n")
  (tmp_path / "configs/broken.py").write_text("def get_config():\n  1 / 0\n")
  (tmp_path / "file").write_text("")
  (tmp_path / "link").symlink_to("nothing")
  (tmp_path / "file_link").symlink_to("file")
  monkeypatch.chdir(tmp_path)
  calls = []
  loop = types.SimpleNamespace(train=lambda *args: calls.append(args))
  monkeypatch.setitem(sys.modules, "train.loop", loop)
  monkeypatch.setattr(train, "loop", loop, raising=False)
  return calls


def _run(capsys, *argv, config="configs/job.py", workdir="out"):
  """Runs main; returns its status and what it wrote to standard error."""
  given = [f"--config={config}"] * bool(config)
  given += [f"--workdir={workdir}"] * bool(workdir)
  status = main.main([*given, *argv])
  return status, capsys.readouterr().err


@pytest.mark.parametrize(
  ("argument", "sentence"),
  [
    # Unknown fields.
    (
      "--config.optimzer=mechanic",
      "there is no --config.optimzer; did you mean --config.optimizer?",
    ),
    (
      "--config.opt.mechanic.s_int=1",
      "there is no --config.opt.mechanic.s_int; did you mean "
      "--config.opt.mechanic.s_init?",
    ),
    (
      "--config.opt.mecanic.s_init=1",
      "there is no --config.opt.mecanic.s_init; did you mean "
      "--config.opt.mechanic.s_init?",
    ),
    (
      "--config.s_init=1",
      "there is no --config.s_init; did you mean --config.opt.mechanic.s_init?",
    ),
    (
      "--config.opt.adamw.xyz=1",
      "there is no --config.opt.adamw.xyz; config.opt.adamw has b1, eps",
    ),
    (
      "--config.learning_rate.peak=1",
      "there is no --config.learning_rate.peak; config.learning_rate is one "
      "field, not a group",
    ),
    (
      "--config.opt..s_init=1",
      "there is no --config.opt..s_init; did you mean "
      "--config.opt.mechanic.s_init?",
    ),
    # Not flags at all.
    (
      "config.optimizer=mechanic",
      "'config.optimizer=mechanic' is not a flag; did you mean "
      "--config.optimizer=mechanic?",
    ),
    (
      "-config.optimizer=mechanic",
      "'-config.optimizer=mechanic' is not a flag; did you mean "
      "--config.optimizer=mechanic?",
    ),
    (
      "mechanic",
      "'mechanic' is not a flag; flags look like --config.num_steps=100",
    ),
    (
      "--worksdir=out",
      "there is no flag --worksdir; did you mean --workdir?",
    ),
    (
      "--optimizer=mechanic",
      "there is no flag --optimizer; did you mean --config.optimizer?",
    ),
    (
      "--conifg.optimizer=mechanic",
      "there is no flag --conifg.optimizer; did you mean --config.optimizer?",
    ),
    ("--", "'--' is not a flag; flags look like --config.num_steps=100"),
    # Values.
    (
      "--config.learning_rate=abc",
      "--config.learning_rate=abc: config.learning_rate is of type float; "
      "type --config.learning_rate=0.001",
    ),
    (
      "--config.num_steps=1e4",
      "--config.num_steps=1e4: config.num_steps is of type int; type "
      "--config.num_steps=100",
    ),
    (
      "--config.limit=abc",
      "--config.limit=abc: config.limit is of type int; type --config.limit=10",
    ),
    (
      "--config.sizes=(1,",
      "--config.sizes=(1,: config.sizes is of type tuple; type "
      "'--config.sizes=(1, 2)'",
    ),
    (
      "--config.names=c",
      "--config.names is a list, which no flag can set; make it a number, a "
      "string or a tuple in the config file",
    ),
    (
      "--config.opt.sgd.nesterov=maybe",
      "--config.opt.sgd.nesterov=maybe: config.opt.sgd.nesterov is of type "
      "bool; type --config.opt.sgd.nesterov=true or "
      "--config.opt.sgd.nesterov=false",
    ),
    (
      "--config.optimizer",
      "--config.optimizer has no value; type --config.optimizer=adamw",
    ),
    (
      "--config.init_from",
      "--config.init_from has no value; type --config.init_from=VALUE",
    ),
    (
      "--noconfig.optimizer",
      "--noconfig.optimizer: config.optimizer is of type str; type "
      "--config.optimizer=adamw",
    ),
    (
      "--noconfig.opt.sgd.nesterov=false",
      "--noconfig.opt.sgd.nesterov=false: config.opt.sgd.nesterov is of type "
      "bool; type --config.opt.sgd.nesterov=true or "
      "--config.opt.sgd.nesterov=false",
    ),
    # Options of an optimizer that is not in use.
    (
      "--config.opt.mechanic.base=sgd",
      "--config.opt.mechanic.base has no effect on adamw; leave it out, or "
      "type --config.optimizer=mechanic",
    ),
    (
      "--noconfig.opt.sgd.nesterov",
      "--noconfig.opt.sgd.nesterov has no effect on adamw; leave it out, or "
      "type --config.optimizer=sgd",
    ),
    (
      "--config.optimizer=mechanic --config.opt.sgd.momentum=0.8",
      "--config.opt.sgd.momentum has no effect on mechanic over adamw; leave "
      "it out, or type --config.opt.mechanic.base=sgd",
    ),
    (
      "--config.optimizer=mechanic --config.opt.sam.rho=0.1",
      "--config.opt.sam.rho has no effect on mechanic over adamw; leave it "
      "out, or type --config.optimizer=sam",
    ),
    (  # Mechanic refuses it.
      "--config.optimizer=mechanic --config.opt.prodigy.beta1=0.8",
      "--config.opt.prodigy.beta1 has no effect on mechanic over adamw; leave "
      "it out, or type --config.optimizer=prodigy",
    ),
    (
      "--config.schedule=constant",
      "--config.schedule is a group of fields; set one of "
      "--config.schedule.name, --config.schedule.warmup_steps",
    ),
    (
      "--config.schedule",
      "--config.schedule is a group of fields; set one of "
      "--config.schedule.name, --config.schedule.warmup_steps",
    ),
  ],
)
def test_bad_argument(job, capsys, argument, sentence):
  assert _run(capsys, *argument.split(" ")) == (2, f"error: {sentence}\n")
  assert not job


@pytest.mark.parametrize(
  ("config", "sentence"),
  [
    ("", "--config is missing; type --config=configs/digits.py"),
    (
      "configs/jb.py",
      "--config=configs/jb.py: there is no file configs/jb.py; did you mean "
      "--config=configs/job.py?",
    ),
    (
      "job",
      "--config=job: there is no file job; did you mean "
      "--config=configs/job.py?",
    ),
    (
      "configs",
      "--config=configs: there is no file configs; there are "
      "configs/broken.py, configs/job.py, configs/none.py, configs/plain.py, "
      "configs/wants.py",
    ),
    (
      "nowhere/jub.py:x",
      "--config=nowhere/jub.py:x: there is no file nowhere/jub.py; did you "
      "mean --config=configs/job.py?",
    ),
    (
      "configs/text.txt",
      "--config=configs/text.txt: configs/text.txt is not a Python file",
    ),
    (
      "configs/none.py",
      "--config=configs/none.py: configs/none.py has no function get_config",
    ),
    (
      "configs/plain.py",
      "--config=configs/plain.py: get_config returned a dict; it must "
      "return a ConfigDict",
    ),
    (
      "configs/plain.py:small",
      "--config=configs/plain.py:small: configs/plain.py has no variants; "
      "type --config=configs/plain.py",
    ),
    (
      "configs/wants.py",
      "--config=configs/wants.py: configs/wants.py needs a variant; type "
      "--config=configs/wants.py:VARIANT",
    ),
    ("configs/job.py:huge", "there is no variant 'huge'"),
  ],
)
def test_bad_config(job, capsys, config, sentence):
  assert _run(capsys, config=config) == (2, f"error: {sentence}\n")
  assert not job


@pytest.mark.parametrize(
  ("workdir", "sentence"),
  [
    ("", "--workdir is missing; type --workdir=/tmp/digits"),
    ("file", "--workdir=file cannot be written: file is no folder"),
    (
      "file_link",
      "--workdir=file_link cannot be written: file_link is no folder",
    ),
    ("link", "--workdir=link cannot be written: link is a link to nothing"),
    ("link/x", "--workdir=link/x cannot be written: link is a link to nothing"),
    (
      "/dev/null",
      "--workdir=/dev/null cannot be written: /dev/null is no folder",
    ),
    ("file/x", "--workdir=file/x cannot be written: Not a directory"),
    (
      "ftp://host/x",
      "ftp://host/x is neither a folder nor in a bucket; type a folder, or "
      "gs://BUCKET/FOLDER",
    ),
  ],
)
def test_bad_workdir(job, capsys, workdir, sentence):
  assert _run(capsys, workdir=workdir) == (2, f"error: {sentence}\n")
  assert not job


def test_flag_without_its_value(job, capsys):
  status, error = _run(capsys, "--workdir", workdir="")
  assert status == 2
  assert error == "error: --workdir has no value; type --workdir=/tmp/digits\n"


def test_good_arguments(job, capsys, tmp_path):
  argv = [
    "--config.optimizer=mechanic",
    "--config.learning_rate",
    "-1",
    "--config.num_steps=7",
    "--config.num_steps=8",
    "--config.opt.mechanic.base=sgd",
    "--config.opt.sgd.nesterov",
    "--config.opt.mechanic.s_init=1e-3",
    "--config.init_from=/tmp/a=b",
    "--config.anything=[1, 'x']",
    "--config.limit=3",
    "--config.sizes=3",
    "--config.sizes=",
    "--config.sizes=4",
    "--config.sizes=5",
    "--config.no_sizes=",
  ]
  # Before --config as well as after it.
  for before, after in [(argv, []), ([], argv)]:
    job.clear()
    status = main.main(
      [*before, "--config=configs/job.py:large", "--workdir", "out/x", *after]
    )
    assert status == 0
    [(config, workdir)] = job
    assert config.optimizer == "mechanic"
    assert config.learning_rate == -1.0
    assert config.num_steps == 8
    assert config.opt.sgd.nesterov is True
    assert config.opt.mechanic.s_init == 1e-3
    assert config.init_from == "/tmp/a=b"
    assert config.anything == [1, "x"]
    assert config.limit == 3
    assert config.sizes == (4, 5)
    assert config.no_sizes == ()
    assert config.schedule.name == "constant"
    assert config.is_locked
    assert workdir.is_dir()
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
  ("overrides", "value"),
  [
    (["--config.limit=3"], 3.0),
    (["--config.limit=3", "--config.limit=None"], None),
    (["--config.limit=None", "--config.limit=3"], 3.0),
  ],
)
def test_field_that_is_none(overrides, value):
  config = ConfigDict({"limit": config_dict.placeholder(float)}).lock()
  pairs = [override.removeprefix("--").split("=") for override in overrides]
  flags.override(config, pairs)
  assert config.limit == value


@pytest.mark.parametrize(
  ("optimizer", "rate"),
  [
    ("adamw", 0.003),
    ("lion", 0.0003),
    # A wrapper's is its base's, and of a learned one nothing is read.
    ("sam", 0.03),
    ("mechanic", 0.003),
  ],
)
def test_an_automatic_learning_rate_is_relative_to_adamw_s(optimizer, rate):
  config = flags.load_config("configs/digits.py:mlp")
  given = [("config.learning_rate", "auto"), ("config.optimizer", optimizer)]
  flags.override(config, given)
  assert config.learning_rate == rate
  # The last value counts.
  flags.override(config, [given[0], ("config.learning_rate", "0.5")])
  assert config.learning_rate == 0.5


def test_one_command_line_holds_the_rates_of_several_optimizers():
  config, _ = flags.read(
    [
      "--config=configs/digits.py",
      "--config.optimizer=lion",
      "--config.opt.sgd.learning_rate=0.1",
      "--config.opt.lion.learning_rate=1e-4",
    ],
    [],
  )
  assert (config.opt.sgd.learning_rate, config.opt.lion.learning_rate) == (
    0.1,
    1e-4,
  )


def test_load_config(job):
  file = pathlib.Path("configs/frozen.py")
  frozen = "return config_dict.FrozenConfigDict(config)"
  file.write_text(_CONFIG.replace("return config", frozen))
  for name in ("configs/job.py:large", f"{file}:large"):
    config = flags.load_config(name)
    flags.override(config, [("config.learning_rate", "0.5")])
    assert (config.num_steps, config.learning_rate) == (1000, 0.5)
    assert config.is_locked


def test_bool_off():
  config = ConfigDict({"flag": True}).lock()
  flags.override(config, [("noconfig.flag", None)])
  assert config.flag is False


def test_home_directory(job, capsys, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert _run(capsys, workdir="~/run") == (0, "")
  assert job[0][1] == tmp_path / "run"
  (tmp_path / "job.py").write_text(pathlib.Path("configs/job.py").read_text())
  assert flags.load_config("~/job.py:large").num_steps == 1000


def test_usage_error_in_training(job, capsys, monkeypatch):
  def usage_error(config, workdir):
    raise flax_mechanic.UsageError(f"no optimizer {config.optimizer}")

  monkeypatch.setattr(train.loop, "train", usage_error)
  assert _run(capsys, "--config.optimizer=x") == (2, "error: no optimizer x\n")


def test_what_is_not_installed_is_said(job, capsys, monkeypatch):
  monkeypatch.delitem(sys.modules, "train.loop")
  monkeypatch.delattr(train, "loop")
  monkeypatch.setitem(sys.modules, "clu", None)
  assert _run(capsys) == (
    2,
    "error: training needs clu, which is not installed; type"
    ' pip install -e ".[train]"\n',
  )


def test_quiet(job, capsys):
  absl.logging.set_verbosity(absl.logging.INFO)
  _run(capsys)
  assert absl.logging.get_verbosity() == absl.logging.WARNING


def test_optimizer_value_errors(job, capsys, monkeypatch, tmp_path):
  (tmp_path / "configs/mine.py").write_text(
    "import flax_mechanic, ml_collections\n"
    "def get_config():\n"
    "  config = ml_collections.ConfigDict({'learning_rate': 1e-3})\n"
    "  return flax_mechanic.add_optimizer_config(config)\n"
  )
  monkeypatch.setattr(
    train.loop, "train", lambda config, _: flax_mechanic.make_optimizer(config)
  )
  for argument, nearest in [
    ("--config.optimizer=mechanik", "mechanic"),
    ("--config.opt.mechanic.base=adamww", "adamw"),
  ]:
    status, error = _run(
      capsys,
      "--config.optimizer=mechanic",
      argument,
      config="configs/mine.py",
    )
    print(error)
    assert status == 2
    assert error.count("\n") == 1
    assert nearest in error
    assert argument.split("=")[1] in error


def test_defects_keep_their_traceback(job, capsys, monkeypatch):
  with pytest.raises(ZeroDivisionError):
    _run(capsys, config="configs/broken.py")

  def defect(config, workdir):
    raise ValueError("a defect")

  monkeypatch.setattr(train.loop, "train", defect)
  with pytest.raises(ValueError, match="a defect"):
    _run(capsys)


def test_help(job, capsys):
  assert main.main(["--help"]) == 0
  assert "python -m train.main --config=FILE" in capsys.readouterr().out
  file = "configs/job.py:large"
  for given in ([f"--config={file}", "--help"], ["--help", "--config", file]):
    assert main.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--config.opt.mechanic.base=adamw" in lines
    assert "--config.num_steps=1000" in lines
  for given in (["--config.optimizer=help"], ["--config.optimizer", "help"]):
    assert main.main(given) == 0
    assert "mechanic" in capsys.readouterr().out
  assert not job


def _command(*argv):
  return [sys.executable, "-m", "train.main", *argv]


def test_subprocess_typo():
  done = subprocess.run(
    _command("--worksdir=/tmp/x"), capture_output=True, text=True
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "error: there is no flag --worksdir; did you mean --workdir?\n"
  )


def test_subprocess_ctrl_c(tmp_path):
  (tmp_path / "slow.py").write_text(
    "import pathlib, time\n"
    "def get_config():\n"
    f"  pathlib.Path({str(tmp_path / 'here')!r}).touch()\n"
    "  time.sleep(60)\n"
  )
  # A shell's background jobs ignore it, and so would what they start.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    _command(f"--config={tmp_path / 'slow.py'}", f"--workdir={tmp_path}"),
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  while not (tmp_path / "here").exists() and process.poll() is None:
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=30)
  assert process.returncode == 130
  assert error == "stopped by Ctrl-C; the same command resumes\n"


@pytest.mark.parametrize("module", ["train.main", "train.inspect"])
def test_subprocess_ctrl_c_while_it_imports(module):
  signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    # It says what it has imported.
    [sys.executable, "-X", "importtime", "-m", module],
    stderr=subprocess.PIPE,
    text=True,
  )
  while not process.stderr.readline().endswith("| train\n"):
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=30)
  assert process.returncode == 130
  assert error.endswith("stopped by Ctrl-C; the same command resumes\n")
  assert "Traceback" not in error


@pytest.mark.parametrize(
  ("module", "says"),
  [
    (["train.main", "--help", "--config=configs/digits.py"], ""),
    pytest.param(
      ["train.inspect", "{workdir}"],
      "error: the reader of this output has gone; the same command resumes\n",
      marks=pytest.mark.slow,
    ),
  ],
  ids=["help", "inspect"],
)
def test_subprocess_that_nobody_reads(tmp_path, module, says):
  for step in (1, 2):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, "-m", *(e.format(workdir=tmp_path) for e in module)],
    stdout=writer,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  os.close(writer)
  assert (done.returncode, done.stderr) == (1, says)


def test_a_broken_pipe_that_is_not_the_output_s_is_a_defect():
  def report(arguments):
    yield "a line"
    raise BrokenPipeError("of a data loader")

  with pytest.raises(BrokenPipeError, match="of a data loader"):
    command.run_command("help", report, [])


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl"),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG), "metrics.jsonl"),
    # TensorStore's.
    ValueError("RESOURCE_EXHAUSTED: x: No space left on device [os_error_"),
  ],
  ids=["disk", "limit", "tensorstore"],
)
@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_full_disk_is_one_sentence(capsys, error, link):
  def report(arguments):
    yield "a line"
    failure = RuntimeError("saving failed")
    setattr(failure, link, error)
    raise failure

  assert command.run_command("help", report, []) == 2
  printed = capsys.readouterr().err
  assert printed.startswith("error: ")
  assert printed.count("\n") == 1
  words = getattr(error, "strerror", None) or "No space left on device"
  assert f"{words}; make room" in printed


def test_a_full_disk_where_the_output_goes():
  code = """
import sys
from train import command
sys.exit(command.run_command("help", lambda arguments: iter(["a line"]), []))
"""
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=pathlib.Path(__file__).parent.parent,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
    )
  assert done.returncode == 2
  assert done.stderr.startswith("error: No space left on device; make room")
  assert done.stderr.count("\n") == 1


def test_what_orbax_logs_of_an_error_is_left_out(caplog):
  command.quieten(absl.logging.ERROR)
  logger = logging.getLogger("asyncio")
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  logger.error("never retrieved", exc_info=full)
  logger.error("never retrieved: <Task .../orbax/checkpoint/x.py:126>")
  logger.error("of a data loader", exc_info=ValueError("x"))
  assert [record.message for record in caplog.records] == ["of a data loader"]
