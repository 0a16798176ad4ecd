"""A Linen autoencoder whose loss takes a random key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.learning_rate = 0.01
  config.latents = 2
  config.batch_size = 32
  config.num_steps = 30
  config.checkpoint_every = 20
  config.devices = 8
  return config


class Vae(nn.Module):
  latents: int

  @nn.compact
  def __call__(self, images, key):
    hidden = nn.relu(nn.Dense(16)(images))
    mean = nn.Dense(self.latents)(hidden)
    logvar = nn.Dense(self.latents)(hidden)
    noise = jax.random.normal(key, mean.shape)
    hidden = nn.Dense(16)(mean + noise * jnp.exp(logvar / 2))
    return nn.Dense(images.shape[-1])(nn.relu(hidden)), mean, logvar


def batch(step, size):
  """Returns images [size, 16] of zeros and ones, of two kinds."""
  rng = np.random.default_rng(step)
  kinds = (rng.random((size, 1)) < 0.9) == np.arange(16) // 8
  return (kinds ^ (rng.random((size, 16)) < 0.05)).astype(np.float32)


def make_tx(config):
  return optax.adam(config.learning_rate)


def kl_divergence(mean, logvar):
  return -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), axis=-1)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, images, key):
  def loss_fn(params):
    logits, mean, logvar = state.apply_fn({"params": params}, images, key)
    entropy = optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1)
    return entropy.mean() + kl_divergence(mean, logvar).mean()

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=grads), loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  model, key = Vae(config.latents), jax.random.key(0)
  params = jax.jit(model.init)(key, jnp.ones((1, 16)), key)["params"]
  state = train_state.TrainState.create(
    apply_fn=model.apply, params=params, tx=make_tx(config)
  )
  mesh = jax.make_mesh((config.devices,), ("data",), (AxisType.Auto,))
  state = jax.device_put(state, NamedSharding(mesh, P()))
  checkpoints = ocp.CheckpointManager(workdir)
  first = checkpoints.latest_step() or 0
  if first:
    state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
  yield None, state
  for step in range(first, config.num_steps):
    images = jax.device_put(
      batch(step, config.batch_size), NamedSharding(mesh, P("data"))
    )
    state, loss = train_step(state, images, jax.random.fold_in(key, step))
    if step + 1 == config.checkpoint_every:
      checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
      checkpoints.wait_until_finished()
    yield loss, state
