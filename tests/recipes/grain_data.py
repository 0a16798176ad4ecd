"""A job with a grain pipeline of its own, whose position is in the checkpoint.

The position is that of the whole job, in examples, and not one process's: a run
resumes with the batches that it would have seen on any number of processes.
"""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mechanic

BATCH = 8


def examples(seed):
  """Any source with random access: files, ArrayRecord, arrays."""
  inputs = np.random.default_rng(0).standard_normal((100, 4), np.float32)
  source = [{"x": x, "y": x.sum(keepdims=True)} for x in inputs]
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


class Batches:
  """This process's rows of the job's batches."""

  def __init__(self, seed, start=0, index=None, count=None):
    """Starts after the job's first `start` examples."""
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    rows = examples(seed)[start + index :: count].batch(BATCH // count)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    self._start = start
    self._iterator = iter(rows.to_iter_dataset(options))

  def __next__(self):
    return next(self._iterator)

  @property
  def position(self):
    """How many examples the whole job has seen."""
    return self._start + BATCH * self._iterator.get_state()["next_index"]


def loss_fn(model, batch):
  return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@nnx.jit
def train_step(model, optimizer, batch):
  return optimizer.minimize(model, loss_fn, batch)


def train(directory, num_steps, save_every, seed=0):
  """Trains from the newest checkpoint; returns each step's loss."""
  mesh = Mesh(jax.devices(), ("data",))
  over_data = NamedSharding(mesh, P("data"))
  with (
    jax.set_mesh(mesh),
    flax_mechanic.Checkpointer(directory) as checkpointer,
  ):
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(seed))
    tx = flax_mechanic.mechanize(optax.adamw(1.0))
    optimizer = flax_mechanic.Optimizer(model, tx, wrt=nnx.Param)
    objects = {"model": model, "optimizer": optimizer}
    step, position = 0, 0
    if checkpointer.latest() is not None:
      restored = checkpointer.restore(nnx.state(objects))
      nnx.update(objects, restored.state)
      step, position = restored.step, restored.data["examples"]
    batches = Batches(seed, position)
    losses = []
    while step < num_steps:
      batch = jax.make_array_from_process_local_data(over_data, next(batches))
      losses.append(float(train_step(model, optimizer, batch)))
      step += 1
      if step % save_every == 0:
        data = {"examples": batches.position}
        checkpointer.save(step, nnx.state(objects), data=data)
  return losses
