"""A Linen image classifier under `jax.pmap`, with batch statistics.

Its rate grows with the batch, and its loss may have a dynamic scale.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax import linen as nn
from flax.training import checkpoints, train_state
from flax.training.dynamic_scale import DynamicScale
from jax import lax
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.learning_rate = 1.0
  config.momentum = 0.9
  config.nesterov = True
  config.batch_size = 32
  config.warmup_steps = 5
  config.num_steps = 30
  config.checkpoint_every = 20
  config.loss_scale = 0.0  # At the start; 0.0 for none.
  config.devices = 8
  return config


class ConvNet(nn.Module):
  @nn.compact
  def __call__(self, images, train=True):
    features = nn.Conv(8, (3, 3), use_bias=False, name="conv")(images)
    norm = nn.BatchNorm(use_running_average=not train, name="norm")
    features = nn.relu(norm(features)).mean(axis=2)
    return nn.Dense(4, name="head")(features.reshape(len(features), -1))


class TrainState(train_state.TrainState):
  batch_stats: Any
  dynamic_scale: DynamicScale | None


def batch(step, size):
  """Returns noisy images [size, 8, 8, 3] of a bar, and where it is."""
  rng = np.random.default_rng(step)
  labels = rng.integers(4, size=size)
  images = rng.normal(scale=0.5, size=(size, 8, 8, 3)).astype(np.float32)
  images[np.arange(size), 2 * labels] += 2.0
  return {"image": images, "label": labels.astype(np.int32)}


def make_schedule(config, rate):
  warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
  cosine = optax.cosine_decay_schedule(
    rate, config.num_steps - config.warmup_steps
  )
  return optax.join_schedules([warmup, cosine], [config.warmup_steps])


def make_tx(config):
  rate = config.learning_rate * config.batch_size / 256
  schedule = make_schedule(config, rate)
  return optax.sgd(schedule, config.momentum, config.nesterov)


def create(config):
  model = ConvNet()
  variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  scale = config.loss_scale
  return TrainState.create(
    apply_fn=model.apply,
    params=variables["params"],
    tx=make_tx(config),
    batch_stats=variables["batch_stats"],
    dynamic_scale=DynamicScale(scale=scale) if scale else None,
  )


def train_step(state, batch):
  def loss_fn(params):
    logits, updated = state.apply_fn(
      {"params": params, "batch_stats": state.batch_stats},
      batch["image"],
      mutable=["batch_stats"],
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    ).mean()
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    penalty = sum(jnp.sum(kernel**2) for kernel in kernels)
    return loss + 1e-4 / 2 * penalty, updated

  dynamic_scale = state.dynamic_scale
  if dynamic_scale:
    grad_fn = dynamic_scale.value_and_grad(
      loss_fn, has_aux=True, axis_name="batch"
    )
    dynamic_scale, is_finite, aux, grads = grad_fn(state.params)
  else:
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    aux, grads = grad_fn(state.params)
    grads = lax.pmean(grads, "batch")
  new = state.apply_gradients(grads=grads)
  loss, updated = aux
  new = new.replace(**lax.pmean(updated, "batch"))
  if dynamic_scale:
    select = functools.partial(jnp.where, is_finite)
    new = new.replace(
      params=jax.tree.map(select, new.params, state.params),
      opt_state=jax.tree.map(select, new.opt_state, state.opt_state),
      dynamic_scale=dynamic_scale,
    )
  return new, lax.pmean(loss, "batch")


def unreplicate(tree):
  return jax.tree.map(lambda x: x[0], tree)


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  devices = jax.devices()[: config.devices]
  step_fn = jax.pmap(
    train_step, axis_name="batch", devices=devices, donate_argnums=0
  )
  shard = lambda x: x.reshape(len(devices), -1, *x.shape[1:])
  state = checkpoints.restore_checkpoint(workdir, create(config))
  first = int(state.step)
  state = jax_utils.replicate(state, devices, axis_name="batch")
  yield None, state
  for step in range(first, config.num_steps):
    examples = jax.tree.map(shard, batch(step, config.batch_size))
    state, loss = step_fn(state, examples)
    if step + 1 == config.checkpoint_every:
      saved = unreplicate(state)
      checkpoints.save_checkpoint(workdir, saved, step + 1)
    yield unreplicate(loss), state
