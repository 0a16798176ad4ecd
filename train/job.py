"""What a config describes, ready to run: create, step, evaluate."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

import flax_mechanic
from train.tasks import Batch, Task, make_task

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Job:
  """A job whose whole state is one pytree of arrays.

  Attributes:
    task: data, model and loss.
    graphdef: what turns a state back into a model and its optimizer.
    target: the state's shapes and dtypes, nothing allocated.
    create: () -> state, compiled.
    train_step: (state, batch) -> (state, metrics), compiled, donates its state.
    eval_step: (state, batch) -> metrics, compiled.
  """

  task: Task
  graphdef: nnx.GraphDef
  target: nnx.State
  create: Callable[[], nnx.State]
  train_step: Callable[[nnx.State, Batch], tuple[nnx.State, Metrics]]
  eval_step: Callable[[nnx.State, Batch], Metrics]

  def eval_model(self, state: nnx.State) -> nnx.Module:
    """Returns the model to evaluate, in evaluation mode."""
    return _eval_model(self.graphdef, state)


def make_job(config: ConfigDict) -> Job:
  """Builds the job that a config describes; loads its data, compiles nothing.

  Raises:
    UsageError: a value in the config is out of range.
  """
  schedule = flax_mechanic.make_schedule(
    config.schedule.name or flax_mechanic.own_schedule(config),
    config.num_steps // config.accumulate_steps,
    config.schedule.warmup_steps,
  )
  tx = flax_mechanic.make_optimizer(config, schedule)
  task = make_task(config)

  def create() -> dict[str, Any]:
    model = task.create_model(nnx.Rngs(config.seed))
    # Drawn in float32 and cast: jax.random.normal in bfloat16 takes 8 random
    # bits, and its draws have a mean of -0.01 (jax 0.12).
    params = nnx.state(model, nnx.Param)
    nnx.update(
      model, jax.tree.map(lambda x: x.astype(config.param_dtype), params)
    )
    return {"model": model, "optimizer": flax_mechanic.Optimizer(model, tx)}

  graphdef, target = nnx.split(nnx.eval_shape(create))
  return Job(
    task=task,
    graphdef=graphdef,
    target=target,
    create=jax.jit(lambda: nnx.state(create())),
    train_step=jax.jit(
      functools.partial(_train_step, task, graphdef), donate_argnums=0
    ),
    eval_step=jax.jit(functools.partial(_eval_step, task, graphdef)),
  )


def _train_step(
  task: Task,
  graphdef: nnx.GraphDef,
  state: nnx.State,
  batch: Mapping[str, jax.Array],
) -> tuple[nnx.State, Metrics]:
  objects = nnx.merge(graphdef, state)
  optimizer = objects["optimizer"]
  loss, metrics = optimizer.minimize(
    objects["model"], task.loss, batch, has_aux=True
  )
  metrics = _prefixed("train", {"loss": loss, **metrics})
  metrics |= flax_mechanic.scalars(optimizer.opt_state)
  return nnx.state(objects), metrics


def _eval_step(
  task: Task,
  graphdef: nnx.GraphDef,
  state: nnx.State,
  batch: Mapping[str, jax.Array],
) -> Metrics:
  loss, metrics = task.loss(_eval_model(graphdef, state), batch)
  return _prefixed("eval", {"loss": loss, **metrics})


def _eval_model(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.Module:
  objects = nnx.merge(graphdef, state)
  model = objects["optimizer"].eval_model(objects["model"])
  model.eval()
  return model


def _prefixed(prefix: str, metrics: Mapping[str, jax.Array]) -> Metrics:
  return {f"{prefix}/{name}": value for name, value in metrics.items()}
