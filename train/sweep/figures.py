"""Figures of a sweep, as PNG and SVG."""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train import files
from train.sweep import comparison, random_search

# Method -> matplotlib's keyword arguments for its line.
Styles = Mapping[str, Mapping[str, Any]]

_COLUMNS = 4
_MARKERS = "os^Dv<>Pp*hXd"
# The axes' limits, in multiples of the first method's loss.
_LOSSES = (0.4, 10.0)
# The most random learning rates that are drawn.
_TRIES = 100
_TICKS = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)


def draw(data: pd.DataFrame, workdir: Any) -> Iterator[str]:
  """Draws the figures that the data has; yields the names of the files.

  Args:
    data: from `comparison.frame`.
    workdir: where the files go.
  """
  result = comparison.compare(data)
  chosen = comparison.chosen(data)
  styles = _styles(result)
  drawings: dict[str, Callable[[], Figure | None]] = {
    "ratios": lambda: _ratios(result, styles),
    "profiles": lambda: _profiles(result, styles),
    "random_search": lambda: _over_tries(data, styles),
    "losses": lambda: _over_steps(chosen, "loss", styles),
    "learning_rates": lambda: _over_rates(data, styles),
    # Without the last step, where the schedule ends.
    "learned": lambda: _over_steps(
      chosen[chosen["step"] < chosen["num_steps"]],
      "learning_rate/effective",
      styles,
    ),
  }
  for name, make in drawings.items():
    figure = make()
    if figure is not None:
      yield save(figure, workdir, name)


def save(figure: Figure, workdir: Any, name: str) -> str:
  """Writes a figure as PNG and SVG; returns the name of the first."""
  FigureCanvasAgg(figure)
  # Text stays text, and the files depend on nothing but the data.
  with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep"}):
    own: Any = {"png": {"dpi": 120}, "svg": {"metadata": {"Date": None}}}
    for kind, options in own.items():
      image = io.BytesIO()
      figure.savefig(image, format=kind, **options)
      files.write(workdir / f"{name}.{kind}", image.getvalue())
  return f"{name}.png"


def _styles(result: pd.DataFrame) -> Styles:
  """Returns each method's color and line style, ten colors for each style."""
  methods = list(dict.fromkeys(result["method"]))
  styles = itertools.product(("-", "--", ":"), mpl.color_sequences["tab10"])
  return {
    method: {"linestyle": line, "color": color}
    for method, (line, color) in zip(methods, itertools.cycle(styles))
  }


def _ratios(result: pd.DataFrame, styles: Styles) -> Figure:
  """Draws ratios to the first method's loss, a point for each job."""
  methods = list(styles)
  figure = Figure((8, 1.5 + 0.35 * len(methods)), layout="constrained")
  axes = figure.subplots()
  for job, marker in zip(
    dict.fromkeys(result["job"]), itertools.cycle(_MARKERS)
  ):
    own = result[result["job"] == job]
    axes.scatter(
      own["ratio"].clip(*_LOSSES),
      [methods.index(method) for method in own["method"]],
      s=20,
      alpha=0.6,
      marker=marker,
      color=[styles[method]["color"] for method in own["method"]],
      label=job,
    )
  means = result.groupby("method")["ratio"].agg(comparison.geometric_mean)
  axes.scatter(
    means[methods].clip(*_LOSSES),
    range(len(methods)),
    marker="|",
    s=300,
    color="black",
    label="geometric mean",
  )
  axes.axvline(1.0, color="gray", linewidth=0.8)
  axes.set(
    xscale="log", xlabel=f"loss over {methods[0]}'s", yticks=range(len(methods))
  )
  axes.set_yticklabels(methods)
  axes.invert_yaxis()
  _plain_ticks(axes.xaxis)
  figure.legend(loc="outside right center", fontsize="small", frameon=False)
  return figure


