"""An NNX job on a mesh with explicit axes, its state donated."""

import functools

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tests import network


def get_config():
  config = ConfigDict()
  config.learning_rate = 0.03
  config.weight_decay = 0.01
  config.warmup_steps = 5
  config.num_steps = 30
  config.checkpoint_every = 20
  config.mesh = (4, 2)
  return config


class Mlp(nnx.Module):
  """Its hidden layer is split over the model axis."""

  def __init__(self, rngs):
    init = nnx.initializers
    columns = nnx.with_partitioning(init.lecun_normal(), (None, "model"))
    rows = nnx.with_partitioning(init.lecun_normal(), ("model", None))
    shares = nnx.with_partitioning(init.zeros, ("model",))
    self.hidden = nnx.Linear(
      8, 16, kernel_init=columns, bias_init=shares, rngs=rngs
    )
    self.head = nnx.Linear(16, 1, kernel_init=rows, rngs=rngs)

  def __call__(self, inputs):
    hidden = self.hidden(inputs, out_sharding=P("data", "model"))
    return self.head(nnx.tanh(hidden), out_sharding=P("data"))


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, config.warmup_steps, config.num_steps
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, weight_decay=config.weight_decay),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(graphdef, state, inputs, targets):
  model, optimizer = nnx.merge(graphdef, state)

  def loss_fn(model):
    return jnp.mean((model(inputs) - targets) ** 2)

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return nnx.state((model, optimizer)), loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  checkpoints = ocp.CheckpointManager(workdir)
  with jax.set_mesh(jax.make_mesh(config.mesh, ("data", "model"))):
    model = Mlp(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_tx(config), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    first = checkpoints.latest_step() or 0
    if first:
      state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
    yield None, state
    for step in range(first, config.num_steps):
      batch = jax.device_put(network.batch(step), P("data"))
      state, loss = train_step(graphdef, state, *batch)
      if step + 1 == config.checkpoint_every:
        checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
        checkpoints.wait_until_finished()
      yield loss, state
