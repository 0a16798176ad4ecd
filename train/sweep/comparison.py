"""Comparisons of what the runs of a sweep reached, as tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from train.sweep import plan, random_search
from train.tables import format_table

# The smallest training loss that counts, as a fraction of the initial one; at
# smaller losses the training examples are memorized.
FLOOR = 0.005
# A learning rate is usable if its loss is within this factor of the best.
USABLE = 1.1
# Resamplings of the seeds for an interval.
_DRAWS = 4000

_CASE = ["job", "num_steps"]


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
  """Returns the rows of a sweep as a table, with the loss that counts.

  Args:
    rows: as in runs.jsonl, with "method", "tuned" and "interpolates" of their
      `Unit`. Where a unit interpolates, its training loss counts.

  Returns:
    The rows with further columns: "tuning", the loss by which learning rates
    are chosen; "loss", the one that is compared; "floor", the smallest loss
    that counts; "accuracy" in percent, held out and not chosen by. A loss that
    is not finite is infinite.
  """
  data = pd.DataFrame(rows)
  memorized = data["interpolates"]
  data["tuning"] = data["train/loss"].where(memorized, data["validation/loss"])
  data["loss"] = data["train/loss"].where(memorized, data["test/loss"])
  data["loss"] = data["loss"].fillna(np.inf)
  data["tuning"] = data["tuning"].fillna(np.inf)
  if "test/accuracy" in data:
    both = (data["test/accuracy"] + data["validation/accuracy"]) / 2
    data["accuracy"] = 100 * both.where(memorized, data["test/accuracy"])
  else:
    data["accuracy"] = np.nan
  data["job"] = data["job"].map(plan.short)
  start = data["loss"].where(data["step"] == 0)
  start = start.groupby([data[name] for name in _CASE]).transform("mean")
  data["floor"] = (FLOOR * start).where(memorized, 0.0)
  return data


def chosen(data: pd.DataFrame) -> pd.DataFrame:
  """Returns the rows of each method's chosen learning rate.

  For a tuned method that is the one with the smallest mean tuning loss at the
  last step, for the others the factor nearest to 1.
  """
  last = data[data["step"] == data["num_steps"]]
  keys = [*_CASE, "method", "learning_rate"]
  means = last.groupby(keys, sort=False).agg(
    tuned=("tuned", "first"), score=("tuning", "mean")
  )
  means = means.reset_index()
  distance = means["learning_rate"].map(lambda rate: abs(math.log(rate)))
  means["score"] = means["score"].where(means["tuned"], distance)
  best = means.groupby([*_CASE, "method"], sort=False)["score"].idxmin()
  return data.merge(means.loc[best, keys], on=keys)


def compare(data: pd.DataFrame) -> pd.DataFrame:
  """Returns a row for each job, length and method.

  Args:
    data: from `frame`. The others are compared with its first method.

  Returns:
    The columns "job", "num_steps", "interpolates", "method", "learning_rate",
    "tuned", "floor"; "loss", "accuracy" and their standard deviations over
    seeds, "loss_sd" and "accuracy_sd"; "losses" and "losses_first", the losses
    of the method and of the first one by seed; "ratio" of the two's means;
    "ratio_best" to the tuned method that tunes best, NaN if none is tuned;
    "points" of accuracy above the first method's; "failed", how many runs ended
    with a loss that is not finite.
  """
  runs = chosen(data)
  last = runs[runs["step"] == runs["num_steps"]]
  result = last.groupby([*_CASE, "interpolates", "method"], sort=False).agg(
    learning_rate=("learning_rate", "first"),
    tuned=("tuned", "first"),
    loss=("loss", "mean"),
    loss_sd=("loss", "std"),
    losses=("loss", np.array),
    tuning=("tuning", "mean"),
    accuracy=("accuracy", "mean"),
    accuracy_sd=("accuracy", "std"),
    floor=("floor", "first"),
    failed=("loss", lambda losses: int(np.isinf(losses).sum())),
  )
  result = result.reset_index()
  first = result[result["method"] == result["method"].iloc[0]]
  of = result.merge(
    first[[*_CASE, "loss", "losses", "accuracy"]],
    on=_CASE,
    suffixes=("", "_first"),
  )
  tuned = result[result["tuned"]]
  best = tuned.loc[tuned.groupby(_CASE)["tuning"].idxmin(), [*_CASE, "loss"]]
  of = of.merge(best, on=_CASE, how="left", suffixes=("", "_best"))
  result["losses_first"] = of["losses_first"]
  loss, floor = np.maximum(of["loss"], of["floor"]), of["floor"]
  result["ratio"] = loss / np.maximum(of["loss_first"], floor)
  result["ratio_best"] = loss / np.maximum(of["loss_best"], floor)
  result["points"] = of["accuracy"] - of["accuracy_first"]
  return result


def held_out(data: pd.DataFrame) -> pd.DataFrame:
  """Returns the rows of memorized jobs, with their held-out losses.

  Args:
    data: from `frame`.

  Returns:
    The rows with the "tuning" and "loss" of the other jobs.
  """
  of = data[data["interpolates"]]
  losses = {"tuning": of["validation/loss"], "loss": of["test/loss"]}
  losses = {name: loss.fillna(np.inf) for name, loss in losses.items()}
  return of.assign(**losses, floor=0.0)


def tables(data: pd.DataFrame) -> str:
  """Returns all tables in Markdown.

  Args:
    data: from `frame`.
  """
  result, seen = compare(data), held_out(data)
  memorized = compare(seen) if len(seen) else result[:0]
  parts = [_summary(result, memorized), _ratios(result, "loss")]
  if len(memorized):
    parts.append(_ratios(memorized, "held-out loss"))
  parts += [_by_job(result, n) for n in dict.fromkeys(result["num_steps"])]
  parts += [_ranges(data), random_search.table(data)]
  return "\n\n".join(filter(None, parts))


def _summary(result: pd.DataFrame, memorized: pd.DataFrame) -> str:
  """Returns the table of each method over all jobs and lengths.

  Args:
    result: from `compare`.
    memorized: the same of memorized jobs, with their held-out losses.
  """
  first = result["method"].iloc[0]
  rows = []
  for method, own in result.groupby("method", sort=False):
    by = [
      own[~own["interpolates"]]["ratio"],
      own[own["interpolates"]]["ratio"],
      memorized[memorized["method"] == method]["ratio"],
    ]
    rows.append(
      [
        str(method),
        _number(geometric_mean(own["ratio"])),
        _interval(*interval(own)),
        _number(geometric_mean(own["ratio_best"])),
        *(_number(geometric_mean(ratios)) for ratios in by),
        _number(own["ratio"].max()),
        f"{own['points'].min():+.1f}" if own["points"].notna().any() else "",
        str(own["failed"].sum() or ""),
      ]
    )
  head = [
    f"loss over tuned {first}'s"
    if result["tuned"].iloc[0]
    else f"loss over {first}'s",
    "geometric mean",
    "95% interval",
    "over the best tuned",
    "held-out loss",
    "training loss",
    "held-out loss, memorized jobs",
    "worst",
    "worst accuracy, points",
    "failed runs",
  ]
  return format_table([head, *rows])


def _ratios(result: pd.DataFrame, loss: str) -> str:
  """Returns the table of ratios to the first method's loss, by length."""
  jobs = list(dict.fromkeys(result["job"]))
  rows = []
  for method, own in result.groupby("method", sort=False):
    of_job = [own[own["job"] == job]["ratio"] for job in jobs]
    rows.append(
      [str(method), *(" / ".join(map(_number, each)) for each in of_job)]
    )
  lengths = dict.fromkeys(result["num_steps"])
  head = f"{loss} ratios after {' / '.join(map(str, lengths))} steps"
  return format_table([[head, *jobs], *rows])