def _profiles(result: pd.DataFrame, styles: Styles) -> Figure:
  """Draws the fraction of jobs and lengths within each factor."""
  figure = Figure((7, 4), layout="constrained")
  axes = figure.subplots()
  factors = np.geomspace(_LOSSES[0], 4.0, 400)
  for method, own in result.groupby("method", sort=False):
    fractions = [(own["ratio"] <= factor).mean() for factor in factors]
    axes.plot(factors, fractions, **styles[str(method)], label=method)
  axes.axvline(1.0, color="gray", linewidth=0.8)
  axes.set(
    xscale="log",
    ylim=(0, 1.02),
    xlabel=f"loss over {next(iter(styles))}'s, at most",
    ylabel="fraction of jobs and lengths",
  )
  _plain_ticks(axes.xaxis)
  figure.legend(loc="outside right center", fontsize="small", frameon=False)
  return figure


def _over_rates(data: pd.DataFrame, styles: Styles) -> Figure | None:
  """Draws the last loss over the learning rate of methods with several."""
  last = data[data["step"] == data["num_steps"]]
  rates = last.groupby("method")["learning_rate"].transform("nunique")
  last = last[(rates > 1) & (last["num_steps"] == last["num_steps"].max())]
  last = last.assign(loss=np.maximum(last["loss"], last["floor"]))
  if last.empty:
    return None

  def panel(axes: Any, own: pd.DataFrame) -> None:
    for method, runs in own.groupby("method", sort=False):
      by_rate = runs.groupby("learning_rate")["loss"]
      mean, low, high = by_rate.mean(), by_rate.min(), by_rate.max()
      style = styles[str(method)]
      axes.plot(mean.index, mean, marker=".", **style, label=method)
      axes.fill_between(
        mean.index, low, high, color=style["color"], alpha=0.2, linewidth=0
      )
    best = own["loss"].min()
    axes.set(xscale="log", yscale="log", ylim=(0.9 * best, 12 * best))

  return _panels(
    last, panel, "learning rate, or factor of the learned one", "loss"
  )


def _over_tries(data: pd.DataFrame, styles: Styles) -> Figure | None:
  """Draws the chance that one of so many random learning rates is better."""
  longest = data[data["num_steps"] == data["num_steps"].max()]
  found = pd.DataFrame(
    random_search.searches(longest), columns=random_search.Search._fields
  )
  if found.empty:
    return None
  tries = np.arange(1, _TRIES + 1)

  def panel(axes: Any, own: pd.DataFrame) -> None:
    for search in map(random_search.Search._make, own.to_numpy()):
      style = styles[search.method]
      axes.plot(tries, search.chance(tries), **style, label=search.method)
    axes.set(xscale="log", ylim=(0, 1.02))

  first = data["method"].iloc[0]
  return _panels(
    found, panel, f"random learning rates of {first}", "chance of a better one"
  )


def _over_steps(
  chosen: pd.DataFrame, column: str, styles: Styles
) -> Figure | None:
  """Draws a column over the steps of the longest runs."""
  runs = chosen[chosen["num_steps"] == chosen["num_steps"].max()]
  if column not in runs:
    return None
  runs = runs[np.isfinite(runs[column]) & (runs[column] > 0)]
  if runs.empty:
    return None

  def panel(axes: Any, own: pd.DataFrame) -> None:
    for method, each in own.groupby("method", sort=False):
      mean = each.groupby("step")[column].mean()
      axes.plot(mean.index, mean, **styles[str(method)], label=method)
    axes.set(yscale="log")

  return _panels(runs, panel, "step", column)


def _panels(
  data: pd.DataFrame,
  panel: Callable[[Any, pd.DataFrame], None],
  xlabel: str,
  ylabel: str,
) -> Figure:
  """Draws a panel for each job."""
  jobs = list(dict.fromkeys(data["job"]))
  columns = min(_COLUMNS, len(jobs))
  rows = math.ceil(len(jobs) / columns)
  figure = Figure((3 * columns + 2, 2.4 * rows + 0.6), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False).flat
  handles: dict[str, Any] = {}
  for job, axes in zip(jobs, grid, strict=False):
    panel(axes, data[data["job"] == job])
    axes.set_title(job, fontsize="medium")
    handles |= dict(
      zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
  for axes in list(grid):
    axes.set_visible(False)
  figure.supxlabel(xlabel)
  figure.supylabel(ylabel)
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside right center",
    fontsize="small",
    frameon=False,
  )
  return figure


def _plain_ticks(axis: Any) -> None:
  axis.set_major_locator(mpl.ticker.FixedLocator(_TICKS))
  axis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
  axis.set_minor_locator(mpl.ticker.NullLocator())
