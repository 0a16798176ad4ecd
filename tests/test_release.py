"""The wheel and the sdist: what they hold, and that they work by themselves."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import flax_mechanic

ROOT = pathlib.Path(__file__).parent.parent
VERSION = flax_mechanic.__version__
# Run where nothing of the checkout is in sight.
SMOKE_TEST = """
import doctest, importlib.metadata, pathlib, sys
import jax, jax.numpy as jnp, optax
from ml_collections import ConfigDict
import flax_mechanic

assert pathlib.Path(flax_mechanic.__file__).is_relative_to(sys.prefix)
version = importlib.metadata.version("flax_mechanic")
assert version == flax_mechanic.__version__ == sys.argv[1]

params = {"w": jnp.ones(3)}
tx = flax_mechanic.mechanize(optax.adamw(1.0))
state = tx.init(params)
updates, state = jax.jit(tx.update)({"w": jnp.ones(3)}, state, params)
assert float(updates["w"][0]) < 0

config = flax_mechanic.add_optimizer_config(ConfigDict(), "mechanic")
flax_mechanic.make_optimizer(config).init(params)
assert flax_mechanic.Checkpointer and flax_mechanic.adopt  # They load late.
modules = [
  module for name, module in sorted(sys.modules.items())
  if name.partition(".")[0] == "flax_mechanic"
]
failed, tried = map(sum, zip(*map(doctest.testmod, modules)))
assert tried > 30 and not failed
for name in ("train", "configs", "tests", "colab", "docs"):
  try:
    __import__(name)
  except ModuleNotFoundError:
    continue
  raise AssertionError(f"{name} is installed")
print("fine")
"""


def run(*command, **options):
  done = subprocess.run(
    [str(part) for part in command],
    capture_output=True,
    text=True,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    **options,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def tracked():
  """Returns the files that git knows, or skips."""
  if not (ROOT / ".git").exists():
    pytest.skip("not a checkout: what is released is what git tracks")
  names = run("git", "ls-files", "-z", "--cached", cwd=ROOT).split("\0")
  return sorted(name for name in names if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
  """The folder with the wheel and the sdist, built of the tracked files."""
  # Not a folder of that name.
  pytest.importorskip("build.__main__", reason='pip install -e ".[release]"')
  source = tmp_path_factory.mktemp("source")
  for name in tracked():
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, source / name)
  run(sys.executable, "-m", "build", cwd=source)
  return source / "dist"


def test_the_version_stands_in_one_place():
  installed = importlib.metadata.version("flax_mechanic")
  assert installed == VERSION, "pip install -e . reads the version anew"
  assert re.search(rf"^## {re.escape(VERSION)} \(", read("CHANGELOG.md"), re.M)
  project = tomllib.loads(read("pyproject.toml"))["project"]
  assert "version" in project["dynamic"]
  assert "version" not in project
  elsewhere = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
  files = ["README.md", "pyproject.toml", *map(str, ROOT.glob("docs/*.md"))]
  assert not [file for file in files if elsewhere.search(read(file))]


def read(name):
  return (ROOT / name).read_text()


def test_an_install_shadows_nothing_of_a_project(tmp_path):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "default.py").write_text("momentum = 0.9\n")
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "loop.py").write_text("from configs import default\n")
  main = tmp_path / "main.py"
  main.write_text(
    "import flax_mechanic\n"
    "from train import loop\n"
    "print(loop.default.momentum, loop.__file__)\n"
  )
  output = run(sys.executable, main, cwd=tmp_path)
  assert output == f"0.9 {tmp_path / 'train' / 'loop.py'}\n", (
    "pip install -e . as pyproject.toml now says it"
  )


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_no_more(dist):
  (wheel,) = dist.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  info = f"flax_mechanic-{VERSION}.dist-info/"
  package = {name for name in tracked() if name.startswith("flax_mechanic/")}
  assert "flax_mechanic/py.typed" in package
  assert {name for name in names if not name.startswith(info)} == package
  assert f"{info}licenses/LICENSE" in names


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_need(dist):
  (sdist,) = dist.glob("*.tar.gz")
  with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  # What is of the repository alone.
  own = {name for name in tracked() if name.startswith(".")}
  assert {*tracked()} - own <= names
  assert names - {*tracked()} <= {"", "PKG-INFO"}


@pytest.mark.slow
def test_both_work_in_an_empty_environment(dist, tmp_path):
  run(sys.executable, "-m", "venv", tmp_path / "environment")
  python = tmp_path / "environment" / "bin" / "python"
  pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
  script = tmp_path / "smoke_test.py"
  script.write_text(SMOKE_TEST)
  (wheel,), (sdist,) = (dist.glob(kind) for kind in ("*.whl", "*.tar.gz"))
  for options in (
    [wheel, "-c", ROOT / "constraints.txt"],
    # The wheel that pip makes of it asks for the same.
    ["--force-reinstall", "--no-deps", sdist],
  ):
    run(*pip, *options)
    output = run(python, "-I", script, VERSION, cwd=tmp_path)
    assert output.endswith("fine\n")
