"""The training loop: start or resume, train, evaluate, save checkpoints."""

import contextlib
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic.checkpoints import record, storage
from flax_mechanic.errors import UsageError
from flax_mechanic.methods import stack
from train import files, prefetch, processes, writers
from train.fields import check_fields
from train.job import Job, make_job
from train.progress import Progress

# What only a new run reads.
_ORIGIN = ("init_from", "init_params_only")


def train(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  writer: writers.MetricWriter | None = None,
) -> dict[str, float]:
  """Trains the job up to `config.num_steps`, from the newest checkpoint if any.

  A checkpoint's step is also its position in the data, because batches depend
  only on the seed and the step. SIGTERM or Ctrl-C, once and to any of the job's
  processes, ends the run with a checkpoint of the present step.

  Args:
    config: as `configs.default` describes it.
    workdir: holds `config.json`, `parameters.txt`, `metrics.jsonl`, TensorBoard
      files and `checkpoints/STEP`. It may be in a bucket: gs://BUCKET/FOLDER.
    writer: where metrics go, with the interface of clu's MetricWriter, and
      closed at the end; by default files in `workdir`.

  Returns:
    The last evaluation, such as {"eval/loss": ..., "eval/accuracy": ...}.

  Raises:
    UsageError: a value in the config is wrong, the newest checkpoint
      does not fit it, too many gradients in a row were skipped, or a loss is
      not finite at the end.
  """
  check_fields(config)
  root = storage.path(workdir)
  _check_apart(config, root)
  job = make_job(config)
  _check_best(job, config.checkpoint_best)
  processes.check_agreement(config.to_json_best_effort(), root)
  _check_files(job, root)
  with (
    jax.set_mesh(job.mesh),
    flax_mechanic.Checkpointer(
      root / "checkpoints",
      keep=config.checkpoint_keep,
      keep_every=config.checkpoint_keep_every,
      best=config.checkpoint_best,
    ) as checkpointer,
  ):
    start, state, notes, config = _start(job, checkpointer, config)
    if writer is None:
      writer = writers.make_writer(root, resume_step=start)
    overview, table = _overview(job, root / "parameters.txt")
    if jax.process_index() == 0:
      _write_files(job, root, config.to_json_best_effort(indent=2), table)
    steps = range(start + 1, config.num_steps + 1)
    load = lambda step: job.train_batch(step - 1)
    with (
      contextlib.closing(writer),
      contextlib.closing(prefetch.ahead(load, steps)) as batches,
      processes.Stop() as stop,
      Progress(config.num_steps, start, processes.terminal()) as progress,
    ):
      writer.write_hparams(_hparams(config))
      for text in (job.task.description, _where(job), overview, *notes):
        progress.print(text)
      clock = _Clock(start)
      skips = _Skips(state, config.max_skipped_in_a_row, start)
      evaluation = {}
      for step, batch in zip(steps, batches, strict=True):
        state, metrics = job.train_step(state, batch)
        for text in skips.told(step, metrics):
          progress.print(text)
        stopped = stop.agreed(step)
        last = step == config.num_steps
        news, best_so_far = {}, False
        if last or step % config.log_every == 0:
          news = _floats(metrics)
          news["steps_per_second"] = clock.steps_per_second(step)
          writer.write_scalars(step, news)
        if last or step % config.eval_every == 0:
          evaluation = _evaluate(job, state)
          writer.write_scalars(step, evaluation)
          news |= evaluation
          best_so_far = checkpointer.is_best(evaluation)
        if news:
          progress.update(step, news)
        due = skips.allow(step % config.checkpoint_every == 0, metrics)
        if last:
          for text in skips.told(step + 1, {}):
            progress.print(text)
        if last or stopped or due or best_so_far:
          # A run that resumes here keeps the lines so far.
          writer.flush()
          checkpointer.save(
            step,
            state,
            config=config,
            metrics=_floats(metrics) | news,
          )
          skips.saved = step
        if stopped and not last:
          checkpointer.wait()
          progress.print(f"stopped at step {step}; the same command resumes")
          return evaluation
      evaluation = evaluation or _evaluate(job, state)
      report = job.report(state)
      if report:
        # As a code block, because writers take Markdown.
        code = textwrap.indent(report, " " * 4, lambda line: True)
        writer.write_texts(config.num_steps, {"report": code})
        progress.print(report)
      progress.print(_summary(max(start, config.num_steps), evaluation))
  _check_finite(evaluation, config.num_steps)
  return evaluation


