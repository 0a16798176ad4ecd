"""The commands that README.md and docs/ show run."""

import importlib.util
import re
import shlex
import tomllib

import pages
import pytest
from ml_collections import ConfigDict

from train import compile as compile_lib
from train import flags

# Run by another test, or by `.ci/run`.
ELSEWHERE = [
  ["python", "-m", "build"],
  ["python", "-m", "venv"],
  ["python", "docs/reference.py"],
  ["."],
  ["cd"],
]
# Makes a run short; a field that the config lacks is left out.
SHORT = {
  "num_steps": "3",
  "batch_size": "8",
  "schedule.warmup_steps": "1",
  "eval_every": "3",
  "data.path": "docs",
  "data.eval_windows": "8",
  "sample_length": "8",
}
SMALL = {
  "model.widths": "(8,)",
  "model.num_layers": "1",
  "model.num_heads": "2",
  "model.embed_dim": "32",
  "model.mlp_dim": "64",
  "model.context_length": "32",
}
SHORT_SWEEP = {
  "jobs": "('configs/tabular.py:diabetes',)",
  "interpolating": "()",
  "methods": "('adamw','mechanic')",
  "num_steps": "(4,)",
  "learning_rates": "(0.001,)",
  "factors": "(1.0,)",
  "seeds": "1",
  "evaluations": "2",
}
# Values for what the reader fills in.
FILLED = {
  "HOST:PORT": "localhost:1234",
  "N": "2",
  "I": "0",
  "gs://BUCKET/run": "DIR",  # Which is looked for.
}


def commands(text):
  """Yields the commands of a shell's text as lists of words."""
  for line in text.replace("\\\n", "").splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, "&&"]:
      if word not in ("&&", ";", "|"):
        words.append(word)
        continue
      if words:
        yield words
      words = []


def shown(page):
  """Returns the commands that a page shows, in blocks and in its text."""
  found = [
    words for _, text in pages.blocks(page, "sh") for words in commands(text)
  ]
  for span in pages.code_spans(page):
    if re.match(r"(python|pip|pytest) ", span):
      found += commands(span)
  return found


def fill(words):
  """Returns words with values for what a user fills in."""
  split = [word.partition("=") for word in words]
  return [name + eq + FILLED.get(value, value) for name, eq, value in split]


def check(words):
  """Checks a command as far as possible without running it."""
  if words[0] == "gcloud":
    (inner,) = [w for w in words if w.startswith("--command=")]
    for command in commands(inner.removeprefix("--command=")):
      check(command)
  elif words[0] in ("srun", "docs/pods/restart.sh"):
    check(words[words.index("python") :])
  elif words[:2] == ["pip", "install"]:
    check_pip(words[2:])
  elif words[0] == "pytest":
    for word in words[1:]:
      assert not word.startswith("tests/") or (pages.ROOT / word).exists(), word
  elif words[:2] == ["python", "-m"] and words[2].startswith("train."):
    check_job(words[2], words[3:])
  else:
    starts = [words[: len(start)] for start in ELSEWHERE]
    assert any(s == e for s, e in zip(starts, ELSEWHERE, strict=True)), words


def check_pip(words):
  extras = tomllib.loads(pages.read("pyproject.toml"))["project"][
    "optional-dependencies"
  ]
  while words:
    word, *words = words
    if word in ("-e", "-c"):
      name, *words = words
      path, _, inside = name.partition("[")
      assert (pages.ROOT / path).exists(), name
      word = f"{path}[{inside}" if inside else path
    if found := re.fullmatch(r"(?:\.|flax_mechanic)\[(.*)\]", word):
      assert {*found[1].split(",")} <= extras.keys(), word


# By tests/test_benchmark.py, tests/test_guard.py, tests/test_replicas.py and
# tests/test_supervise.py.
TESTED_ELSEWHERE = (
  "train.benchmark",
  "train.faults",
  "train.cost.data",
  "train.cost.restores",
  "train.cost.saving",
  "train.faults.gradients",
  "train.supervise",
)
# Commands that take only folders, and how many.
FOLDERS = {"train.inspect": 1, "train.plot": 1, "train.export": 2}


