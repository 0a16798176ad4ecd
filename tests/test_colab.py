"""The notebooks of colab/: each is executed, and is as it should be stored."""

import itertools
import json
import os
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Where the badges, the links and the clones go.
REPOSITORY = "flax-mechanic/flax_mechanic"
# Notebook -> steps in the tests.
STEPS = {
  "bring_your_own_job": 20,
  "quickstart": 30,
  "reading_mechanic": 20,
  "sharded": 10,
}
KEYS = {
  "markdown": {"cell_type", "id", "metadata", "source"},
  "code": {
    "cell_type",
    "execution_count",
    "id",
    "metadata",
    "outputs",
    "source",
  },
}

each_notebook = pytest.mark.parametrize("name", STEPS)


def load(name):
  return json.loads((ROOT / "colab" / f"{name}.ipynb").read_text())


def sources(name, cell_type):
  return [
    "".join(cell["source"])
    for cell in load(name)["cells"]
    if cell["cell_type"] == cell_type
  ]


def parameters(cells):
  """Returns the one cell that the tests replace."""
  (cell,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
  return cell


def test_every_notebook_is_here():
  assert {file.stem for file in (ROOT / "colab").iterdir()} == set(STEPS)


@pytest.mark.slow
@each_notebook
def test_runs(name, tmp_path):
  nbclient = pytest.importorskip("nbclient", reason="pip install nbclient")
  pytest.importorskip("ipykernel", reason="pip install ipykernel")
  import nbformat
  from jupyter_client.manager import AsyncKernelManager

  notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  parameters(notebook.cells)["source"] = f"num_steps = {STEPS[name]}"
  manager = AsyncKernelManager()
  manager.kernel_spec.argv[0] = sys.executable
  client = nbclient.NotebookClient(
    notebook, km=manager, resources={"metadata": {"path": tmp_path}}
  )
  env = os.environ | {
    "PYTHONPATH": str(ROOT),
    "TMPDIR": str(tmp_path),
    "IPYTHONDIR": str(tmp_path / "ipython"),
  }
  # The reader's CPU is one device until the notebook says otherwise.
  env.pop("JAX_NUM_CPU_DEVICES", None)
  # Not being its own, the client would leave the kernel running.
  client.execute(env=env, cleanup_kc=True)


@each_notebook
def test_is_stored_without_outputs(name):
  notebook = load(name)
  assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
  for cell in notebook["cells"]:
    assert set(cell) == KEYS[cell["cell_type"]]
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None
    assert cell["metadata"] in ({}, {"tags": ["parameters"]})


@each_notebook
def test_opens_in_colab(name):
  title, badge, *_ = sources(name, "markdown")[0].split("\n\n")
  assert title.startswith("# ")
  colab = "https://colab.research.google.com"
  assert badge == (
    f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
    f"({colab}/github/{REPOSITORY}/blob/main/colab/{name}.ipynb)"
  )


def test_all_install_the_same():
  first = {sources(name, "code")[0] for name in STEPS}
  (install,) = first
  assert f"git clone -q https://github.com/{REPOSITORY}\n" in install


@each_notebook
def test_links_lead_to_what_is_here(name):
  text = "\n".join(sources(name, "markdown"))
  linked = re.findall(r"\]\(https://github.com/([^)#]*)", text)
  for each in linked:
    owner, project, kind, branch, path = each.split("/", 4)
    assert f"{owner}/{project}/{branch}" == f"{REPOSITORY}/main"
    there = ROOT / path
    assert there.is_file() if kind == "blob" else there.is_dir()
  assert linked
  assert not re.search(r"\]\((?!https://)", text)


@each_notebook
def test_every_code_cell_follows_a_text_and_is_short(name):
  cells = load(name)["cells"]
  parameters(cells)
  assert cells[0]["cell_type"] == "markdown"
  for before, cell in itertools.pairwise(cells):
    if cell["cell_type"] != "code":
      continue
    source = "".join(cell["source"])
    assert before["cell_type"] == "markdown", source
    assert source.count("\n") < 50, source
    assert max(map(len, source.splitlines())) <= 80
    shell = re.compile(r"^( *)[!%].*", re.MULTILINE)
    compile(shell.sub(r"\1pass", source), name, "exec")
