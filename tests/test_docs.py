"""README.md and docs/: what they show runs, what they name is there."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
import shlex
import textwrap
import tomllib
import warnings

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from optax import contrib

import flax_mechanic
from tests.test_adoption import save_standard
from train import compile as compile_lib
from train import flags

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{each.name}" for each in ROOT.glob("docs/*.md"))]
CONFIGS = ["configs/text.py", "configs/digits.py", "configs/sweep.py"]
# Executed by the test of the same kind of name, or by `.ci/run`.
ELSEWHERE = [
  ["python", "-m", "build"],
  ["python", "-m", "venv"],
  ["python", "docs/reference.py"],
  ["."],
  ["cd"],
]
# What a command is given to be short; a field that its config lacks is not.
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
  "learning_rates.adamw": "(0.001,)",
  "factors": "(1.0,)",
  "seeds": "1",
  "evaluations": "2",
}
# A value in the place of what the reader fills in.
FILLED = {"HOST:PORT": "localhost:1234", "N": "2", "I": "0"}


def read(page):
  return (ROOT / page).read_text()


def blocks(page, language):
  """Returns (line, text) of each fenced block in a language."""
  text = read(page)
  fences = re.finditer(
    r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL
  )
  return [
    (text[: fence.start()].count("\n") + 1, textwrap.dedent(fence[3]))
    for fence in fences
    if fence[2] == language
  ]


def prose(page):
  """Returns a page without its fenced blocks."""
  return re.sub(
    r"^ *```.*?^ *```$", "", read(page), flags=re.MULTILINE | re.DOTALL
  )


def code_spans(page):
  """Returns the inline code of a page, each on one line."""
  spans = re.findall("`([^`]+)`", prose(page))
  return [" ".join(span.split()) for span in spans]


def table(page, head):
  """Returns the rows under a table's head, as lists of cells."""
  lines = read(page).splitlines()
  start = lines.index(head) + 2
  rows = []
  for line in lines[start:]:
    if not line.startswith("|"):
      return rows
    rows.append([cell.strip() for cell in line.strip("|").split("|")])
  return rows


# What is written in Python.