def main_of(module):
  """Returns what `python -m module` runs."""
  is_package = importlib.util.find_spec(module).submodule_search_locations
  return importlib.import_module(
    f"{module}.__main__" if is_package else module
  ).main


def check_job(module, arguments):
  main = main_of(module)
  arguments = fill(arguments)
  if "--help" in arguments or "--config.optimizer=help" in arguments:
    assert main(arguments) == 0
  elif module == "train.main":
    flags.parse(arguments)
  elif module == "train.supervise":
    flags.parse([each for each in arguments if "processes" not in each])
  elif module == "train.sweep":
    flags.read(arguments, ["config", "workdir"])
  elif module == "train.compile":
    _, own = flags.read(arguments, ["topology"])
    assert compile_lib._FORMAT.fullmatch(own["topology"])
  elif module in FOLDERS:
    assert len(arguments) == FOLDERS[module]
  else:
    assert module in TESTED_ELSEWHERE
    assert not arguments


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working directory that has what commands read from the checkout."""
  monkeypatch.chdir(tmp_path)
  for name in ("configs", "docs"):
    (tmp_path / name).symlink_to(pages.ROOT / name)
  return tmp_path


@pytest.mark.parametrize("page", [p for p in pages.PAGES if shown(p)])
def test_jobs_accept_the_commands(page, folder):
  for words in shown(page):
    check(words)


def shortened(module, arguments):
  """Returns a job's arguments, changed to a few steps of a small model."""
  config = next(w for w in arguments if w.startswith("--config="))
  present = flags.load_config(config.removeprefix("--config="))
  fields = {
    "train.main": SHORT | SMALL,
    "train.compile": SMALL,
    "train.sweep": SHORT_SWEEP,
  }[module]
  fields = {k: v for k, v in fields.items() if is_field(present, k)}
  # A repeated flag would append to a tuple.
  kept = [
    word
    for word in arguments
    if word.partition("=")[0].removeprefix("--config.") not in fields
  ]
  return kept + [f"--config.{k}={v}" for k, v in fields.items()]


def is_field(config, path):
  for name in path.split("."):
    if not isinstance(config, ConfigDict) or name not in config:
      return False
    config = config[name]
  return True


def runs(page):
  """Returns the commands of a page to run: (module, arguments).

  Of its sweeps the first, since they are all the same once they are shortened.
  """
  found = [
    (words[2], words[3:])
    for words in shown(page)
    if words[:2] == ["python", "-m"]
    and words[2].startswith("train.")
    and words[2] not in TESTED_ELSEWHERE
    and not any(word.startswith("--coordinator") for word in words)
    and not any("gs://" in word for word in words)
    and not {"--help", "--config.optimizer=help"} & {*words}
  ]
  sweeps = [each for each in found if each[0] == "train.sweep"]
  return [
    each for each in found if each[0] != "train.sweep" or each is sweeps[0]
  ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in pages.PAGES if runs(p)])
def test_commands_run_one_after_the_other(page, folder, capfd):
  train = importlib.import_module("train.main").main
  newest = None
  for number, (module, arguments) in enumerate(runs(page)):
    main = main_of(module)
    if module not in FOLDERS:
      # DIR is another folder for each run.
      mine = [w.replace("=DIR", f"=DIR{number}") for w in arguments]
      if mine != arguments and module == "train.main":
        newest = f"DIR{number}"
      arguments = shortened(module, mine)
    elif arguments[0] == "DIR":
      if newest is None:
        newest = "trained"
        job = ["--config=configs/digits.py", "--workdir=trained"]
        assert train(shortened("train.main", job)) == 0
      arguments = [newest, *arguments[1:]]
    if module == "train.compile" and not importlib.util.find_spec("libtpu"):
      arguments += ["--topology=cpu:8"]
    status = main(arguments)
    assert status == 0, (module, arguments, capfd.readouterr().err)
