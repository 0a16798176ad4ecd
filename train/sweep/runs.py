"""Runs of a job that differ in learning rate and seed, as one program."""

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import flax_mechanic
from train import job as job_lib
from train import mesh as mesh_lib
from train.tasks import Task, make_task

# The result of a run: "step", "train/loss", "validation/loss", ...
Row = dict[str, Any]
# The learning rate, or that of each leaf, and the seed.
Run = tuple[float | Sequence[float], int]

# Batches of the training split in an evaluation.
_TRAIN_BATCHES = 8


def pool() -> concurrent.futures.ThreadPoolExecutor:
  """Returns threads, each for a program at a time.

  They are as many as there are CPU cores; an accelerator trains one program at
  a time.
  """
  is_cpu = jax.default_backend() == "cpu"
  return concurrent.futures.ThreadPoolExecutor(os.cpu_count() if is_cpu else 1)


class Runs:
  """Trains a job with several learning rates and seeds at once.

  A run is the job as `train.main` runs it on one device: its batches, steps and
  parameters are those of its seed. The learning rate, the seed and the schedule
  are arguments of the compiled program, so one program serves every length.

  A job with `config.init_from` starts from that run's parameters, except LoRA's
  and without its optimizer's state, as with `config.init_params_only`.

  The held-out examples are split in two: every second one, from the first on,
  is for tuning ("validation/"), and the others are for reporting ("test/").
  """

  def __init__(
    self,
    config: ConfigDict,
    tasks: Sequence[Task],
    max_steps: int,
    at_once: int = 0,
  ):
    """Prepares; compiles nothing.

    Args:
      config: as `configs.default` describes it; neither its seed nor its
        learning rate is read.
      tasks: the job's task with each seed, from 0 (see `make_tasks`).
      max_steps: length of the longest run.
      at_once: how many runs are vectorized at a time; 0 for all.
    """
    self._config = config.copy_and_resolve_references()
    self._config.learning_rate = 1.0
    self._tasks = tasks
    self._max_steps = max_steps
    self._mesh = mesh_lib.one_device()
    task = tasks[0]

    def functions(
      rate: jax.typing.ArrayLike, shape: jax.Array
    ) -> job_lib.Functions:
      tx = self._optimizer(rate, shape)
      return job_lib.Functions(task, self._config, tx)

    def create(
      run: tuple[jax.Array, jax.Array], shape: jax.Array, start: Any
    ) -> nnx.State:
      rate, seed = run
      return functions(rate, shape).create(seed, start)

    def start() -> Any:
      """Returns the parameters, and batch statistics, of config.init_from."""
      if not self._config.init_from:
        return None
      model = functions(1.0, jnp.ones(max_steps)).abstract["model"]
      saved = nnx.state(model, nnx.Not(nnx.Any(nnx.RngState, nnx.LoRAParam)))
      placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=NamedSharding(self._mesh, P())
        ),
        nnx.as_pure(saved),
      )
      return flax_mechanic.load_params(self._config.init_from, placed)

    def train(
      state: nnx.State,
      run: tuple[jax.Array, jax.Array],
      shape: jax.Array,
      batches: job_lib.Batch,
    ) -> tuple[nnx.State, job_lib.Metrics]:
      rate, seed = run
      own = jax.tree.map(lambda each: each[seed], batches)
      step = functions(rate, shape).train_step
      state, measured = jax.lax.scan(step, state, own)
      return state, jax.tree.map(lambda values: values[-1], measured)

    def evaluate(state: nnx.State, batch: job_lib.Batch) -> job_lib.Metrics:
      return functions(1.0, jnp.ones(max_steps)).eval_step(state, batch)

    def over_runs(function: Callable, count: int) -> Callable:
      """Maps a function over the runs of its first `count` arguments."""

      def mapped(*arguments: Any) -> Any:
        one = lambda run: function(*run, *arguments[count:])
        if at_once == 0:
          return jax.vmap(one)(arguments[:count])
        # With a batch size of 1, lax.map would vectorize over that one.
        size = at_once if at_once > 1 else None
        return jax.lax.map(one, arguments[:count], batch_size=size)

      return mapped

    self._start = start
    self._create = jax.jit(over_runs(create, 1))
    self._train = jax.jit(over_runs(train, 2), donate_argnums=0)
    self._evaluate = jax.jit(over_runs(evaluate, 1))

  def train(
    self,
    runs: Sequence[Run],
    num_steps: int,
    evaluate_every: int,
    call_every: int,
  ) -> Iterator[list[Row]]:
    """Trains from the start.

    Args:
      runs: the learning rate and seed of each. For an optimizer that learns its
        learning rate, it is the learning rate of the base, a factor of what is
        learned.
      num_steps: of each run; the job's schedule is stretched to that.
      evaluate_every: steps between evaluations; the last step is evaluated too.
      call_every: largest number of steps in a call of the compiled program.

    Yields:
      At each evaluation, of which the first is before the first step, a row for
      each run: "learning_rate", "seed", "step" and what was measured, with None
      for values that are not finite.
    """
    shape = self._shape(num_steps)
    rates = jnp.asarray([rate for rate, _ in runs], jnp.float32)
    seeds = jnp.asarray([seed for _, seed in runs], jnp.int32)
    with jax.set_mesh(self._mesh):
      state = self._create((rates, seeds), shape, self._start())
      yield _rows(runs, 0, jax.device_get(self._splits(state)))
      step = 0
      while step < num_steps:
        until = min(step - step % evaluate_every + evaluate_every, num_steps)
        count = min(call_every, until - step)
        batches = self._batches(step, count)
        state, measured = self._train(state, (rates, seeds), shape, batches)
        step += count
        if step == until:
          measured = _without(measured, "train/") | self._splits(state)
          yield _rows(runs, step, jax.device_get(measured))

  def _optimizer(
    self, rate: jax.typing.ArrayLike, shape: jax.Array
  ) -> optax.GradientTransformation:
    """Returns the job's optimizer; `shape` is its schedule, of each step."""
    return flax_mechanic.make_optimizer(
      self._config, lambda count: rate * shape[count]
    )

  def _shape(self, num_steps: int) -> jax.Array:
    """Returns the schedule of a run of that length, as an array [max_steps]."""
    config = self._config.copy_and_resolve_references()
    config.num_steps = num_steps
    warmup = self._config.schedule.warmup_steps / self._config.num_steps
    config.schedule.warmup_steps = round(warmup * num_steps)
    schedule = job_lib.make_schedule(config)
    return jnp.asarray(jax.vmap(schedule)(jnp.arange(self._max_steps)))

  def _batches(self, step: int, count: int) -> job_lib.Batch:
    """Returns arrays [seeds, count, batch, ...]."""
    return stacked(
      stacked(task.train_batch(i) for i in range(step, step + count))
      for task in self._tasks
    )

  def _splits(self, state: nnx.State) -> job_lib.Metrics:
    task = self._tasks[0]
    held_out = list(task.eval_batches())
    every_second = lambda start: [
      jax.tree.map(lambda array: array[start::2], batch) for batch in held_out
    ]
    splits = {
      "train": [task.train_batch(i) for i in range(_TRAIN_BATCHES)],
      "validation": every_second(0),
      "test": every_second(1),
    }
    found = {}
    for split, batches in splits.items():
      each = [self._evaluate(state, batch) for batch in batches]
      mean = jax.tree.map(lambda *values: sum(values) / len(values), *each)
      found |= {
        name.replace("eval/", f"{split}/"): value
        for name, value in mean.items()
      }
    return found


def make_tasks(config: ConfigDict, seeds: int) -> Sequence[Task]:
  """Returns a job's task with each seed, from 0."""
  tasks = []
  for seed in range(seeds):
    seeded = config.copy_and_resolve_references()
    seeded.seed = seed
    tasks.append(make_task(seeded))
  return tasks


def stacked(trees: Iterable[Any]) -> Any:
  """Returns a tree of NumPy's arrays, with a first axis over the trees."""
  return jax.tree.map(lambda *each: np.stack(each), *trees)


def _without(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  return {k: v for k, v in metrics.items() if not k.startswith(prefix)}


def _rows(
  runs: Sequence[Run], step: int, measured: Mapping[str, np.ndarray]
) -> list[Row]:
  rows: list[Row] = []
  for i, (rate, seed) in enumerate(runs):
    values = {name: float(value[i]) for name, value in measured.items()}
    rows.append(
      {"learning_rate": rate, "seed": seed, "step": step}
      | {k: v if np.isfinite(v) else None for k, v in values.items()}
    )
  return rows
