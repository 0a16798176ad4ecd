"""Why Mechanic is behind: its ramp, its scales, the leaves' or the schedule.

For each job and length its base is trained with constant scales, which the
tuner cannot know in advance. The table has losses over those of the base tuned
by hand:

mechanic         as the sweep's config has it
seeds            its smallest and largest, each over the same seed's
no ramp          the base, where each leaf's learning rate is what Mechanic has
                 learned for it by the end of the run, from the first step on
multiple         the same times the best of a few factors, and that factor
searched         the base with a learning rate for each leaf, found by search
stable           Mechanic with the schedule warmup_stable_decay
stable, tuned    the base tuned with that schedule

The figure has losses over multiples of the learned scales, and of one learning
rate for all leaves. What is chosen is chosen on the examples that the sweep
tunes learning rates on.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from flax_mechanic.errors import UsageError
from flax_mechanic.paths import matching, parameter_path
from train import files
from train.sweep import figures, plan
from train.sweep.runs import Runs, make_tasks, pool
from train.tables import format_table

_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# What the search multiplies and divides a leaf's learning rate by, and how many
# times it goes over all leaves.
_FACTOR, _ROUNDS = 3.0, 2
_STABLE = "warmup_stable_decay"
_COLUMNS = 3
_TICKS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of runs that differ in learning rates and seed.

  Attributes:
    tuned: the loss that learning rates are chosen by, [rates, seeds].
    reported: the loss that counts, likewise.
  """

  tuned: np.ndarray
  reported: np.ndarray

  @property
  def best(self) -> int:
    """The number of the best learning rates."""
    return int(np.argmin(self.tuned.mean(1)))

  @property
  def of_best(self) -> float:
    """Their loss."""
    return float(self.reported[self.best].mean())


@dataclasses.dataclass(frozen=True)
class Found:
  """What was found of a job and length, with the columns of the table.

  Attributes:
    job: its name.
    num_steps: its length.
    rates: the learning rates of the base, the same for all leaves.
    scale: the geometric mean of the scales that Mechanic ends with.
  """

  job: str
  num_steps: int
  rates: tuple[float, ...]
  scale: float
  tuned: Losses
  mechanic: Losses
  multiples: Losses
  searched: Losses
  stable: Losses
  stable_tuned: Losses