def _check_apart(config: ConfigDict, root: Any) -> None:
  """Raises a UsageError if the run's own files are below the text it reads."""
  data = config.get("data")
  text = data.get("path") if data else None
  if not text:
    return
  full = lambda path: path if storage.is_bucket(path) else path.resolve()
  folder, run = full(storage.path(text)), full(root)
  if run.is_relative_to(folder) and not any(
    part.startswith(".") for part in run.relative_to(folder).parts
  ):
    raise UsageError(
      f"--workdir={root} is below config.data.path={text}, so the run would "
      "read its own files as text; take a --workdir outside"
    )


def _check_best(job: Job, best: str) -> None:
  """Raises a UsageError if no metric has the name by which to keep a step."""
  if not best:
    return
  metrics = jax.eval_shape(job.train_step, job.target, job.train_batch(0))[1]
  batch = next(iter(job.eval_batches()))
  names = [*metrics, *jax.eval_shape(job.eval_step, job.target, batch)]
  if best.removeprefix("-") not in names:
    raise UsageError(
      f"config.checkpoint_best={best!r} is the name of no metric; those of "
      f"this job are {', '.join(names)}"
    )


def _check_finite(evaluation: Mapping[str, float], step: int) -> None:
  """Raises a UsageError if a metric, a loss above all, is not finite."""
  for name, value in evaluation.items():
    if not np.isfinite(value):
      raise UsageError(
        f"{name} is {value} at step {step}: the run has diverged; take "
        "another --config.optimizer, or a smaller --config.learning_rate for "
        "one that is tuned, and another --workdir"
      )


def _check_files(job: Job, root: Any) -> None:
  """Checks that what the run keeps of its task is what the task has now."""
  for name, content in job.task.files.items():
    kept = root / name
    if kept.exists() and kept.read_bytes() != content:
      raise UsageError(
        f"{kept}, which this run was trained with, is another than the present "
        f"data and config make; type --config.data.{kept.stem}={kept}, or "
        "another --workdir"
      )


def _write_files(job: Job, root: Any, config: str, table: str) -> None:
  """Writes what a run keeps beside its metrics and checkpoints."""
  files.write(root / "config.json", f"{config}\n".encode())
  files.write(root / "parameters.txt", table.encode())
  for name, content in job.task.files.items():
    files.write(root / name, content)


def _start(
  job: Job, checkpointer: flax_mechanic.Checkpointer, config: ConfigDict
) -> tuple[int, nnx.State, Sequence[str], ConfigDict]:
  """Returns the step, the state and notes of a new or resumed run.

  Also returns the config to save: a resumed run's with where it once started.
  """
  if checkpointer.latest() is None and config.init_from:
    start = job.init_from(config.init_from, config.init_params_only)
    return 0, *start, config
  if checkpointer.latest() is None:
    return 0, job.create(), [], config
  restored = checkpointer.restore(job.target, config=config)
  notes = list(restored.damaged)
  notes += [f"resuming {checkpointer.directory} at step {restored.step}"]
  origin = {k: v for k, v in restored.changed.items() if k in _ORIGIN}
  notes += [
    f"config.{field} has no effect: the run resumes at step {restored.step}; "
    "to start from another run, take another --workdir"
    for field in [field for field, (_, new) in origin.items() if new][:1]
  ]
  config = config.copy_and_resolve_references()
  config.update({k: old for k, (old, _) in origin.items() if old is not None})
  unused = _unused(config)
  notes += [
    f"config.{field} was {old!r} and is now {new!r}"
    for field, (old, new) in restored.changed.items()
    if field not in origin and not field.startswith(unused)
  ]
  notes += [
    f"{name} was {old} when step {restored.step} was saved and is now {new}"
    for name, (old, new) in restored.versions.items()
  ]
  return restored.step, restored.state, notes, config


def _hparams(config: ConfigDict) -> dict[str, Any]:
  """Returns the config, flattened, with the options of the methods in use."""
  unused = _unused(config)
  return {
    field: value
    for field, value in record.flat_config(config).items()
    if not field.startswith(unused)
  }


def _unused(config: ConfigDict) -> tuple[str, ...]:
  """Returns how the fields of the methods that are not in use start."""
  used = [row.name for row in stack.resolve(config.optimizer, config.opt)]
  return tuple(f"opt.{name}." for name in config.opt if name not in used)


