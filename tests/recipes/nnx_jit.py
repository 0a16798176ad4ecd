"""An NNX job on one device, with `nnx.Optimizer` and `nnx.jit`."""

import functools

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from tests import network


def get_config():
  config = ConfigDict()
  config.learning_rate = 0.03
  config.weight_decay = 0.01
  config.warmup_steps = 5
  config.num_steps = 30
  config.checkpoint_every = 20
  return config


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(8, 16, rngs=rngs)
    self.head = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, inputs):
    return self.head(nnx.tanh(self.hidden(inputs)))


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, config.warmup_steps, config.num_steps
  )
  return optax.adamw(schedule, weight_decay=config.weight_decay)


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model, optimizer, inputs, targets):
  def loss_fn(model):
    return jnp.mean((model(inputs) - targets) ** 2)

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  model = Mlp(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, make_tx(config), wrt=nnx.Param)
  checkpointer = ocp.StandardCheckpointer()
  path = workdir / "state"
  if path.exists():
    target = nnx.state((model, optimizer))
    nnx.update((model, optimizer), checkpointer.restore(path, target))
  yield None, nnx.state((model, optimizer))
  for step in range(int(optimizer.step[...]), config.num_steps):
    loss = train_step(model, optimizer, *network.batch(step))
    if step + 1 == config.checkpoint_every:
      checkpointer.save(path, nnx.state((model, optimizer)))
      checkpointer.wait_until_finished()
    yield loss, nnx.state((model, optimizer))
