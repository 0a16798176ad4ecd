"""What the tables of README.md and docs/ say is true."""

import ast
import inspect
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import pages
import pytest
from ml_collections import ConfigDict
from optax import contrib

import flax_mechanic
from configs.default import get_config
from train import flags


def methods():
  """Returns the registry without the rows that other tests have added."""
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
  rows = pages.table(
    "docs/choosing.md",
    "| method | what it is | learning rate | needs | schedule | state |",
  )
  params = shapes("float32")
  copies = lambda name: (
    size(jax.eval_shape(tx_of(name).init, params)) / size(params)
  )
  assert {row[0].strip("`") for row in rows} == methods().keys()
  for name, summary, rate, needs, schedule, state in (
    [cell.replace("`", "") for cell in row] for row in rows
  ):
    method = methods()[name]
    assert summary == method.summary
    base = method.wraps and copies(method.options["base"])
    assert rate == method.rate
    assert needs == (", ".join(method.needs) or "-")
    assert schedule == (method.schedule or "its base's")
    if method.wraps:
      more = state.removeprefix("its base's").removeprefix(" and ")
      expected = base + float(more or 0)
    else:
      expected = float(state)
    assert copies(name) == pytest.approx(expected, abs=0.02), name


def refused(wrapper):
  """Returns the bases that a wrapper refuses, and those it warns about."""
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
  rows = pages.table("docs/choosing.md", "| wrapper | refuses |")
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
  """Returns the names in inline code in the sentence after `start`."""
  text = " ".join(pages.prose(page).split())
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
  rows = pages.table(
    "docs/costs.md", "| | float32 parameters | bfloat16 parameters |"
  )
  held = [
    optax.adamw(1.0),
    contrib.mechanize(optax.adamw(1.0)),
    tx_of("mechanic"),
    tx_of("mechanic", x0_dtype="bfloat16"),
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


def stated(cell):
  """Returns the default that a cell states; "none" is None."""
  text = cell.strip("`")
  if text == "none":
    return None
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def as_stated(value):
  """Returns a default as a page states it: None for a type and for ()."""
  return None if isinstance(value, type) or value == () else value


def test_the_table_of_mechanic_s_options_is_the_registry_s():
  rows = pages.table("docs/options.md", "| option | default | meaning |")
  options = methods()["mechanic"].options
  assert {name.strip("`"): stated(cell) for name, cell, _ in rows} == {
    name: as_stated(value) for name, value in options.items()
  }


def test_the_two_sets_of_defaults_are_the_registry_s():
  rows = pages.table("docs/options.md", "| option | `mechanize` | `mechanic` |")
  drop_in, flag = (methods()[n].options for n in ("mechanize", "mechanic"))
  assert drop_in.keys() == flag.keys()
  assert {name.strip("`"): (stated(a), stated(b)) for name, a, b in rows} == {
    name: (as_stated(drop_in[name]), as_stated(flag[name]))
    for name in flag
    if drop_in[name] != flag[name]
  }


def test_the_table_of_fields_is_every_job_s():
  def flat(config, prefix=""):
    for name, value in config.items():
      if isinstance(value, ConfigDict):
        yield from flat(value, f"{prefix}{name}.")
      else:
        yield prefix + name, value

  config = get_config()
  del config.opt
  listed = {}
  for cells in (
    row
    for field in ("field", "field of `train.main`")
    for row in pages.table(
      "docs/options.md", f"| {field} | default | meaning |"
    )
    if not row[0].startswith("`opt.")
  ):
    names, values = (re.split(", ", cell) for cell in cells[:2])
    listed |= {
      name.strip("`"): cell for name, cell in zip(names, values, strict=True)
    }
  fields = dict(flat(config))
  # Each job's file sets its task.
  assert fields.keys() - listed.keys() == {"task"}
  assert listed.keys() <= fields.keys()
  for name, cell in listed.items():
    if not cell.startswith("the "):
      expected = None if fields[name] == "" else as_stated(fields[name])
      assert stated(cell) == expected, name


def test_the_call_with_the_flag_s_defaults_computes_the_same():
  ((_, code),) = pages.blocks("docs/options.md", "python")
  schedule = flax_mechanic.make_schedule("warmup_cosine", 30, 3)
  names: dict[str, Any] = {
    "flax_mechanic": flax_mechanic,
    "optax": optax,
    "schedule": schedule,
  }
  exec(code, names)
  config = flax_mechanic.add_optimizer_config(ConfigDict(), "mechanic")
  x, *_ = network.train(names["tx"], 30)
  y, *_ = network.train(flax_mechanic.make_optimizer(config, schedule), 30)
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_the_first_table_of_fields_is_what_a_job_gets():
  rows = pages.table("docs/options.md", "| field | default | meaning |")
  names = {row[0].strip("`").partition(".")[0] for row in rows}
  added = flax_mechanic.add_optimizer_config(ConfigDict())
  assert names == {*added, "learning_rate"}


def test_the_readme_s_summary_is_a_part_of_the_sweep_s():
  def cells(page, head):
    names = [cell.strip() for cell in head.strip("|").split("|")]
    return {
      row[0]: dict(zip(names, row, strict=True))
      for row in pages.table(page, head)
    }

  front = cells(
    "README.md",
    "| loss over tuned adamw's | geometric mean | 95% interval "
    "| over the best tuned | held-out loss, memorized jobs | worst "
    "| worst accuracy, points |",
  )
  whole = cells(
    "docs/evidence.md",
    "| loss over tuned adamw's | geometric mean | 95% interval "
    "| over the best tuned | held-out loss | training loss "
    "| held-out loss, memorized jobs | worst | worst accuracy, points |",
  )
  assert front
  for name, row in front.items():
    assert row.items() <= whole[name].items(), name


def test_options_of_others_have_these_names_and_defaults():
  def defaults(function):
    return {
      name: parameter.default
      for name, parameter in inspect.signature(function).parameters.items()
    }

  page, ours = "docs/migrating.md", defaults(flax_mechanic.mechanize)
  rows = pages.table(page, "| theirs | default | ours | default |")
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
  rows = pages.table(page, "| theirs | default | ours | default | |")
  named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
  assert {*named} >= {*theirs}
  for first, said, second, own, _ in rows:
    name, same = first.strip("`"), re.findall(r"`(\w+)`", second)
    if name in theirs and re.fullmatch(r"[\d.e-]+|False", said):
      assert ast.literal_eval(said) == theirs[name]
      if same:
        assert ast.literal_eval(own) == ours[same[0]]
    # An option that the table maps to nothing is not one of ours.
    assert same or name not in ours
  assert len(theirs["betas"]) == ours["num_betas"]
  for i, beta in enumerate(theirs["betas"], 1):
    assert beta == pytest.approx(1 - 0.1**i)


def test_the_flag_of_the_old_sequence_computes_it(x64):
  (span,) = (
    each
    for each in pages.code_spans("docs/migrating.md")
    if each == "--config.optimizer=mechanize"
  )
  config = flags.load_config(str(pages.ROOT / "configs/digits.py"))
  flags.override(config, [span.removeprefix("--").split("=")])
  schedule = flax_mechanic.make_schedule("warmup_cosine", 30, 3)
  ours = flax_mechanic.make_optimizer(config, schedule)
  theirs = contrib.mechanize(optax.adamw(schedule))
  x, state, _ = network.train(ours, 30, jnp.float64)
  y, _, _ = network.train(theirs, 30, jnp.float64)
  for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
    # The flag's schedule is computed in float32.
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert float(flax_mechanic.scalars(state)["mechanic/scale"]) > 1e-5
