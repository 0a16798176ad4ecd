"""A Linen job with `jax.pmap`: batch statistics and a dynamic loss scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import jax_utils
from flax import linen as nn
from flax.training import checkpoints, train_state
from flax.training.dynamic_scale import DynamicScale
from ml_collections import ConfigDict

from tests import network


def get_config():
  config = ConfigDict()
  config.learning_rate = 0.03
  config.momentum = 0.9
  config.warmup_steps = 5
  config.num_steps = 30
  config.checkpoint_every = 20
  config.loss_scale = 65536.0
  return config


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    hidden = nn.Dense(16, use_bias=False, name="hidden")(inputs)
    hidden = nn.BatchNorm(use_running_average=False, name="norm")(hidden)
    return nn.Dense(1, name="head")(nn.tanh(hidden))


class TrainState(train_state.TrainState):
  batch_stats: Any
  dynamic_scale: DynamicScale


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, config.warmup_steps, config.num_steps
  )
  return optax.sgd(schedule, momentum=config.momentum)


def create(config):
  model = Mlp()
  variables = jax.jit(model.init)(jax.random.PRNGKey(0), jnp.ones((1, 8)))
  return TrainState.create(
    apply_fn=model.apply,
    params=variables["params"],
    tx=make_tx(config),
    batch_stats=variables["batch_stats"],
    dynamic_scale=DynamicScale(scale=config.loss_scale),
  )


@functools.partial(jax.pmap, axis_name="batch", donate_argnums=0)
def train_step(state, inputs, targets):
  def loss_fn(params):
    outputs, updated = state.apply_fn(
      {"params": params, "batch_stats": state.batch_stats},
      inputs,
      mutable=["batch_stats"],
    )
    return jnp.mean((outputs - targets) ** 2), updated["batch_stats"]

  grad_fn = state.dynamic_scale.value_and_grad(
    loss_fn, has_aux=True, axis_name="batch"
  )
  dynamic_scale, is_finite, (loss, batch_stats), grads = grad_fn(state.params)
  new = state.apply_gradients(
    grads=grads, batch_stats=batch_stats, dynamic_scale=dynamic_scale
  )
  select = functools.partial(jnp.where, is_finite)
  new = new.replace(
    params=jax.tree.map(select, new.params, state.params),
    opt_state=jax.tree.map(select, new.opt_state, state.opt_state),
  )
  return new, jax.lax.pmean(loss, "batch")


@functools.partial(jax.pmap, axis_name="batch")
def sync_batch_stats(state):
  stats = jax.lax.pmean(state.batch_stats, "batch")
  return state.replace(batch_stats=stats)


def shard(array):
  return array.reshape(jax.device_count(), -1, *array.shape[1:])


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  state = checkpoints.restore_checkpoint(workdir, create(config))
  first = int(state.step)
  state = jax_utils.replicate(state, axis_name="batch")
  yield None, state
  for step in range(first, config.num_steps):
    state, loss = train_step(state, *map(shard, network.batch(step)))
    if step + 1 == config.checkpoint_every:
      state = sync_batch_stats(state)
      saved = jax_utils.unreplicate(state)
      checkpoints.save_checkpoint(workdir, saved, step + 1)
    yield jax_utils.unreplicate(loss), state
