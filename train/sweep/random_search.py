"""How many random learning rates it takes to beat a run that is not tuned."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from train.tables import format_table

# Between these a learning rate is drawn, log-uniformly.
RANGE = (1e-5, 1.0)
# The chances of success that the table is for.
CHANCES = (0.5, 0.9)


class Search(NamedTuple):
  """A search for a learning rate, held against a method without one.

  Attributes:
    job: the job.
    num_steps: the length of the runs.
    method: the one without.
    better: for each of its seeds, the chance that a run of the tuned method at
      a random learning rate ends with a smaller loss.
  """

  job: str
  num_steps: int
  method: str
  better: np.ndarray

  def chance(self, tries: np.ndarray | int) -> np.ndarray:
    """Returns the chance that the best of so many tries has a smaller loss."""
    tries = np.asarray(tries)[..., np.newaxis]
    return np.mean(1 - (1 - self.better) ** tries, axis=-1)

  def tries(self, chance: float) -> float:
    """Returns how many it takes for that chance; infinity if none suffice."""
    if np.mean(self.better > 0) <= chance:
      return math.inf
    return next(n for n in itertools.count(1) if self.chance(n) >= chance)


def searches(data: pd.DataFrame) -> Iterator[Search]:
  """Yields a search for each job, length and method that is not tuned.

  The first method's learning rate is searched for. A rate of the grid stands
  for those that are nearer to it than to others, the ends of the grid for all
  beyond, which favors the search.

  Args:
    data: from `comparison.frame`.
  """
  last = data[data["step"] == data["num_steps"]]
  last = last.assign(loss=np.maximum(last["loss"], last["floor"]))
  first = last["method"].iloc[0]
  if not last["tuned"].iloc[0]:
    return
  for (job, num_steps), runs in last.groupby(["job", "num_steps"], sort=False):
    tried = runs[runs["method"] == first]
    by_rate = [
      each["loss"].to_numpy() for _, each in tried.groupby("learning_rate")
    ]
    shares = _shares(sorted(tried["learning_rate"].unique()))
    for method, own in runs[~runs["tuned"]].groupby("method", sort=False):
      if own["learning_rate"].nunique() > 1:
        continue
      better = sum(
        share
        * (losses[np.newaxis] < own["loss"].to_numpy()[:, np.newaxis]).mean(
          axis=1
        )
        for share, losses in zip(shares, by_rate, strict=True)
      )
      yield Search(str(job), int(num_steps), str(method), np.asarray(better))


def _shares(rates: Sequence[float]) -> np.ndarray:
  """Returns the chance that a random rate is nearest to each of these."""
  logs = np.log(rates)
  low, high = np.log(RANGE)
  edges = np.clip([low, *(logs[1:] + logs[:-1]) / 2, high], low, high)
  return np.diff(edges) / (high - low)


def table(data: pd.DataFrame) -> str:
  """Returns a row for each method and a column for each job, in Markdown.

  Args:
    data: from `comparison.frame`.

  Returns:
    The table, or "" if the first method is not tuned or all are.
  """
  found = list(searches(data))
  if not found:
    return ""
  methods = dict.fromkeys(each.method for each in found)
  jobs = dict.fromkeys(each.job for each in found)
  rows = []
  for method in methods:
    own = [each for each in found if each.method == method]
    of_job = [[each for each in own if each.job == job] for job in jobs]
    rows.append([method, _median(own), *map(_cell, of_job)])
  first = data["method"].iloc[0]
  lengths = dict.fromkeys(each.num_steps for each in found)
  head = (
    f"random learning rates of {first} until one is better with a chance of"
    f" {', '.join(f'{chance:.0%}' for chance in CHANCES)}, after"
    f" {' / '.join(map(str, lengths))} steps"
  )
  return format_table([[head, "median", *jobs], *rows])


def _cell(of_job: Sequence[Search]) -> str:
  tries = ([each.tries(chance) for chance in CHANCES] for each in of_job)
  return " / ".join(", ".join(map(_number, each)) for each in tries)


def _median(own: Sequence[Search]) -> str:
  tries = [[each.tries(chance) for each in own] for chance in CHANCES]
  # The lower one of two, since the upper may be infinite.
  return ", ".join(_number(sorted(each)[(len(own) - 1) // 2]) for each in tries)


def _number(tries: float) -> str:
  return "never" if math.isinf(tries) else f"{tries:.0f}"
