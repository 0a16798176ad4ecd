"""The runs that a sweep's config describes."""

import itertools
import math
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError
from flax_mechanic.methods import stack
from train import flags
from train.fields import check_fields
from train.sweep.runs import Row, Run, Runs, make_tasks

# The columns of a row that say what was run; the others were measured.
_KEYS = ("job", "config_crc32", "num_steps", "learning_rate", "seed", "step")

# A job's field that the runs of a sweep differ in -> the sweep's field, and a
# value of it.
_SWEPT = {
  "learning_rate": ("learning_rates", "(0.001,)"),
  "num_steps": ("num_steps", "(400,)"),
  "seed": ("seeds", "5"),
}

# The sweep's fields that are tuples of texts, and an example of each.
_TEXTS = {
  "jobs": "('configs/digits.py',)",
  "interpolating": "('configs/digits.py',)",
  "methods": "('adamw','mechanic')",
  "fields": "('batch_size=8',)",
}

# The values of those columns, which identify a row.
Key = tuple[Any, ...]


class Unit(NamedTuple):
  """A job with a method: the runs of one program, at every length.

  Attributes:
    job: its config file and the fields that were set; the job's name.
    interpolates: whether the training examples are memorized.
    method: the method's name.
    settings: the fields that the method sets, FIELD=VALUE ...
    tuned: whether the learning rate is tuned by hand.
    peaks: the learning rates that it, or its base, is tuned over by hand.
    rates: those, or factors of the learned ones.
    config: the job's config.
    sweep: the sweep's config, with the job's own lengths and such.
  """

  job: str
  interpolates: bool
  method: str
  settings: str
  tuned: bool
  peaks: tuple[float, ...]
  rates: tuple[float, ...]
  config: ConfigDict
  sweep: ConfigDict

  def runs(self) -> list[Run]:
    """Returns the learning rates and the seeds."""
    return list(itertools.product(self.rates, range(self.sweep.seeds)))

  def keys(self, num_steps: int) -> Iterator[Key]:
    """Yields the keys of the rows that it produces at a length."""
    steps = {*range(0, num_steps + 1, self._every(num_steps)), num_steps}
    crc32 = self._config_crc32()
    for (rate, seed), step in itertools.product(self.runs(), sorted(steps)):
      yield self.job, crc32, num_steps, rate, seed, step

  def check(self) -> None:
    """Raises a UsageError if the run that it starts from is not there."""
    before = self.config.init_from
    if before and not storage.path(before).is_dir():
      raise UsageError(
        f"{self.job}: there is no run {before}; type python -m train.main"
        f" --config=FILE --workdir={before} to train it, with the job's FILE"
      )

  def train(self, lengths: tuple[int, ...]) -> Iterator[tuple[int, list[Row]]]:
    """Yields the length and the rows of each evaluation, length by length."""
    own = self.sweep
    runs = Runs(
      self.config,
      make_tasks(self.config, own.seeds),
      max(own.num_steps),
      own.runs_at_once,
    )
    # The number of steps in a call, so that one program serves every length.
    call_every = math.gcd(*map(self._every, own.num_steps))
    names = {
      "job": self.job,
      "method": self.method,
      "settings": self.settings,
      "config_crc32": self._config_crc32(),
    }
    for n in lengths:
      for rows in runs.train(self.runs(), n, self._every(n), call_every):
        yield n, [names | {"num_steps": n} | row for row in rows]

  def _config_crc32(self) -> int:
    """Returns a checksum of all the job's fields, defaults included."""
    return zlib.crc32(self.config.to_json_best_effort().encode())

  def _every(self, num_steps: int) -> int:
    """Returns the number of steps between evaluations."""
    return max(num_steps // self.sweep.evaluations, 1)


def key(row: Row) -> Key:
  """Returns the key of a row."""
  return tuple(row.get(name) for name in _KEYS)


def make_units(config: ConfigDict) -> list[Unit]:
  """Returns the units that a sweep's config describes.

  Args:
    config: as `configs/sweep.py` describes it.

  Raises:
    UsageError: a job or a method does not exist, or a value is out of range.
  """
  _check_texts(config)
  units = [
    _make_unit(config, entry, method)
    for entry in (*config.jobs, *config.interpolating)
    for method in config.methods
  ]
  if not units:
    raise UsageError(
      "the sweep has no jobs or no methods; type"
      """ --config.jobs="('configs/digits.py',)" """
      """--config.methods="('adamw','mechanic')\""""
    )
  cells = [
    (short(unit.job), num_steps, unit.method)
    for unit in units
    for num_steps in unit.sweep.num_steps
  ]
  for cell, times in Counter(cells).items():
    if times > 1:
      raise UsageError(
        f"{cell[2]} is there {times} times on what tables call {cell[0]}; give "
        "each method a label of its own, LABEL: FIELD=VALUE ..., and each "
        "job's file a name of its own"
      )
  return units


def short(job: str) -> str:
  """Returns a job's name in tables: configs/text.py:gru is text:gru."""
  file, *fields = job.split()
  name, colon, variant = file.partition(":")
  return " ".join([Path(name).stem + colon + variant, *fields])


def _make_unit(config: ConfigDict, entry: str, method: str) -> Unit:
  """Returns a job with a method.

  Args:
    config: the sweep's.
    entry: the job's, in `config.jobs` or `config.interpolating`.
    method: in `config.methods`.
  """
  file, *fields = _words(entry) or [""]
  of_job = [
    each
    for each in fields
    if re.split("[.=]", each, maxsplit=1)[0] not in config
  ]
  sweep = config.copy_and_resolve_references()
  flags.override(sweep, [_split(each) for each in fields if each not in of_job])
  _check(sweep)
  label, colon, text = method.partition(":")
  own_settings = _words(text) if colon else [f"optimizer={label}"]
  job = flags.load_config(file)
  own = [_split(each) for each in own_settings]
  of_all = [_split(each) for each in (*of_job, *sweep.fields)]
  _check_swept(of_all, _SWEPT.keys() - {"num_steps"})
  _check_swept(own, _SWEPT)
  flags.override(job, [*of_all, *own])
  check_fields(job)
  flags.check_used(job, [flag for flag, _ in own])
  rows = stack.resolve(job.optimizer, job.opt.to_dict())
  tuned = all(row.tuned for row in rows)
  with job.unlocked():
    job.learning_rate = 1.0
    if tuned and "learning_rate" in job.opt[rows[-1].name]:
      job.opt[rows[-1].name].learning_rate = None
  flax_mechanic.make_optimizer(job)  # Raises now what would fail later.
  factor = stack.relative_rate(rows[-1:])
  peaks = tuple(float(f"{factor * rate:.6g}") for rate in sweep.learning_rates)
  rates = peaks if tuned else sweep.factors
  return Unit(
    job=" ".join([file, *of_job]),
    interpolates=entry in config.interpolating,
    method=label,
    settings=" ".join([*sweep.fields, *own_settings]),
    tuned=tuned,
    peaks=peaks,
    rates=tuple(map(float, rates)),
    config=job,
    sweep=sweep,
  )


def _split(field: str) -> tuple[str, str]:
  """Returns the flag that sets a field, and its value."""
  name, equals, value = field.partition("=")
  if not equals:
    raise UsageError(
      f"{field!r} is not FIELD=VALUE; type for example optimizer=mechanic"
    )
  return f"config.{name}", value


def _check_swept(
  overrides: Sequence[tuple[str, str]], swept: Collection[str]
) -> None:
  """Raises a UsageError for what the sweep sets itself.

  Args:
    overrides: of a job.
    swept: the fields of it that the sweep sets. What learns its learning rate
      keeps a factor of its own.
  """
  for flag, _ in overrides:
    path = flag.removeprefix("config.")
    group, _, option = path.rpartition(".")
    method = flax_mechanic.methods().get(group.removeprefix("opt."))
    field = option if method and method.tuned else path
    if field in swept:
      name, example = _SWEPT[field]
      raise UsageError(
        f"{path} is what the sweep sets, for every method; leave it out, and "
        f'type --config.{name}="{example}"'
      )


def _words(text: str) -> list[str]:
  """Returns a text's words, as a shell does."""
  try:
    return shlex.split(text)
  except ValueError as error:
    raise UsageError(f"{text!r} cannot be read: {error}") from None


def _check_texts(config: ConfigDict) -> None:
  for field, example in _TEXTS.items():
    for each in config[field]:
      # Names with commas between are a tuple that was typed as one text.
      one = isinstance(each, str) and not re.fullmatch(r"[^\s=]+,[^\s=]+", each)
      if not one:
        raise UsageError(
          f"config.{field}={config[field]} must be a tuple of texts; type"
          f' --config.{field}="{example}"'
        )


def _check(config: ConfigDict) -> None:
  for field in ("seeds", "evaluations"):
    if config[field] < 1:
      raise UsageError(f"config.{field}={config[field]} must be at least 1")
  for field, kind, example in (
    ("num_steps", int, "(400,)"),
    ("factors", int | float, "(1.0,)"),
    ("learning_rates", int | float, "(0.001,)"),
  ):
    values = config[field]
    if not values or not all(
      isinstance(value, kind) and 0 < value < math.inf for value in values
    ):
      raise UsageError(
        f"config.{field}={values} must be numbers above 0; type"
        f' --config.{field}="{example}"'
      )
