"""What a config describes, ready to run: create, step, evaluate."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic.errors import UsageError
from flax_mechanic.placement import HOST
from train import mesh as mesh_lib
from train.tasks import Task, make_task

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class Functions:
  """A job's pure functions: for `jit` here, for `vmap` and `scan` in a sweep.

  To be created and called with the job's mesh set, on automatic axes.

  Attributes:
    task: the data, the model and the loss.
    config: the job's.
    abstract: the model and its optimizer, shapes instead of arrays.
    graphdef: what turns a state back into a model and its optimizer.
  """

  def __init__(
    self, task: Task, config: ConfigDict, tx: optax.GradientTransformation
  ):
    """Traces the job's creation.

    Args:
      task: the data, the model and the loss.
      config: as `configs.default` describes it; its seed is not read.
      tx: the optimizer; a traced learning rate may be part of it.
    """
    self.task = task
    self.config = config
    self._tx = tx
    self.abstract = nnx.eval_shape(lambda: self._create_objects(0))
    self.graphdef = nnx.graphdef(self.abstract)

  def create(self, seed: jax.typing.ArrayLike, start: Any = None) -> nnx.State:
    """Returns the state of a new model and its optimizer.

    Args:
      seed: of the parameters and of the model's random state.
      start: a pytree of arrays by path that take the place of the new model's;
        None for none.
    """
    return nnx.state(self._create_objects(seed, start))

  def train_step(
    self, state: nnx.State, batch: Batch
  ) -> tuple[nnx.State, Metrics]:
    """Returns the state after a step, and what was measured."""
    objects = nnx.merge(self.graphdef, state)
    optimizer = objects["optimizer"]
    loss, metrics = optimizer.minimize(
      objects["model"], self.task.loss, batch, has_aux=True
    )
    metrics = _prefixed("train", {"loss": loss, **metrics})
    metrics |= flax_mechanic.scalars(optimizer.opt_state)
    return nnx.state(objects), metrics

  def eval_step(self, state: nnx.State, batch: Batch) -> Metrics:
    """Returns what is measured on a held-out batch."""
    loss, metrics = self.task.loss(self.eval_model(state), batch)
    return _prefixed("eval", {"loss": loss, **metrics})

  def eval_model(self, state: nnx.State) -> nnx.Module:
    """Returns the model to evaluate and export."""
    objects = nnx.merge(self.graphdef, state)
    model = objects["optimizer"].eval_model(objects["model"])
    model.eval()
    return model

  def _create_objects(
    self, seed: jax.typing.ArrayLike, start: Any = None
  ) -> dict[str, Any]:
    config = self.config
    model = self.task.create_model(nnx.Rngs(jax.random.key(seed)))
    if start is not None:
      nnx.update(model, start)
    mesh_lib.annotate(model)
    # Drawn in float32 and cast: jax.random.normal in bfloat16 takes 8 random
    # bits, and its draws have a mean of -0.01 (jax 0.12).
    params = nnx.state(model, nnx.Param)
    nnx.update(
      model, jax.tree.map(lambda x: x.astype(config.param_dtype), params)
    )
    optimizer = flax_mechanic.Optimizer(
      model,
      self._tx,
      shard_over=("data", "fsdp") if config.shard_optimizer_state else (),
      offload=config.offload_optimizer_state,
    )
    return {"model": model, "optimizer": optimizer}


@dataclasses.dataclass(frozen=True)
class Job:
  """A job whose whole state is one pytree of arrays.

  Its functions are to be called with `jax.set_mesh(job.mesh)`.

  Attributes:
    functions: the job's pure functions; those below are compiled from them.
    batch_size: examples a step, over all processes.
    mesh: the devices of every process.
    target: the state's shapes, dtypes and shardings; nothing is allocated.
    create: () -> state, compiled; each array is created where it is placed.
    train_step: (state, batch) -> (state, metrics), compiled, donates its state.
    eval_step: (state, batch) -> metrics, compiled.
  """

  functions: Functions
  batch_size: int
  mesh: Mesh
  target: nnx.State
  create: Callable[[], nnx.State]
  train_step: Callable[[nnx.State, Batch], tuple[nnx.State, Metrics]]
  eval_step: Callable[[nnx.State, Batch], Metrics]

  @property
  def task(self) -> Task:
    """The data, the model and the loss."""
    return self.functions.task

  @property
  def automatic(self) -> Mesh:
    """The mesh with automatic axes, as models see it."""
    return _automatic(self.mesh)

  def init_from(
    self, directory: str, params_only: bool
  ) -> tuple[nnx.State, Sequence[str]]:
    """Returns a new state that starts where another run's checkpoint ended.

    Also returns notes on what was taken over and what restarts.
    """
    objects = nnx.merge(self.functions.graphdef, self.create())
    notes = objects["optimizer"].init_from(
      objects["model"],
      directory,
      params_only=params_only,
      config=self.functions.config,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.target)
    return jax.device_put(nnx.state(objects), shardings), notes

  def train_batch(self, step: int) -> Batch:
    """Returns the batch of a step, from 0, on the mesh."""
    load = functools.partial(self.task.train_batch, step)
    return mesh_lib.spread(load, self.batch_size, self.mesh)

  def batch_target(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns a batch's shapes, dtypes and shardings; allocates nothing."""
    one = self.task.train_batch(0, slice(1))
    sharding = mesh_lib.batch_sharding(self.batch_size, self.mesh)
    return {
      name: jax.ShapeDtypeStruct(
        (self.batch_size, *array.shape[1:]), array.dtype, sharding=sharding
      )
      for name, array in one.items()
    }

  def eval_batches(self) -> Iterator[Batch]:
    """Yields the held-out batches, on the mesh."""
    for batch in self.task.eval_batches():
      load = lambda rows, batch=batch: {k: v[rows] for k, v in batch.items()}
      size = len(next(iter(batch.values())))
      yield mesh_lib.spread(load, size, self.mesh)

  def eval_model(self, state: nnx.State) -> nnx.Module:
    """Returns the model to evaluate and export, on automatic axes.

    Call it, and the model it returns, under `jax.set_mesh(job.automatic)`.
    """
    shardings = jax.tree.map(
      lambda leaf: NamedSharding(self.automatic, leaf.sharding.spec),
      self.target,
    )
    return self.functions.eval_model(jax.device_put(state, shardings))

  def report(self, state: nnx.State) -> str:
    """Returns what the task shows at the end of a run."""
    with jax.set_mesh(self.automatic):
      return self.task.report(self.eval_model(state))