class Model(nnx.Module):
  def __init__(self):
    self.hidden = nnx.Linear(8, 256, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(256, 1, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.head(jnp.tanh(self.hidden(x)))


def given(code, folder):
  """Returns what a snippet may use of the job around it.

  The model is Linen's where the snippet has a TrainState, else NNX's.
  """
  found = {
    "flax_mechanic": flax_mechanic,
    "jax": jax,
    "jnp": jnp,
    "nnx": nnx,
    "optax": optax,
    "ConfigDict": ConfigDict,
    "NamedSharding": NamedSharding,
    "P": P,
    "config": ConfigDict({"learning_rate": 1e-3}),
    "schedule": flax_mechanic.make_schedule("warmup_cosine", 100, 10),
    "mesh": jax.make_mesh(
      (4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    ),
    "tx": flax_mechanic.mechanize(optax.adamw(1.0)),
    "batch": network.batch(0),
  }
  if "TrainState" in code:
    found["model"] = linen.Dense(1)
    found["params"] = found["model"].init(jax.random.key(0), jnp.ones((1, 8)))
    found["loss_fn"] = lambda params, batch: jnp.mean(
      (found["model"].apply(params, batch[0]) - batch[1]) ** 2
    )
    return found
  model = found["model"] = Model()
  found["params"] = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  found["loss_fn"] = lambda model, batch: jnp.mean(
    (model(batch[0]) - batch[1]) ** 2
  )
  found["optimizer"] = flax_mechanic.Optimizer(model, found["tx"])
  if "FOLDER" in code:
    plain = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    save_standard(folder / "plain", nnx.state((model, plain)))
    found["FOLDER"] = folder / "plain"
  if "import torch" in code:
    torch = pytest.importorskip("torch")
    found["torch_model"] = torch.nn.Linear(8, 1)
    found["torch_loss"] = lambda model: model(torch.ones(4, 8)).sum()
  return found


def executed(page):
  """Returns the blocks of a page to be run; torch's only where torch is."""
  has_torch = importlib.util.find_spec("mechanic_pytorch") is not None
  return [
    (line, code)
    for line, code in blocks(page, "python")
    if has_torch or "import torch" not in code
  ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")])
def test_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written = {}
  for line, code in executed(page):
    around = given(code, tmp_path)
    names = around | written
    # A traceback tells the page and its line.
    exec(compile("\n" * line + code, str(ROOT / page), "exec"), names)
    written |= {
      name: value
      for name, value in names.items()
      if name not in around or value is not around[name]
    }


# What is typed into a shell.


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
  found = [words for _, text in blocks(page, "sh") for words in commands(text)]
  for span in code_spans(page):
    if re.match(r"(python|pip|pytest) ", span):
      found += commands(span)
  return found


def fill(words):
  """Returns words with values in the places of HOST:PORT, N and I."""
  split = [word.partition("=") for word in words]
  return [name + eq + FILLED.get(value, value) for name, eq, value in split]


def check(words):
  """Checks a command as far as it can be without running it."""
  if words[0] == "gcloud":
    (inner,) = [w for w in words if w.startswith("--command=")]
    for command in commands(inner.removeprefix("--command=")):
      check(command)
  elif words[0] == "srun":
    check(words[words.index("python") :])
  elif words[:2] == ["pip", "install"]:
    check_pip(words[2:])
  elif words[0] == "pytest":
    for word in words[1:]:
      assert not word.startswith("tests/") or (ROOT / word).exists(), word
  elif words[:2] == ["python", "-m"] and words[2].startswith("train."):
    check_job(words[2], words[3:])
  else:
    starts = [words[: len(start)] for start in ELSEWHERE]
    assert any(s == e for s, e in zip(starts, ELSEWHERE, strict=True)), words


def check_pip(words):
  extras = tomllib.loads(read("pyproject.toml"))["project"][
    "optional-dependencies"
  ]
  while words:
    word, *words = words
    if word in ("-e", "-c"):
      name, *words = words
      path, _, inside = name.partition("[")
      assert (ROOT / path).exists(), name
      word = f"{path}[{inside}" if inside else path
    if found := re.fullmatch(r"(?:\.|flax_mechanic)\[(.*)\]", word):
      assert {*found[1].split(",")} <= extras.keys(), word


# Commands that take folders alone, and how many.
FOLDERS = {"train.inspect": 1, "train.plot": 1, "train.export": 2}


def check_job(module, arguments):
  main = importlib.import_module(module).main
  arguments = fill(arguments)
  if "--help" in arguments or "--config.optimizer=help" in arguments:
    assert main(arguments) == 0
  elif module == "train.main":
    flags.parse(arguments)
  elif module == "train.sweep":
    flags.read(arguments, ["config", "workdir"])
  elif module == "train.compile":
    _, own = flags.read(arguments, ["topology"])
    assert compile_lib._FORMAT.fullmatch(own["topology"])
  elif module in FOLDERS:
    assert len(arguments) == FOLDERS[module]
  else:
    assert (module, arguments) == ("train.benchmark", [])


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working directory of commands, with what they read of the checkout."""
  monkeypatch.chdir(tmp_path)
  for name in ("configs", "docs"):
    (tmp_path / name).symlink_to(ROOT / name)
  return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if shown(p)])
def test_commands_are_such_that_the_jobs_take(page, folder):
  for words in shown(page):
    check(words)


def shortened(module, arguments):
  """Returns a job's arguments, for a run of a few steps of a small model."""
  config = next(w for w in arguments if w.startswith("--config="))
  present = flags.load_config(config.removeprefix("--config="))
  fields = {
    "train.main": SHORT | SMALL,
    "train.compile": SMALL,
    "train.sweep": SHORT_SWEEP,
  }[module]
  fields = {k: v for k, v in fields.items() if is_field(present, k)}
  # A tuple would collect the values of a repeated flag.
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
  """Returns what a page has to run here: (module, arguments)."""
  return [
    (words[2], words[3:])
    for words in shown(page)
    if words[:2] == ["python", "-m"]
    and words[2].startswith("train.")
    and words[2] != "train.benchmark"  # Of tests/test_benchmark.py.
    and not any(word.startswith("--coordinator") for word in words)
    and not {"--help", "--config.optimizer=help"} & {*words}
  ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if runs(p)])
def test_commands_run_one_after_the_other(page, folder, capfd):
  train = importlib.import_module("train.main").main
  newest = None
  for number, (module, arguments) in enumerate(runs(page)):
    main = importlib.import_module(module).main
    if module not in FOLDERS:
      # DIR stands for a folder of each run's own.
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


# What is named.


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_fields_are_there(page):
  configs = [flags.load_config(str(ROOT / name)) for name in CONFIGS]
  wrong = []
  for span in code_spans(page):
    field = re.fullmatch(r"(?:config\.)?((?:opt|mesh|schedule)\.[\w.]+)", span)
    if field and not re.search("[A-Z]", field[1]):
      known = any(is_field(config, field[1]) for config in configs)
      wrong += [] if known else [span]
    if span.startswith("--"):
      wrong += [word for word in span.split() if not takes(configs, word)]
  assert not wrong


def takes(configs, word):
  """Whether a config takes a flag that is written in the text."""
  name, equals, value = word.removeprefix("--").partition("=")
  path = name.removeprefix("noconfig.").removeprefix("config.")
  if not name.startswith(("config.", "noconfig.")) or path.isupper():
    return True  # The program's own, such as --topology.
  if value.isupper() or (not equals and not word.startswith("--no")):
    return any(is_field(config, path) for config in configs)
  for config in configs:
    if is_field(config, path):
      try:
        flags.override(config.copy_and_resolve_references(), [(name, value)])
      except flax_mechanic.UsageError:
        return False
      return True
  return False


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_are_there(page):
  wrong = []
  for span in code_spans(page):
    if found := re.match(
      r"(?:flax_mechanic|train|configs|tests|docs|colab)/[\w/]+\.\w+", span
    ):
      wrong += [] if (ROOT / found[0]).exists() else [span]
    if found := re.match(r"flax_mechanic\.(\w+)", span):
      wrong += [] if hasattr(flax_mechanic, found[1]) else [span]
  assert not wrong


def anchors(page):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
  plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
  return [head.replace(" ", "-") for head in plain]


def links(page):
  return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  assert len({*anchors(page)}) == len(anchors(page))
  for link in links(page):
    if link.startswith("https://"):
      continue
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.resolve().relative_to(ROOT)), link


# Releasing is for who has the repository, not for readers.
@pytest.mark.parametrize(
  "page", [p for p in PAGES if p not in ("README.md", "docs/releasing.md")]
)
def test_a_page_is_linked_from_another(page):
  found = [
    ((ROOT / other).parent / link.partition("#")[0]).resolve()
    for other in PAGES
    if other != page
    for link in links(other)
  ]
  assert ROOT / page in found


# What tables say.


def methods():
  """Returns the registry, without what other tests have registered."""
  rows = flax_mechanic.methods().items()
  return {name: row for name, row in rows if row.paper}


def tx_of(name, **options):
  config = ConfigDict({"learning_rate": 1e-3})
  flax_mechanic.add_optimizer_config(config, name)
  for option, value in options.items():
    config.opt[name][option] = value
  return flax_mechanic.make_optimizer(config)


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes(dtype):
  return {
    "kernel": jax.ShapeDtypeStruct((256, 256), dtype),
    "bias": jax.ShapeDtypeStruct((256,), dtype),
  }


def test_the_table_of_needs_is_the_registry_s():
  rows = table(
    "docs/choosing.md",
    "| method | learning rate | needs | schedule | state |",
  )
  params = shapes("float32")
  copies = lambda name: (
    size(jax.eval_shape(tx_of(name).init, params)) / size(params)
  )
  assert {row[0].strip("`") for row in rows} == methods().keys()
  for name, rate, needs, schedule, state in (
    [cell.replace("`", "") for cell in row] for row in rows
  ):
    method = methods()[name]
    base = method.wraps and copies(method.options["base"])
    tuned = "its base's" if method.wraps else "tuned"
    assert rate == (tuned if method.tuned else "learned")
    assert needs == (", ".join(method.needs) or "-")
    assert schedule == (method.schedule or "its base's")
    if method.wraps:
      more = state.removeprefix("its base's").removeprefix(" and ")
      expected = base + float(more or 0)
    else:
      expected = float(state)
    assert copies(name) == pytest.approx(expected, abs=0.02), name


def refused(wrapper):
  """Returns the bases that a wrapper refuses, and those that it warns of."""
  refuses, warns = set(), set()
  for name in methods():
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      try:
        tx_of(wrapper, base=name)
      except flax_mechanic.UsageError:
        refuses.add(name)
    if caught:
      warns.add(name)
  return refuses, warns


def test_the_table_of_bases_is_what_is_refused():
  rows = table("docs/choosing.md", "| wrapper | refuses |")
  learned = {name for name, row in methods().items() if not row.tuned}
  outermost = {n for n, row in methods().items() if row.replaces_gradient}
  said = {}
  for cells in rows:
    refuses, _, warns = cells[1].partition("; ")
    names = {*re.findall(r"`(\w+)`", refuses)}
    if "methods that learn their rate" in refuses:
      names |= learned
    said[cells[0].strip("`")] = names, {*re.findall(r"`(\w+)`", warns)}
  for wrapper, row in methods().items():
    if row.wraps:
      names, warns = said.get(wrapper, (set(), set()))
      always = {wrapper} if not row.replaces_gradient else set()
      assert refused(wrapper) == (names | outermost | always, warns), wrapper


def listed(page, start):
  """Returns the names in inline code of the first sentence that starts so."""
  text = " ".join(prose(page).split())
  sentence = text[text.index(start) + len(start) :]
  return re.findall(r"`([\w.]+)`", re.split(r"[:;.] ", sentence)[0])


def test_fields_that_methods_refuse_are_listed():
  def refuse(field, value):
    found = set()
    for name, row in methods().items():
      config = ConfigDict({"learning_rate": 1e-3})
      flax_mechanic.add_optimizer_config(config, name)
      config[field] = value
      try:
        flax_mechanic.make_optimizer(config)
      except flax_mechanic.UsageError:
        if not row.wraps:
          found.add(name)
    return found

  page = "docs/choosing.md"
  said = listed(page, "`config.no_decay` does not go with ")
  assert {*said} == refuse("no_decay", ("bias",))
  (said,) = listed(page, "and `config.accumulate_steps` do not go with ")
  assert {said} == refuse("grad_clip", 1.0) == refuse("accumulate_steps", 2)


def test_the_table_of_bytes_is_what_is_held():
  rows = table(
    "docs/meshes.md", "| | float32 parameters | bfloat16 parameters |"
  )
  held = [
    optax.adamw(1.0),
    contrib.mechanize(optax.adamw(1.0)),
    tx_of("mechanic"),
    tx_of("mechanic", x0_dtype="bfloat16"),
    tx_of("mechanic", store_delta=True),
    tx_of("mechanic", base="lion"),
  ]
  for (label, *cells), tx in zip(rows, held, strict=True):
    for cell, dtypes in zip(
      cells, (["float32"], ["bfloat16", "float16"]), strict=True
    ):
      for dtype in dtypes:
        params = shapes(dtype)
        count = sum(x.size for x in params.values())
        state = size(jax.eval_shape(tx.init, params))
        assert state / count == pytest.approx(int(cell), abs=0.1), label


def test_options_of_others_have_these_names_and_defaults():
  def defaults(function):
    return {
      name: parameter.default
      for name, parameter in inspect.signature(function).parameters.items()
    }

  page, ours = "docs/migrating.md", defaults(flax_mechanic.mechanize)
  rows = table(page, "| theirs | default | ours | default |")
  theirs = defaults(contrib.mechanize)
  assert [row[0].strip("`") for row in rows] == [*theirs]
  assert [row[2].strip("`") for row in rows] == [*ours][: len(rows)]
  for name, said, same, own in ([c.strip("`") for c in row] for row in rows):
    for default, cell in ((theirs[name], said), (ours[same], own)):
      assert (not cell and default is inspect.Parameter.empty) or (
        float(cell) == default
      )

  package = pytest.importorskip("mechanic_pytorch")
  theirs = defaults(package.mechanize)
  rows = table(page, "| theirs | default | ours | default | |")
  named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
  assert {*named} >= {*theirs}
  for first, said, second, own, _ in rows:
    name, same = first.strip("`"), re.findall(r"`(\w+)`", second)
    if name in theirs and re.fullmatch(r"[\d.e-]+|False", said):
      assert ast.literal_eval(said) == theirs[name]
      assert ast.literal_eval(own) == (ours[same[0]] or False)
  assert len(theirs["betas"]) == ours["num_betas"]
  for i, beta in enumerate(theirs["betas"], 1):
    assert beta == pytest.approx(1 - 0.1**i)


def test_the_flags_of_the_old_sequence_compute_it(x64):
  (span,) = (
    each
    for each in code_spans("docs/migrating.md")
    if "groups= --config" in each
  )
  config = flags.load_config(str(ROOT / "configs/digits.py"))
  pairs = [word.removeprefix("--").split("=") for word in span.split()]
  flags.override(config, [("config.optimizer", "mechanic"), *pairs])
  schedule = flax_mechanic.make_schedule("warmup_cosine", 30, 3)
  ours = flax_mechanic.make_optimizer(config, schedule)
  theirs = contrib.mechanize(optax.adamw(schedule))
  x, state, _ = network.train(ours, 30, jnp.float64)
  y, _, _ = network.train(theirs, 30, jnp.float64)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    # The flag's schedule is computed in float32.
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert float(flax_mechanic.scalars(state)["mechanic/scale"]) > 1e-5
