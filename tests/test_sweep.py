"""`python -m train.sweep`: what is run, once each, and what is shown of it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

import configs.sweep
from flax_mechanic.errors import UsageError
from train import loop
from train.sweep import __main__ as sweep
from train.sweep import comparison, figures, plan, random_search

ARGUMENTS = [
  "--config=configs/sweep.py",
  "--config.jobs=('configs/digits.py',)",
  "--config.interpolating=('configs/tabular.py:iris',)",
  "--config.methods=('adamw','ours: optimizer=mechanic opt.mechanic.base=sgd')",
  "--config.learning_rates=(0.001,0.01)",
  "--config.fields=('model.widths=(8,)','batch_size=8','num_steps=10',"
  "'schedule.warmup_steps=2')",
  "--config.seeds=2",
  "--config.evaluations=2",
]


def run(workdir, *more):
  return sweep.main([*ARGUMENTS, f"--workdir={workdir}", *more])


def read(workdir):
  return [
    json.loads(line)
    for line in (workdir / "runs.jsonl").read_text().splitlines()
  ]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """The --workdir of a sweep, and what it printed."""
  workdir = tmp_path_factory.mktemp("sweep")
  with pytest.MonkeyPatch.context() as patch:
    printed = []
    patch.setattr("builtins.print", lambda *text, **_: printed.append(*text))
    assert run(workdir, "--config.num_steps=(10,20)") == 0
  return workdir, "\n".join(printed)


@pytest.mark.slow
def test_a_line_for_each_evaluation_of_each_run(swept):
  workdir, _ = swept
  found = {
    (
      each["job"],
      each["settings"].split("optimizer=")[1].split()[0],
      *(each[k] for k in ("num_steps", "learning_rate", "seed", "step")),
    )
    for each in read(workdir)
  }
  wanted = {
    (job, settings, num_steps, rate, seed, step)
    for job in ("configs/digits.py", "configs/tabular.py:iris")
    for settings, rates in (("adamw", (1e-3, 1e-2)), ("mechanic", (1.0,)))
    for rate in rates
    for num_steps in (10, 20)
    for seed in (0, 1)
    for step in (0, num_steps // 2, num_steps)
  }
  assert found == wanted
  assert len(read(workdir)) == len(wanted)


@pytest.mark.slow
def test_tables_and_figures(swept):
  workdir, printed = swept
  tables = (workdir / "tables.md").read_text()
  assert tables.strip() in printed
  for text in (
    "| 10 steps",
    "| 20 steps",
    "tabular:iris",
    "| ours",
    " at 0.01",
    "| loss ratios after 10 / 20 steps",
  ):
    assert text in tables
  for name in ("ratios", "profiles", "losses", "learning_rates", "learned"):
    assert image.imread(workdir / f"{name}.png").std() > 0.01
    drawn = (workdir / f"{name}.svg").read_text()
    assert "ours" in drawn or name == "learning_rates"
    assert "<dc:date>" not in drawn


@pytest.mark.slow
def test_nothing_is_done_twice(swept, tmp_path, capsys):
  workdir, _ = swept
  file = tmp_path / "runs.jsonl"
  lines = (workdir / "runs.jsonl").read_text().splitlines(keepends=True)
  file.write_text("".join(lines))
  assert run(tmp_path, "--config.num_steps=(10,20)") == 0
  assert "programs" not in capsys.readouterr().out
  assert file.read_text() == "".join(lines)

  # Killed while it wrote.
  kept = [line for line in lines if '"num_steps": 10' in line]
  file.write_text("".join(kept) + lines[-1][:40])
  assert run(tmp_path, "--config.num_steps=(10,20)") == 0
  text = file.read_text()
  assert text.startswith("".join(kept))
  assert len(text.splitlines()) == len(lines)
  assert (tmp_path / "tables.md").read_text() == (
    workdir / "tables.md"
  ).read_text()


def test_a_config_file_that_was_edited_is_run_anew(tmp_path):
  file = tmp_path / "mine.py"
  text = "from configs.digits import get_config as get_digits\n"
  text += "def get_config():\n  config = get_digits()\n"
  text += "  config.batch_size = {}\n  return config\n"
  sweep_config = configs.sweep.get_config("quick")
  sweep_config.jobs, sweep_config.interpolating = (str(file),), ()
  keys = []
  for batch_size in (8, 8, 16):
    file.write_text(text.format(batch_size))
    units = plan.make_units(sweep_config)
    keys.append({key for unit in units for key in unit.keys(10)})
  assert keys[0] == keys[1]
  assert keys[0].isdisjoint(keys[2])


@pytest.mark.slow
def test_few_runs_at_once_are_the_same_runs(swept, tmp_path):
  workdir, _ = swept
  # A repeated flag would add to the jobs.
  same = [each for each in ARGUMENTS if "interpolating" not in each]
  less = ("--config.num_steps=(10,)", "--config.interpolating=()")
  own = ("--config.runs_at_once=1", f"--workdir={tmp_path}")
  assert sweep.main([*same, *less, *own]) == 0
  frames = []
  for rows in (read(workdir), read(tmp_path)):
    frame = pd.DataFrame(rows).query(
      "num_steps == 10 and job == 'configs/digits.py'"
    )
    keys = ["job", "method", "learning_rate", "seed", "step"]
    frames.append(frame.set_index(keys).sort_index()["test/loss"])
  np.testing.assert_allclose(*frames, rtol=1e-3)


@pytest.mark.parametrize("variant", ["confirmation", "confirmation_long"])
def test_jobs_that_nothing_was_chosen_on(variant):
  config = configs.sweep.get_config(variant)
  old = configs.sweep.get_config()
  chosen_on = {*old.jobs, *old.interpolating}
  assert chosen_on.isdisjoint([*config.jobs, *config.interpolating])
  config.methods = config.methods[:1]
  units = plan.make_units(config)
  assert len({(unit.job, unit.sweep.num_steps) for unit in units}) == len(units)


@pytest.mark.slow
def test_a_job_starts_from_another_run(tmp_path):
  before, file = tmp_path / "before", tmp_path / "runs.jsonl"
  config = configs.sweep.get_config()
  # With batch statistics.
  job = f"configs/digits.py:augmented model.widths=(4,) init_from={before}"
  config.update(jobs=(job,), interpolating=(), methods=("adamw",), seeds=2)
  config.update(learning_rates=(1e-3,), num_steps=(1,))
  (unit,) = plan.make_units(config)
  with pytest.raises(UsageError, match=f"there is no run {before}; type"):
    sweep.train([unit], file)
  base = unit.config.copy_and_resolve_references()
  base.update(init_from="", num_steps=50, eval_every=50, learning_rate=1e-3)
  loss = loop.train(base, before)["eval/loss"]
  sweep.train([unit], file)
  first = [row for row in read(tmp_path) if row["step"] == 0]
  assert {row["seed"] for row in first} == {0, 1}
  for row in first:
    halves = (row["validation/loss"] + row["test/loss"]) / 2
    assert halves == pytest.approx(loss, rel=1e-5)


@pytest.mark.filterwarnings("ignore:mechanic over a method that normalizes")
def test_every_method_of_every_variant_is_accepted():
  for variant in configs.sweep._VARIANTS:
    config = configs.sweep.get_config(variant)
    jobs = {each.split()[0] for each in (*config.jobs, *config.interpolating)}
    config.update(jobs=(min(jobs),), interpolating=())
    assert len(plan.make_units(config)) == len(config.methods)


def test_the_sweep_s_learning_rates_replace_the_config_file_s(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import digits\n"
    "def get_config():\n"
    "  config = digits.get_config()\n"
    "  config.opt.sgd.learning_rate = 0.5\n"
    "  config.opt.prodigy.learning_rate = 0.5\n"
    "  return config\n"
  )
  config = configs.sweep.get_config()
  methods = ("sgd", "x: optimizer=prodigy opt.prodigy.learning_rate=2.0")
  config.update(jobs=(str(file),), interpolating=(), methods=methods)
  sgd, prodigy = plan.make_units(config)
  assert sgd.config.opt.sgd.learning_rate is None
  assert prodigy.config.opt.prodigy.learning_rate == 2.0


def test_a_job_has_fields_of_its_own():
  config = configs.sweep.get_config()
  config.jobs = (
    "configs/digits.py model.widths=(8,) seeds=1 num_steps=(7,)"
    " evaluations=3 learning_rates=(0.5,)",
    "configs/digits.py",
  )
  config.interpolating = ()
  config.methods = ("adamw", "ours: optimizer=mechanic opt.mechanic.base=sgd")
  config.fields = ("batch_size=8",)
  units = {(unit.job, unit.method): unit for unit in plan.make_units(config)}
  own = units["configs/digits.py model.widths=(8,)", "adamw"]
  assert own.rates == (0.5,)
  assert own.runs() == [(0.5, 0)]
  assert own.sweep.num_steps == (7,)
  # The last step is evaluated too.
  assert [key[-1] for key in own.keys(7)] == [0, 2, 4, 6, 7]
  assert own.config.model.widths == (8,)
  assert own.config.batch_size == 8
  plain = units["configs/digits.py", "ours"]
  assert plain.config.opt.mechanic.base == "sgd"
  assert plain.config.model.widths == (256, 256)
  assert plain.rates == config.factors
  assert len(units["configs/digits.py", "adamw"].rates) == 7


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.methods=('adamv',)", "did you mean 'adam'"),
    ("--config.methods=('a: optimizer',)", "is not FIELD=VALUE"),
    ("--config.methods=('a: optimiser=sgd',)", "config.optimizer?"),
    ("--config.methods=()", "no jobs or no methods"),
    (
      "--config.methods=(1,)",
      "config.methods=(1,) must be a tuple of texts; type "
      "--config.methods=\"('adamw','mechanic')\"",
    ),
    ("--config.methods=adamw,mechanic", "must be a tuple of texts; type"),
    ("--config.jobs=(1,)", "config.jobs=(1,) must be a tuple of texts; type"),
    ("--config.jobs=configs/a.py,configs/b.py", "must be a tuple of texts"),
    ("--config.fields=(1,)", "config.fields=(1,) must be a tuple of texts"),
    ("--config.jobs=('configs/digit.py',)", "configs/digits.py"),
    ("--config.num_steps=(0,)", "must be numbers above 0"),
    ("--config.num_steps=(4.5,)", "must be numbers above 0"),
    ("--config.learning_rates=(0.0,)", "must be numbers above 0"),
    ("--config.methods=('adamw','adamw: optimizer=sgd')", "a label of its own"),
    ("--config.jobs=('configs/digits.py','./configs/digits.py')", "is there 2"),
    ("--config.jobs=('a\\'b',)", "No closing quotation"),
    ("--config.jobs=('',)", "there is no file"),
    (
      "--config.methods=('a: optimizer=adamw learning_rate=0.1',)",
      "learning_rate is what the sweep sets, for every method; leave it out, "
      'and type --config.learning_rates="(0.001,)"',
    ),
    (
      "--config.methods=('a: optimizer=adamw opt.adamw.learning_rate=0.1',)",
      "opt.adamw.learning_rate is what the sweep sets",
    ),
    ("--config.methods=('a: optimizer=adamw seed=3',)", '--config.seeds="5"'),
    ("--config.methods=('a: num_steps=7',)", "num_steps is what the sweep"),
    ("--config.fields=('seed=3',)", "seed is what the sweep sets"),
    (
      "--config.jobs=('configs/digits.py learning_rate=1.0',)",
      "learning_rate is what the sweep sets",
    ),
    (
      "--config.methods=('a: optimizer=mechanic opt.lion.b1=0.1',)",
      "--config.opt.lion.b1 has no effect on mechanic over",
    ),
    (
      "--config.methods=('a: optimizer=adamw opt.prodigy.learning_rate=2.0',)",
      "--config.opt.prodigy.learning_rate has no effect on adamw",
    ),
    ("--config.seeds=0", "config.seeds=0 must be at least 1"),
    ("--config=configs/digits.py", "describes a job, not a sweep"),
  ],
)
def test_errors_come_before_any_run(
  tmp_path, capsys, monkeypatch, argument, message
):
  monkeypatch.delattr(sweep, "train")
  given = [*ARGUMENTS[:1], f"--workdir={tmp_path}", argument]
  assert sweep.main(given) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert message in error
  assert len(error.splitlines()) == 1
  assert not (tmp_path / "runs.jsonl").exists()


def compare(variant, folder, **fields):
  """Runs a variant of configs/sweep.py and returns its data."""
  config = configs.sweep.get_config(variant)
  config.update(fields)
  units = plan.make_units(config)
  sweep.train(units, folder / "runs.jsonl")
  return comparison.frame(sweep.rows_of(units, folder / "runs.jsonl"))


def ratios(result):
  return result.groupby("method")["ratio"].agg(comparison.geometric_mean)


@pytest.mark.slow
def test_mechanic_is_as_good_as_tuned(tmp_path):
  """On fresh data over each base, and on a job that is learned by heart."""
  jobs = {"jobs": ("configs/teacher.py",), "interpolating": ()}
  rates = {"learning_rates": (3e-3, 1e-2, 3e-2, 1e-1)}
  methods = tuple(
    method
    for method in configs.sweep.get_config("quick").methods
    if method not in ("mechanize", "prodigy")
  )
  fresh = comparison.compare(
    compare("quick", tmp_path, methods=methods, **jobs, **rates)
  )
  jobs = {"jobs": (), "interpolating": ("configs/digits.py:mlp",)}
  methods = ("adamw", "mechanic")
  data = compare("quick", tmp_path, methods=methods, **jobs, **rates)
  by_heart = comparison.compare(data)
  result = pd.concat([fresh, by_heart])
  assert not result["failed"].any()
  own = result[result["method"] == "mechanic"]
  assert comparison.geometric_mean(own["ratio"]) < 1.05
  assert own["ratio"].max() < 1.15
  assert own["points"].min() > -0.5
  for base in ("muon", "sgd", "lion"):
    assert ratios(fresh)[f"mechanic({base})"] < 1.05 * ratios(fresh)[base]
  held_out = comparison.compare(comparison.held_out(data))
  assert ratios(held_out)["mechanic"] < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dtype", "job"),
  [
    # Bfloat16 parameters keep their offset, float32 ones recover it.
    ("float32", "configs/digits.py:mlp"),
    ("bfloat16", "configs/autoencoder.py"),
  ],
)
def test_no_base_learning_rate_diverges(tmp_path, dtype, job):
  data = compare(
    "range",
    tmp_path,
    jobs=(),
    interpolating=(job,),
    methods=tuple(
      method
      for method in configs.sweep.get_config("range").methods
      if method.startswith("mechanic")
    ),
    fields=(f"dtype={dtype}", f"param_dtype={dtype}"),
    seeds=1,
  )
  at = lambda last: data[(data["step"] == data["num_steps"]) == last]["loss"]
  assert np.isfinite(data["loss"]).all()
  assert (at(True) < at(False).max()).all()


@pytest.mark.slow
def test_each_of_the_flags_options_helps(tmp_path):
  methods = configs.sweep.get_config("ablation").methods
  labels = ("mechanic", "one scale", "s_init=1e-6", "mean_decay=False")
  data = compare(
    "ablation",
    tmp_path,
    jobs=(),
    interpolating=("configs/digits.py:mlp",),
    methods=tuple(m for m in methods if m.partition(":")[0] in labels),
    num_steps=(400,),
  )
  # Without one of them, what is learned by heart is worth less elsewhere.
  found = ratios(comparison.compare(comparison.held_out(data)))
  assert found["s_init=1e-6"] > 1.5
  assert found["one scale"] > 1.05
  assert found["mean_decay=False"] > 1.3


def make_rows():
  """A held-out job and one learned by heart; three methods, two seeds."""
  losses = {
    # job, method, learning rate: validation, test and training loss.
    ("a.py", "adamw", 0.1): (1.0, 2.0, 9.0),
    ("a.py", "adamw", 0.2): (3.0, 1.0, 0.1),
    ("a.py", "ours", 1e-3): (1.0, 1.0, 9.0),
    ("a.py", "ours", 1.0): (9.0, 3.0, 9.0),
    ("a.py", "ours", 1e3): (1.0, 1.0, 9.0),
    ("b.py", "adamw", 0.1): (1.0, 1.0, 1.0),
    ("b.py", "adamw", 0.2): (9.0, 9.0, 0.008),
    ("b.py", "ours", 1.0): (9.0, 9.0, 0.02),
    ("b.py", "ours", 1e3): (1.0, 1.0, None),
  }
  for (job, method, rate), at_the_end in losses.items():
    for seed in (0, 1):
      for step in (0, 10):
        values = at_the_end if step else (2.0, 2.0, 2.0)
        names = ("validation/loss", "test/loss", "train/loss")
        yield {
          "job": job,
          "method": method,
          "tuned": method == "adamw",
          "interpolates": job == "b.py",
          "num_steps": 10,
          "learning_rate": rate,
          "seed": seed,
          "step": step,
          "validation/accuracy": 0.5,
          "test/accuracy": 0.7 if method == "adamw" else 0.6 + seed / 10,
          **{
            name: value and value + (seed and step and 0.001)
            for name, value in zip(names, values, strict=True)
          },
        }


def test_comparison():
  data = comparison.frame(list(make_rows()))
  result = comparison.compare(data).set_index(["job", "method"])
  # Tuned by validation, reported by test; by training loss where that counts.
  tuned = result.loc[("a", "adamw")]
  assert tuned["learning_rate"] == 0.1
  assert tuned["loss"] == pytest.approx(2.0005)
  assert tuned["loss_sd"] == pytest.approx(0.001 / np.sqrt(2))
  assert result.loc[("b", "adamw"), "learning_rate"] == 0.2
  assert tuned["ratio_best"] == 1.0
  # What learns its rate is taken as it is.
  assert result.loc[("a", "ours"), "learning_rate"] == 1.0
  assert result.loc[("a", "ours"), "ratio"] == pytest.approx(3.0005 / 2.0005)
  assert result.loc[("a", "ours"), "points"] == pytest.approx(-5.0)
  assert result.loc[("a", "ours"), "floor"] == 0.0
  # 0.0085 is below half a percent of the loss at the start.
  assert result.loc[("b", "ours"), "ratio"] == pytest.approx(0.0205 / 0.01)
  assert result.loc[("b", "ours"), "points"] == pytest.approx(-2.5)
  assert set(result["failed"]) == {0}
  # Held out, it is against what is tuned for that.
  seen = comparison.compare(comparison.held_out(data))
  seen = seen.set_index(["job", "method"])
  assert list(seen.index) == [("b", "adamw"), ("b", "ours")]
  assert seen.loc[("b", "adamw"), "learning_rate"] == 0.1
  assert set(seen["floor"]) == {0.0}
  assert seen.loc[("b", "ours"), "ratio"] == pytest.approx(9.0005 / 1.0005)


def test_the_best_tuned_is_chosen_by_what_it_is_tuned_by():
  rows = list(make_rows())
  # Better where it counts, but not where it is tuned.
  other = [
    row
    | {"method": "sgd", "validation/loss": 8.0, "test/loss": 1.0}
    | {"train/loss": row["train/loss"] and row["train/loss"] / 2}
    for row in rows
    if row["method"] == "adamw" and row["step"]
  ]
  result = comparison.compare(comparison.frame([*rows, *other]))
  result = result.set_index(["job", "method"])
  assert result.loc[("a", "ours"), "ratio_best"] == pytest.approx(
    3.0005 / 2.0005
  )
  assert result.loc[("b", "ours"), "ratio_best"] == pytest.approx(0.0205 / 0.01)
  assert result.loc[("b", "adamw"), "ratio_best"] == 1.0
  untuned = [row for row in rows if row["method"] == "ours"]
  result = comparison.compare(comparison.frame(untuned))
  assert result["ratio_best"].isna().all()


def test_the_interval_draws_seeds_for_both_methods_at_once():
  result = comparison.compare(comparison.frame(list(make_rows())))
  own = result[(result["job"] == "a") & (result["method"] == "ours")]
  expected = pytest.approx((3.001 / 2.001, 3.0 / 2.0))
  assert comparison.interval(own) == expected
  # Of two jobs it is that of their mean, whose ends are drawn often enough.
  assert comparison.interval(pd.concat([own] * 2)) == expected
  one_seed = [row for row in make_rows() if row["seed"] == 0]
  result = comparison.compare(comparison.frame(one_seed))
  assert np.isnan(comparison.interval(result)).all()
  assert " to " not in comparison.tables(comparison.frame(one_seed))


def test_a_method_of_which_every_run_failed_and_any_label_have_their_cells():
  rows = [row | {"method": f"|{row['method']}"} for row in make_rows()]
  for row in rows:
    if row["step"]:
      row.update({name: None for name in row if name.endswith("/loss")})
  table = comparison.tables(comparison.frame(rows))
  assert "nan" not in table
  lines = table.partition("\n\n")[0].splitlines()
  assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_profile_is_of_what_is_within_a_factor():
  result = comparison.compare(comparison.frame(list(make_rows())))
  (axes,) = figures._profiles(result, figures._styles(result)).axes
  lines = {line.get_label(): line.get_data() for line in axes.lines}
  # The ratios are 1.50 and 2.05.
  for factor, fraction in ((1.3, 0.0), (1.8, 0.5), (2.5, 1.0)):
    assert np.interp(factor, *lines["ours"]) == fraction


def test_random_search():
  losses = {
    ("adamw", 1e-4): (1.0, 3.0),
    ("adamw", 1e-2): (3.0, 3.0),
    ("ours", 1.0): (2.0, 0.5),
    ("sgd", 1e-2): (0.0, 0.0),
  }
  data = pd.DataFrame(
    {
      "job": "a",
      "num_steps": 10,
      "step": 10,
      "floor": 0.0,
      "method": method,
      "tuned": method != "ours",
      "learning_rate": rate,
      "loss": loss,
    }
    for (method, rate), of_rate in losses.items()
    for loss in of_rate
  )
  (found,) = random_search.searches(data)
  assert (found.job, found.num_steps, found.method) == ("a", 10, "ours")
  # 1e-4 stands for two of five decades, and is better with one seed of two.
  np.testing.assert_allclose(found.better, [0.2, 0.0])
  np.testing.assert_allclose(found.chance([1, 2]), [0.1, 0.18])
  # 0.8^7 > 0.2 > 0.8^8
  assert found.tries(0.4) == 8
  assert found.tries(0.5) == np.inf
  assert "| ours " in random_search.table(data)
  # What reached the smallest loss that counts is not beaten.
  (found,) = random_search.searches(data.assign(floor=2.0))
  np.testing.assert_allclose(found.better, [0.0, 0.0])
  assert random_search.table(data[data["method"] != "adamw"]) == ""


def test_usable_learning_rates():
  data = comparison.frame(list(make_rows()))
  found = comparison.usable(data).set_index(["job", "method"])
  assert found.loc[("a", "adamw"), "decades"] == pytest.approx(0.0)
  assert found.loc[("a", "adamw"), "low"] == 0.2
  # A run that is not finite is no usable one.
  assert found.loc[("b", "ours"), "high"] == 1.0