def _by_job(result: pd.DataFrame, num_steps: int) -> str:
  """Returns the table of losses after so many steps."""
  result = result[result["num_steps"] == num_steps]
  jobs = list(dict.fromkeys(result["job"]))
  rows = []
  for method, own in result.groupby("method", sort=False):
    cells = {row.job: _cell(row) for row in own.itertuples()}
    rows.append([str(method), *(cells.get(job, "") for job in jobs)])
  return format_table([[f"{num_steps} steps", *jobs], *rows])


def usable(data: pd.DataFrame) -> pd.DataFrame:
  """Returns the usable learning rates of each job, length and method.

  Returns:
    The columns "job", "num_steps", "method"; "low" and "high", between which
    the mean loss is within USABLE of the method's best; and "decades" between
    the two.
  """
  last = data[data["step"] == data["num_steps"]]
  keys = [*_CASE, "method"]
  means = last.groupby([*keys, "learning_rate"], sort=False).agg(
    loss=("loss", "mean"), floor=("floor", "first")
  )
  means = means.max(axis=1).rename("loss").reset_index()
  best = means.groupby(keys, sort=False)["loss"].transform("min")
  found = means[means["loss"] <= USABLE * best].groupby(keys, sort=False)
  found = found["learning_rate"].agg(low="min", high="max").reset_index()
  found["decades"] = np.log10(found["high"] / found["low"])
  return found