class _Learning(Runs):
  """Runs under Mechanic.

  Attributes:
    scales: those of the last evaluation, [runs, leaves].
  """

  def _splits(self, state: Any) -> Any:
    named = {
      parameter_path(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"])
    }
    # Parameters are called "scale" too, but Mechanic's alone is beside an s.
    (s,) = (name for name in named if name.split("/")[-1] == "s")
    self.scales = np.asarray(named[s.removesuffix("s") + "scale"], np.float64)
    return super()._splits(state)


class _ByLeaf(Runs):
  """Runs with a learning rate for each leaf that is trained."""

  def _optimizer(
    self, rate: jax.typing.ArrayLike, shape: jax.Array
  ) -> optax.GradientTransformation:
    base = super()._optimizer(1.0, shape)

    def update(updates, state, params=None, **extra_args):
      updates, state = base.update(updates, state, params, **extra_args)
      leaves, tree = jax.tree.flatten(updates)
      frozen = jax.tree.leaves(matching(self._config.freeze, updates))
      trained = [i for i, still in enumerate(frozen) if not still]
      rates = jnp.unstack(jnp.asarray(rate))
      for i, each in zip(trained, rates, strict=True):
        leaves[i] *= each
      return tree.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(base.init, update)


def report(units: Sequence[plan.Unit], workdir: Any) -> Iterator[str]:
  """Trains, writes the table and draws the figure; yields what to print.

  Args:
    units: jobs with a wrapper that learns a scale for each leaf.
    workdir: where the files go.

  Raises:
    UsageError: a method learns something else.
  """
  for unit in units:
    options = unit.config.opt[unit.config.optimizer]
    if unit.tuned or options.get("groups") != ".*":
      raise UsageError(
        f"{unit.method} does not learn a scale for each leaf of a base; type"
        """ --config.methods="('mechanic',)\""""
      )
  cases = [(unit, n) for unit in units for n in unit.sweep.num_steps]
  found = []
  with pool() as threads:
    for each in threads.map(lambda case: analyze(*case), cases):
      found.append(each)
      name = f"{plan.short(each.job)}, {each.num_steps} steps"
      yield f"{len(found)} of {len(cases)}: {name}"
  table = format_table([_HEAD, *map(_row, found)])
  files.write(workdir / "oracle.md", f"{table}\n".encode())
  yield table
  yield f"{workdir / figures.save(_draw(found), workdir, 'oracle')}"


def analyze(unit: plan.Unit, num_steps: int) -> Found:
  """Trains the base in all the ways that are compared.

  Args:
    unit: a job with a wrapper that learns a scale for each leaf.
    num_steps: the length of the runs.
  """
  over = unit.config
  base = over.copy_and_resolve_references()
  base.optimizer = over.opt[over.optimizer].base
  tasks = make_tasks(over, unit.sweep.seeds)

  def make(kind: type[Runs], config: Any) -> Any:
    return kind(config, tasks, num_steps, unit.sweep.runs_at_once)

  one = np.ones([1, unit.sweep.seeds])
  learning = make(_Learning, over)
  mechanic = _train(unit, learning, num_steps, one)
  scales = learning.scales
  leaves = scales.shape[1]

  def train(runs: Runs, rates: np.ndarray) -> Losses:
    """Trains with rates [rows, 1 or seeds, 1 or leaves]."""
    shape = len(rates), unit.sweep.seeds, leaves
    return _train(unit, runs, num_steps, np.broadcast_to(rates, shape))

  by_leaf = make(_ByLeaf, base)
  uniform = np.reshape(unit.peaks, (-1, 1, 1))
  tuned = train(by_leaf, uniform)
  multiples = train(by_leaf, np.reshape(_MULTIPLES, (-1, 1, 1)) * scales)
  start = np.full([1, leaves], unit.peaks[tuned.best])
  if multiples.tuned.mean(1).min() < tuned.tuned.mean(1).min():
    mean = np.exp(np.log(scales).mean(0, keepdims=True))
    start = _MULTIPLES[multiples.best] * mean
  return Found(
    job=unit.job,
    num_steps=num_steps,
    rates=unit.peaks,
    scale=float(np.exp(np.log(scales).mean())),
    tuned=tuned,
    mechanic=mechanic,
    multiples=multiples,
    searched=_search(lambda rates: train(by_leaf, rates), start),
    stable=_train(unit, make(Runs, _stable(over)), num_steps, one),
    stable_tuned=train(make(_ByLeaf, _stable(base)), uniform),
  )


def _stable(config: Any) -> Any:
  config = config.copy_and_resolve_references()
  config.schedule.name = _STABLE
  return config


def _train(
  unit: plan.Unit, runs: Runs, num_steps: int, rates: np.ndarray
) -> Losses:
  """Trains with learning rates [rows, seeds] or [rows, seeds, leaves]."""
  each = [
    (rate.tolist(), seed) for row in rates for seed, rate in enumerate(row)
  ]
  *_, last = runs.train(each, num_steps, num_steps, min(num_steps, 100))

  def losses(split: str) -> np.ndarray:
    values = [row[f"{split}/loss"] for row in last]
    finite = [math.inf if value is None else value for value in values]
    return np.reshape(finite, (len(rates), -1))

  tuned, reported = (
    ("train", "train") if unit.interpolates else ("validation", "test")
  )
  return Losses(losses(tuned), losses(reported))


def _search(train: Any, rates: np.ndarray) -> Losses:
  """Returns the losses of the best of rates [1, leaves] that are found.

  A round changes each leaf alone. Of what helps it keeps all, or the best one
  where all together are worse.
  """
  leaves = rates.shape[1]
  losses = train(rates[None])
  for _ in range(_ROUNDS):
    moves = np.ones([leaves, 2, leaves])
    for leaf in range(leaves):
      moves[leaf, :, leaf] = _FACTOR, 1 / _FACTOR
    moves = moves.reshape(-1, 1, leaves)
    alone = train(rates * moves).tuned.mean(1)
    helps = alone < losses.tuned.mean()
    # Of the two moves of a leaf the better one.
    better = alone.reshape(-1, 2) == alone.reshape(-1, 2).min(1, keepdims=True)
    both = moves[helps & better.reshape(-1)].prod(0, keepdims=True)
    tried = np.concatenate([np.ones_like(both), both, moves[[alone.argmin()]]])
    found = train(rates * tried)
    rates = rates * tried[found.best]
    losses = Losses(found.tuned[[found.best]], found.reported[[found.best]])
  return losses


_HEAD = (
  "job",
  "steps",
  "mechanic",
  "seeds",
  "no ramp",
  "multiple",
  "searched",
  "stable",
  "stable, tuned",
)


def _row(found: Found) -> list[str]:
  over = lambda loss: f"{loss / found.tuned.of_best:.2f}"
  seeds = found.mechanic.reported[0] / found.tuned.reported[found.tuned.best]
  at_one = found.multiples.reported[_MULTIPLES.index(1.0)].mean()
  return [
    plan.short(found.job),
    str(found.num_steps),
    over(found.mechanic.of_best),
    f"{seeds.min():.2f} to {seeds.max():.2f}",
    over(at_one),
    f"{over(found.multiples.of_best)} ({_MULTIPLES[found.multiples.best]:g})",
    over(found.searched.of_best),
    over(found.stable.of_best),
    over(found.stable_tuned.of_best),
  ]


def _draw(found: Sequence[Found]) -> Figure:
  """Draws the losses over multiples of the learned scales, a panel a case."""
  columns = min(_COLUMNS, len(found))
  rows = math.ceil(len(found) / columns)
  figure = Figure((4 * columns, 3 * rows), layout="constrained")
  panels = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes, each in zip(panels, found, strict=False):
    over = lambda losses, of=each: losses.reported.mean(1) / of.tuned.of_best
    axes.plot(_MULTIPLES, over(each.multiples), "o-", label="learned scales")
    one = [rate / each.scale for rate in each.rates]
    axes.plot(one, over(each.tuned), "s--", label="one rate for all leaves")
    for name, losses, style in (
      ("mechanic", each.mechanic, "-"),
      ("searched", each.searched, ":"),
    ):
      level = losses.of_best / each.tuned.of_best
      axes.axhline(level, color="black", linestyle=style, label=name)
    name = f"{plan.short(each.job)}\n{each.num_steps} steps"
    axes.set_title(name, fontsize="small")
    axes.set(xscale="log", yscale="log", xlim=(0.02, 30.0), ylim=(0.3, 5.0))
    axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
  for axes in panels[len(found) :]:
    axes.remove()
  panels[0].legend(fontsize="small")
  figure.supxlabel("times the scales that Mechanic ends with")
  figure.supylabel("loss over the tuned base's")
  return figure
