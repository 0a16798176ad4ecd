"""An NNX transformer on a mesh with explicit axes, its state donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.learning_rate = 1 / 32
  config.weight_decay = 0.01
  config.batch_size = 16
  config.warmup_steps = 4
  config.num_steps = 30
  config.checkpoint_every = 20
  config.devices = 8
  return config


def linear(inputs, outputs, spec, rngs):
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
  return nnx.Linear(
    inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs
  )


class Transformer(nnx.Module):
  """One block, whose heads and hidden units are split over the model axis."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(8, 16, rngs=rngs)
    self.norms = nnx.List([nnx.RMSNorm(16, rngs=rngs) for _ in range(3)])
    self.attend = linear(16, 3 * 16, (None, "model"), rngs)
    self.project = linear(16, 16, ("model", None), rngs)
    self.wide = linear(16, 32, (None, "model"), rngs)
    self.narrow = linear(32, 16, ("model", None), rngs)
    self.head = nnx.Linear(16, 8, rngs=rngs)
    self.dropout = nnx.Dropout(0.1)

  def __call__(self, tokens, rngs):
    rows, split = P("data"), P("data", None, "model")
    first, second, last = self.norms
    x = self.embed(tokens, out_sharding=rows)
    heads = self.attend(first(x), out_sharding=split)
    heads = heads.reshape(*tokens.shape, 2, 3, 8, out_sharding=split)
    query, key, value = (heads[:, :, :, i] for i in range(3))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    mixed = mixed.reshape(x.shape, out_sharding=split)
    x += self.project(mixed, out_sharding=rows)
    hidden = nnx.gelu(self.wide(second(x), out_sharding=split))
    x += self.narrow(hidden, out_sharding=rows)
    x = self.dropout(last(x), rngs=rngs)
    return self.head(x, out_sharding=rows)


def batch(step, size):
  """Returns inputs and targets [size, 8], of tokens that count up."""
  starts = np.random.default_rng(step).integers(8, size=(size, 1))
  tokens = ((starts + np.arange(9)) % 8).astype(np.int32)
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, config.warmup_steps, config.num_steps
  )
  return optax.adamw(schedule, weight_decay=config.weight_decay)


def loss_fn(model, batch, rngs):
  logits = model(batch["inputs"], rngs)
  chosen = batch["targets"][..., None] == jnp.arange(8)
  return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * chosen, axis=-1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(graphdef, state, batch):
  job = model, optimizer, rngs = nnx.merge(graphdef, state)
  loss, grads = nnx.value_and_grad(loss_fn)(model, batch, rngs)
  optimizer.update(model, grads)
  return nnx.state(job), loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  checkpoints = ocp.CheckpointManager(workdir)
  columns = min(2, config.devices)
  shape = (config.devices // columns, columns)
  with jax.set_mesh(jax.make_mesh(shape, ("data", "model"))):
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_tx(config), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer, nnx.Rngs(1)))
    first = checkpoints.latest_step() or 0
    if first:
      state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
    yield None, state
    for step in range(first, config.num_steps):
      examples = jax.device_put(batch(step, config.batch_size), P("data"))
      state, loss = train_step(graphdef, state, examples)
      if step + 1 == config.checkpoint_every:
        checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
        checkpoints.wait_until_finished()
      yield loss, state
