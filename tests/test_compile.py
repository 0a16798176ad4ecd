"""`python -m train.compile`: what it prints, for devices that are not there."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import text
from train import compile as compile_lib
from train.cost import program, updates
from train.cost.step import measure
from train.job import make_job

pytestmark = pytest.mark.usefixtures("optimized")
ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=configs/text.py:tiny"


def command(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", "train.compile", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    # The command itself says how many devices.
    env={k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"},
  )
  return done.returncode, done.stdout, done.stderr


def columns(output):
  """Returns optimizer -> label -> cell of the printed table."""
  rows = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in output.splitlines()
    if line.startswith("|")
  ]
  head, _, *rows = rows
  return {
    name: {row[0]: row[i] for row in rows} for i, name in enumerate(head) if i
  }


@pytest.mark.slow
def test_eight_devices_of_a_cpu():
  status, output, error = command(
    CONFIG,
    "--topology=cpu:8",
    "--config.optimizer=mechanic",
    "--config.opt.mechanic.base=lion",
    "--config.mesh.tensor=2",
  )
  assert (status, error) == (0, "")
  assert output.startswith("8 devices of cpu, 1 processes\n")
  found = columns(output)
  assert list(found) == ["lion", "optax's mechanize", "mechanic"]
  for label in ("in all, MiB", "GFLOP in matrix products", "all-reduce"):
    assert all(column[label] for column in found.values())
  gathers = {name: column["all-gather"] for name, column in found.items()}
  assert gathers["mechanic"] == gathers["lion"]
  # Optax's own inner products gather; the flag's repair does not reach them.
  assert gathers["optax's mechanize"] != gathers["lion"]


@pytest.mark.parametrize(
  ("optimizer", "base", "names"),
  [
    ("sgd", None, ["sgd", "optax's mechanize", "mechanic"]),
    ("mechanic", "lion", ["lion", "optax's mechanize", "mechanic"]),
    ("sam", "sgd", ["sgd", "optax's mechanize", "mechanic", "sam"]),
    ("prodigy", None, ["adamw", "optax's mechanize", "mechanic", "prodigy"]),
  ],
)
def test_what_stands_beside_the_job_s_optimizer(optimizer, base, names):
  updates.register_reference()
  config = text.get_config("tiny")
  config.optimizer = optimizer
  if base:
    config.opt[optimizer].base = base
  compiled = list(compile_lib._variants(config))
  assert [name for name, _ in compiled] == names
  variants = dict(compiled)
  optimizers = dict.fromkeys(names[3:], optimizer) | {
    names[0]: names[0],
    "optax's mechanize": updates.REFERENCE,
    "mechanic": "mechanic",
  }
  for name, variant in variants.items():
    assert variant.optimizer == optimizers[name]
  reference = variants["optax's mechanize"].opt[updates.REFERENCE]
  assert reference.base == names[0]
  assert variants["mechanic"].opt.mechanic.base == names[0]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([CONFIG], "--topology is missing; type --topology=v5e:16x16"),
    ([CONFIG, "--topology=v7:2"], "--topology=v7:2 is unknown; type"),
    ([CONFIG, "--topology=v5e:2"], "--topology=v5e:2 is unknown; type"),
    ([CONFIG, "--topology=cpu:0"], "--topology=cpu:0 is unknown; type"),
    ([CONFIG, "--topology=v5e:0x4"], "--topology=v5e:0x4 is unknown; type"),
    ([CONFIG, "--topology=v5e:2x2", "--num_slices=0"], "is no number of sli"),
    ([CONFIG, "--topology=cpu:8", "--num_slices=2"], "leave --num_slices out"),
    ([CONFIG, "--topolgy=cpu:8"], "did you mean --topology?"),
    ([CONFIG, "--workdir=x", "--topology=cpu:8"], "there is no flag --workdir"),
    (["--topology=cpu:8"], "--config is missing"),
  ],
)
def test_bad_input(capsys, arguments, words):
  assert compile_lib.main(arguments) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1


def test_without_the_compiler_it_says_how_to_install_it(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  assert compile_lib.main([CONFIG, "--topology=v5e:2x2"]) == 2
  assert capsys.readouterr().err == (
    "error: --topology=v5e:2x2 needs the compiler for TPUs; type pip install "
    '-e ".[tpu]" -c constraints.txt, or --topology=cpu:8\n'
  )


def test_an_error_without_words_is_named(capsys, monkeypatch):
  def fail(*unused):
    raise jax.errors.JaxRuntimeError("")

  monkeypatch.setattr(program, "tpu_devices", fail)
  assert compile_lib.main([CONFIG, "--topology=v5e:2x2"]) == 2
  assert "knows (JaxRuntimeError); type" in capsys.readouterr().err


def test_help(capsys):
  assert compile_lib.main(["--help"]) == 0
  assert "--topology=v5e:16x16" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_no_such_slice(capsys):
  assert compile_lib.main([CONFIG, "--topology=v5e:15x3"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: --topology=v5e:15x3 is not one that the comp")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("topology", "chips"),
  [("v4:2x2x1", 4), ("v5p:2x2x2", 8), ("v6e:2x2", 4)],
)
@pytest.mark.usefixtures("tpu_compiler")
def test_kinds_of_chips(topology, chips):
  devices = program.tpu_devices(topology)
  assert len(devices) == chips
  config = text.get_config("tiny")
  config.optimizer = "mechanic"
  config.batch_size = chips
  column = measure(make_job(config, devices), hbm=16)
  assert column["fits"] == "yes, 0%"


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_between_slices_mechanic_sends_one_number_more_than_its_base():
  updates.register_reference()
  config = text.get_config("tiny")
  config.update(batch_size=8, optimizer="mechanic")
  config.mesh.update(data=2, fsdp=-1)
  devices = program.tpu_devices("v5e:2x2", num_slices=2)
  sent = {
    name: measure(make_job(variant, devices), hbm=16)["send"].split(", ")
    for name, variant in compile_lib._variants(config)
  }
  counts = {name: int(count) for name, (count, _) in sent.items()}
  assert counts["adamw"] > 0
  assert counts["mechanic"] <= counts["adamw"] + 1


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_a_pod_s_memory_is_what_arithmetic_says():
  size = lambda job: sum(x.size for x in jax.tree.leaves(job.target["model"]))
  config = text.get_config("8b")
  config.optimizer = "mechanic"
  job = make_job(config, program.tpu_devices("v5e:16x16"))
  assert size(job) == pytest.approx(7787e6, rel=1e-3)
  # Compiled with smaller layers, in a quarter of the time.
  config.batch_size = 4
  config.model.update(
    embed_dim=512, mlp_dim=2048, num_heads=8, context_length=512
  )
  job = make_job(config, program.tpu_devices("v5e:2x2"))
  count, column = size(job), measure(job, hbm=16)
  mib = {
    name: float(value.replace(",", ""))
    for name, value in column.items()
    if name.endswith("MiB")
  }
  copy = 4 * count / 4 / 2**20
  # Norms' scales are whole on each chip; the compiler pads what is small.
  assert mib["parameters, MiB"] == pytest.approx(copy, rel=0.02)
  assert mib["optimizer's state, MiB"] == pytest.approx(3 * copy, rel=0.02)
  assert mib["arguments as compiled, MiB"] == pytest.approx(4 * copy, rel=0.05)
  assert mib["temporaries, MiB"] < 1.5 * copy
  # The new state is where the old one was.
  parts = ("arguments as compiled, MiB", "temporaries, MiB", "program, MiB")
  whole = sum(mib[part] for part in parts)
  assert mib["in all, MiB"] == pytest.approx(whole, rel=0.02)
  assert column["fits"].startswith("yes")
  # A matrix product forward, one more to recompute it, two backward.
  tokens = 4 * 512
  flops = float(column["GFLOP in matrix products"].replace(",", "")) * 4e9
  assert 8 * count * tokens < flops < 9.5 * count * tokens


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_what_does_not_fit_is_said():
  devices = program.tpu_devices("v5e:2x2")
  config = text.get_config("8b")
  config.batch_size = 4
  column = measure(make_job(config, devices), hbm=16)
  assert re.fullmatch(r"no, it takes [\d.]+G of 15\.75G", column["fits"])


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_the_state_in_host_memory_is_counted_there():
  devices = program.tpu_devices("v5e:2x2")
  config = text.get_config("tiny")
  config.model.update(embed_dim=512, mlp_dim=2048)
  config.optimizer = "mechanic"
  config.mesh.update(data=1, fsdp=-1)
  here = measure(make_job(config, devices), hbm=16)
  config.offload_optimizer_state = True
  there = measure(make_job(config, devices), hbm=16)
  number = lambda text: float(text.replace(",", ""))
  assert "host memory, MiB" not in here
  state = number(here["optimizer's state, MiB"])
  assert number(there["host memory, MiB"]) == pytest.approx(state, rel=0.05)
  held = [number(each["arguments as compiled, MiB"]) for each in (here, there)]
  assert held[0] - held[1] == pytest.approx(state, rel=0.05)