def _ranges(data: pd.DataFrame) -> str:
  """Returns the table of usable ranges of learning rates, or ""."""
  several = data.groupby("method", sort=False)["learning_rate"].nunique() > 1
  if not several.any():
    return ""
  found = usable(data)
  rows = [
    ["usable learning rates, in decades", "smallest", "median", "largest"]
  ]
  for method in several[several].index:
    decades = found[found["method"] == method]["decades"]
    values = decades.min(), decades.median(), decades.max()
    rows.append([str(method), *(f"{value:.1f}" for value in values)])
  return format_table(rows)


def geometric_mean(ratios: pd.Series) -> float:
  """Returns NaN if there are none."""
  return float(np.exp(np.mean(np.log(ratios)))) if len(ratios) else np.nan


def interval(result: pd.DataFrame) -> tuple[float, float]:
  """Returns the 95% interval of the geometric mean ratio over seeds.

  A percentile bootstrap (Efron, Tibshirani 1993): the seeds of each job and
  length are resampled, the same for both methods, while the tuned learning
  rates stay. NaN where a job has a single seed or a run failed.

  Args:
    result: rows of one method, from `compare`.
  """
  random = np.random.default_rng(0)
  logs = np.zeros(_DRAWS)
  columns = result[["losses", "losses_first", "floor"]]
  for own, first, floor in columns.to_numpy():
    if len(own) < 2 or not np.isfinite([*own, *first]).all():
      return np.nan, np.nan
    seeds = random.integers(len(own), size=(_DRAWS, len(own)))
    drawn = [each[seeds].mean(axis=1) for each in (own, first)]
    own_mean, first_mean = np.maximum(drawn, floor)
    logs += np.log(own_mean / first_mean)
  low, high = np.exp(np.quantile(logs / len(result), [0.025, 0.975]))
  return float(low), float(high)


def _interval(low: float, high: float) -> str:
  return "" if np.isnan(low) else f"{low:.2f} to {high:.2f}"


def _number(value: float) -> str:
  return "" if np.isnan(value) else f"{value:.2f}"


def _cell(row: Any) -> str:
  if not np.isfinite(row.loss):
    return "not finite"
  text = f"{row.loss:.3g}"
  if np.isfinite(row.loss_sd):
    text += f" ± {row.loss_sd:.1g}"
  if np.isfinite(row.accuracy):
    text += f", {row.accuracy:.1f}%"
  if row.tuned:
    text += f" at {row.learning_rate:g}"
  return text
