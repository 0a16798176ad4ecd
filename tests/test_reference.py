"""The API reference: every public name is explained, and it can be made."""

import html
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import flax_mechanic

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = [
  name
  for name in flax_mechanic.__all__
  if isinstance(getattr(flax_mechanic, name), type)
]
# Tuples and errors, which are handed out rather than made.
RESULTS = [
  name
  for name in CLASSES
  if issubclass(getattr(flax_mechanic, name), tuple | Exception)
]
SECTIONS = ("Args", "Returns", "Raises", "Example", "Attributes", "Yields")


def callables():
  """Yields the public functions and methods: name, function, whether at top."""
  for name in flax_mechanic.__all__:
    value = getattr(flax_mechanic, name)
    if name not in CLASSES:
      yield name, value, True
    members = vars(value) if name in {*CLASSES} - {*RESULTS} else {}
    for attribute, member in members.items():
      function = getattr(member, "__func__", member)
      # What dataclasses and flax add to a class is not of its file.
      if (
        isinstance(function, types.FunctionType)
        and inspect.getmodule(value).__file__ == function.__code__.co_filename
        and (attribute == "__init__" or not attribute.startswith("_"))
      ):
        yield f"{name}.{attribute}", function, False


def sections(doc):
  """Returns the summary and each section's text, of a Google docstring."""
  heads = rf"^({'|'.join(SECTIONS)}):\n"
  parts = re.split(heads, inspect.cleandoc(doc), flags=re.MULTILINE)
  return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(text):
  """Returns the names that a section explains, in its order."""
  names = re.findall(r"^  (\*{0,2}\w+): ", text, re.MULTILINE)
  return [name.lstrip("*") for name in names]


def test_all_is_all_that_is_public():
  imported = {
    name
    for name in dir(flax_mechanic)
    if not name.startswith("_")
    and not isinstance(getattr(flax_mechanic, name), types.ModuleType)
  }
  assert sorted(imported) == flax_mechanic.__all__


@pytest.mark.parametrize(
  ("function", "top"),
  [pytest.param(f, top, id=name) for name, f, top in callables()],
)
def test_a_docstring_says_what_goes_in_and_out(function, top):
  summary, found = sections(function.__doc__)
  signature = inspect.signature(function)
  parameters = [
    name for name in signature.parameters if name not in ("self", "cls")
  ]
  explained = entries(found.get("Args", ""))
  # A lone argument may be explained by the summary.
  assert explained == parameters or (not explained and len(parameters) == 1)
  if signature.return_annotation not in (None, inspect.Signature.empty):
    assert "Returns" in found or "eturns " in summary
  raised = re.findall(r"raise (\w+)\(", inspect.getsource(function))
  assert set(raised) <= set(entries(found.get("Raises", "")))
  assert not top or ">>> " in found.get("Example", "")


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_holds(name):
  value = getattr(flax_mechanic, name)
  _, found = sections(value.__doc__)
  if fields := getattr(value, "_fields", ()):
    assert entries(found["Attributes"]) == list(fields)
  assert name in RESULTS or ">>> " in found["Example"]


@pytest.mark.slow
def test_the_reference_has_every_public_name(tmp_path):
  pytest.importorskip("pdoc", reason='pip install -e ".[docs]"')
  command = [sys.executable, "-W", "error::UserWarning", "docs/reference.py"]
  done = subprocess.run(
    [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  page = (tmp_path / "flax_mechanic.html").read_text()
  for name in flax_mechanic.__all__:
    assert f'<section id="{name}">' in page
  for name, _, _ in callables():
    assert f'id="{name}"' in page
  text = html.unescape(re.sub("<[^>]+>", "", page))
  assert "ForwardRef" not in text
  assert f"flax_mechanic {flax_mechanic.__version__}" in text
