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


@dataclasses.dataclass(frozen=True)
class Job:
  """A job whose whole state is one pytree of arrays.

  Its functions are to be called with `jax.set_mesh(job.mesh)`.

  Attributes:
    task: data, model and loss.
    batch_size: examples a step, over all processes.
    mesh: the devices of every process.
    graphdef: what turns a state back into a model and its optimizer.
    target: the state's shapes, dtypes and shardings, nothing allocated.
    create: () -> state, compiled; each array is made where it lies.
    train_step: (state, batch) -> (state, metrics), compiled, donates its state.
    eval_step: (state, batch) -> metrics, compiled.
  """

  task: Task
  batch_size: int
  mesh: Mesh
  graphdef: nnx.GraphDef
  target: nnx.State
  create: Callable[[], nnx.State]
  train_step: Callable[[nnx.State, Batch], tuple[nnx.State, Metrics]]
  eval_step: Callable[[nnx.State, Batch], Metrics]

  def init_from(
    self, directory: str, params_only: bool
  ) -> tuple[nnx.State, Sequence[str]]:
    """Returns a new state that starts where another run's checkpoint ended.

    With it come sentences on what was taken and what starts afresh.
    """
    objects = nnx.merge(self.graphdef, self.create())
    notes = objects["optimizer"].init_from(
      objects["model"], directory, params_only=params_only
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.target)
    return jax.device_put(nnx.state(objects), shardings), notes

  def train_batch(self, step: int) -> Batch:
    """Returns the batch of a step, from 0, on the mesh."""
    load = functools.partial(self.task.train_batch, step)
    return mesh_lib.spread(load, self.batch_size, self.mesh)

  def batch_target(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns a batch's shapes, dtypes and shardings, nothing allocated."""
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

    To be called, and the model as well, under `jax.set_mesh` of `automatic`.
    """
    shardings = jax.tree.map(
      lambda leaf: NamedSharding(self.automatic, leaf.sharding.spec),
      self.target,
    )
    return _eval_model(self.graphdef, jax.device_put(state, shardings))

  def report(self, state: nnx.State) -> str:
    """Returns what the task shows at the end of a run."""
    with jax.set_mesh(self.automatic):
      return self.task.report(self.eval_model(state))

  @property
  def automatic(self) -> Mesh:
    """The mesh as models see it, which do not type their results."""
    return _automatic(self.mesh)


def make_job(
  config: ConfigDict,
  devices: Sequence[Any] | None = None,
  tx: optax.GradientTransformation | None = None,
) -> Job:
  """Builds the job that a config describes; loads its data, compiles nothing.

  Args:
    config: as `configs.default` describes it.
    devices: to run on, all by default.
    tx: the optimizer, by default the config's.

  Raises:
    UsageError: a value in the config is out of range.
  """
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.batch_size % parts:
    raise UsageError(
      f"config.batch_size={config.batch_size} must be a multiple of {parts}, "
      "the devices over which config.mesh.data and .fsdp split it"
    )
  tx = tx or flax_mechanic.make_optimizer(config, make_schedule(config))
  task = make_task(config)
  create = functools.partial(create_objects, task, config, tx, config.seed)

  with jax.set_mesh(_automatic(mesh)):
    objects = nnx.eval_shape(create)
  graphdef, state = nnx.split(objects)
  shardings = _shardings(objects, state, mesh)
  specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

  def compiled(function: Callable, out: Any, **options: Any) -> Any:
    if AxisType.Explicit in mesh.axis_types:
      function = jax.sharding.auto_axes(
        function, axes=mesh.axis_names, out_sharding=out
      )
    return jax.jit(function, **options)

  return Job(
    task=task,
    batch_size=config.batch_size,
    mesh=mesh,
    graphdef=graphdef,
    target=jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      state,
      shardings,
    ),
    create=compiled(
      lambda: nnx.state(create()), specs, out_shardings=shardings
    ),
    train_step=compiled(
      functools.partial(train_step, task, graphdef),
      (specs, P()),
      donate_argnums=0,
      out_shardings=(shardings, None),
    ),
    eval_step=compiled(functools.partial(eval_step, task, graphdef), P()),
  )


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """Returns the shape, with peak 1, of the config's learning rate."""
  return flax_mechanic.make_schedule(
    config.schedule.name or flax_mechanic.own_schedule(config),
    config.num_steps // config.accumulate_steps,
    config.schedule.warmup_steps,
  )


def create_objects(
  task: Task,
  config: ConfigDict,
  tx: optax.GradientTransformation,
  seed: jax.typing.ArrayLike,
) -> dict[str, Any]:
  """Returns a new model and its optimizer.

  Args:
    task: whose model it is.
    config: as `configs.default` describes it; its seed is not read.
    tx: the optimizer.
    seed: of the parameters.
  """
  model = task.create_model(nnx.Rngs(jax.random.key(seed)))
  mesh_lib.annotate(model)
  # Drawn in float32 and cast: jax.random.normal in bfloat16 takes 8 random
  # bits, and its draws have a mean of -0.01 (jax 0.12).
  params = nnx.state(model, nnx.Param)
  nnx.update(
    model, jax.tree.map(lambda x: x.astype(config.param_dtype), params)
  )
  optimizer = flax_mechanic.Optimizer(
    model,
    tx,
    shard_over=("data", "fsdp") if config.shard_optimizer_state else (),
    offload=config.offload_optimizer_state,
  )
  return {"model": model, "optimizer": optimizer}


def train_step(
  task: Task,
  graphdef: nnx.GraphDef,
  state: nnx.State,
  batch: Batch,
  tx: optax.GradientTransformation | None = None,
) -> tuple[nnx.State, Metrics]:
  """Returns the state after a step, and what was measured.

  Args:
    task: whose loss it is.
    graphdef: of the state.
    state: of what `create_objects` returns.
    batch: on the mesh.
    tx: in place of the one in `graphdef`; one with the same state.
  """
  objects = nnx.merge(graphdef, state)
  optimizer = objects["optimizer"]
  optimizer.tx = tx or optimizer.tx
  loss, metrics = optimizer.minimize(
    objects["model"], task.loss, batch, has_aux=True
  )
  metrics = _prefixed("train", {"loss": loss, **metrics})
  metrics |= flax_mechanic.scalars(optimizer.opt_state)
  return nnx.state(objects), metrics


def eval_step(
  task: Task,
  graphdef: nnx.GraphDef,
  state: nnx.State,
  batch: Batch,
) -> Metrics:
  """Returns what is measured on a held-out batch."""
  loss, metrics = task.loss(_eval_model(graphdef, state), batch)
  return _prefixed("eval", {"loss": loss, **metrics})


def _eval_model(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.Module:
  objects = nnx.merge(graphdef, state)
  model = objects["optimizer"].eval_model(objects["model"])
  model.eval()
  return model


def _prefixed(prefix: str, metrics: Mapping[str, jax.Array]) -> Metrics:
  return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _automatic(mesh: Mesh) -> Mesh:
  """Returns the mesh as models see it, which do not type their results."""
  return Mesh(mesh.devices, mesh.axis_names)


def _shardings(
  objects: Mapping[str, Any], state: nnx.State, mesh: Mesh
) -> nnx.State:
  """Returns where each leaf of the job's state lies."""
  optimizer = objects["optimizer"]
  of = {"model": optimizer.shardings, "optimizer": optimizer.state_shardings}

  def sharding(offloaded: bool, lies: NamedSharding | None) -> NamedSharding:
    on_device = NamedSharding(mesh, lies.spec if lies else P())
    return on_device.with_memory_kind(HOST) if offloaded else on_device

  return nnx.State(
    {
      name: jax.tree.map(
        sharding, of[name].offloaded(part), of[name].of_state(part)
      )
      for name, part in state.raw_mapping.items()
    }
  )