def make_job(config: ConfigDict, devices: Sequence[Any] | None = None) -> Job:
  """Builds the job that a config describes; loads its data, compiles nothing.

  Args:
    config: as `configs.default` describes it.
    devices: to run on, all by default.

  Raises:
    UsageError: a value in the config is out of range.
  """
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.batch_size % parts:
    raise UsageError(
      f"config.batch_size={config.batch_size} must be a multiple of {parts}, "
      "the number of devices that config.mesh.data and .fsdp split it over"
    )
  tx = flax_mechanic.make_optimizer(config, make_schedule(config))
  task = make_task(config)
  with jax.set_mesh(_automatic(mesh)):
    functions = Functions(task, config, tx)
  state = nnx.state(functions.abstract)
  shardings = _shardings(functions.abstract["optimizer"], state, mesh)
  specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

  def compiled(function: Callable, out: Any, **options: Any) -> Any:
    if AxisType.Explicit in mesh.axis_types:
      function = jax.sharding.auto_axes(
        function, axes=mesh.axis_names, out_sharding=out
      )
    return jax.jit(function, **options)

  return Job(
    functions=functions,
    batch_size=config.batch_size,
    mesh=mesh,
    target=jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      state,
      shardings,
    ),
    create=compiled(
      lambda: functions.create(config.seed), specs, out_shardings=shardings
    ),
    train_step=compiled(
      functions.train_step,
      (specs, P()),
      donate_argnums=0,
      out_shardings=(shardings, None),
    ),
    eval_step=compiled(functions.eval_step, P()),
  )


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """Returns the config's schedule, scaled to a peak of 1."""
  return flax_mechanic.make_schedule(
    config.schedule.name or flax_mechanic.own_schedule(config),
    config.num_steps // config.accumulate_steps,
    config.schedule.warmup_steps,
  )


def _prefixed(prefix: str, metrics: Mapping[str, jax.Array]) -> Metrics:
  return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _automatic(mesh: Mesh) -> Mesh:
  """Returns the mesh with automatic axes, as models see it."""
  return Mesh(mesh.devices, mesh.axis_names)


def _shardings(
  optimizer: flax_mechanic.Optimizer, state: nnx.State, mesh: Mesh
) -> nnx.State:
  """Returns where each leaf of the job's state is placed."""
  of = {"model": optimizer.shardings, "optimizer": optimizer.state_shardings}

  def sharding(offloaded: bool, known: NamedSharding | None) -> NamedSharding:
    on_device = NamedSharding(mesh, known.spec if known else P())
    return on_device.with_memory_kind(HOST) if offloaded else on_device

  return nnx.State(
    {
      name: jax.tree.map(
        sharding, of[name].offloaded(part), of[name].of_state(part)
      )
      for name, part in state.raw_mapping.items()
    }
  )