def _evaluate(job: Job, state: nnx.State) -> dict[str, float]:
  """Returns each metric's mean over the held-out batches."""
  batches = [
    _floats(job.eval_step(state, batch)) for batch in job.eval_batches()
  ]
  return {
    name: float(np.mean([batch[name] for batch in batches]))
    for name in batches[0]
  }


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
  return {name: float(value) for name, value in metrics.items()}


class _Skips:
  """Tells of skipped gradients, and ends a run of nothing else.

  Attributes:
    saved: the newest step that was saved, 0 for none.
  """

  def __init__(self, state: nnx.State, most: int, saved: int):
    """Reads what was skipped before the first step.

    Args:
      state: of the job.
      most: how many may be skipped in a row, 0 for any number. Those before
        the first step do not count.
      saved: the newest step that was saved, 0 for none.
    """
    self.saved = saved
    scalars = flax_mechanic.scalars(state["optimizer"]["opt_state"])
    self._skipped = int(scalars.get("skipped", 0))
    self._in_a_row = self._before = int(scalars.get("skipped_in_a_row", 0))
    self._most = most
    self._waits = False
    self._step_before: tuple[int, Mapping[str, jax.Array]] | None = None

  def told(self, step: int, metrics: Mapping[str, jax.Array]) -> Iterator[str]:
    """Yields sentences about the step before this one.

    This one is under way, and reading its metrics would wait for it.

    Raises:
      UsageError: too many were skipped in a row.
    """
    before, self._step_before = self._step_before, (step, metrics)
    step, metrics = before or (0, {})
    if "skipped" not in metrics:
      return
    self._in_a_row = in_a_row = int(metrics["skipped_in_a_row"])
    self._before = min(self._before, in_a_row)
    skipped = int(metrics["skipped"])
    if skipped == self._skipped:
      return
    self._skipped = skipped
    if in_a_row.bit_count() == 1:  # Of many in a row, ever fewer are told.
      row = f", {in_a_row} in a row" if in_a_row > 1 else ""
      yield (
        f"step {step}: skipped a gradient that is not finite or far larger "
        f"than usual ({skipped} so far{row})"
      )
    since = in_a_row - self._before
    if 0 < self._most <= since:
      again = (
        f"resumes at step {self.saved}; if the parameters were bad by then, "
        "take another --workdir"
        if self.saved
        else "starts again, since no checkpoint was saved"
      )
      raise UsageError(
        f"step {step}: the last {since} gradients were skipped, since they "
        "were not finite or far larger than usual, so the run cannot go on; "
        "look for what is wrong with the data or the loss, or take a smaller "
        f"--config.learning_rate, and the same command {again}"
      )

  def allow(self, due: bool, metrics: Mapping[str, jax.Array]) -> bool:
    """Whether a periodic save takes place after this step.

    One that is due in a row of skipped gradients waits for one that is
    accepted. Otherwise the steps that are kept would soon all be of that row.

    Args:
      due: whether one is due at this step, for whose metrics it then waits.
      metrics: of this step.
    """
    allowed = self._waits and self._in_a_row == 0
    if due and not allowed:
      allowed = int(metrics.get("skipped_in_a_row", 0)) == 0
    self._waits = (due or self._waits) and not allowed
    return allowed


class _Clock:
  """Measures the steps per second since the last call."""

  def __init__(self, step: int):
    self._last = (step, time.perf_counter())

  def steps_per_second(self, step: int) -> float:
    last_step, last_time = self._last
    self._last = (step, time.perf_counter())
    return (step - last_step) / (self._last[1] - last_time)


def _where(job: Job) -> str:
  """Returns what the job runs on, for the log."""
  devices = job.mesh.devices.flat
  sizes = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items())
  return (
    f"mesh: {sizes} ({len(devices)} of {devices[0].device_kind}, "
    f"{jax.process_count()} processes)"
  )


def _overview(job: Job, path: Any) -> tuple[str, str]:
  """Returns the table of parameters, short for the log and whole for a file."""
  params = nnx.to_pure_dict(nnx.filter_state(job.target["model"], nnx.Param))
  table = parameter_overview.get_parameter_overview(params, include_stats=False)
  *rows, total = table.splitlines()
  return (table if len(rows) <= 16 else f"{total} ({path})"), table + "\n"


def _summary(step: int, evaluation: Mapping[str, float]) -> str:
  values = ", ".join(f"{name} {v:.4g}" for name, v in evaluation.items())
  return f"done at step {step}: {values}"
