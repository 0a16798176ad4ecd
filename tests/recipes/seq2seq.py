"""A Linen LSTM that reads a sequence and writes it backwards.

It feeds on its own samples, and so draws random numbers at every step.
"""

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
  config.learning_rate = 0.03
  config.hidden_size = 8
  config.batch_size = 32
  config.num_steps = 30
  config.checkpoint_every = 20
  config.devices = 8
  return config


class DecoderCell(nn.RNNCellBase):
  features: int
  vocabulary: int

  @nn.compact
  def __call__(self, carry, _):
    memory, token = carry
    memory, hidden = nn.LSTMCell(self.features)(memory, token)
    logits = nn.Dense(self.vocabulary)(hidden)
    token = jax.random.categorical(self.make_rng("lstm"), logits)
    token = jax.nn.one_hot(token, self.vocabulary)
    return (memory, token), logits

  @property
  def num_feature_axes(self):
    return 1


class Seq2seq(nn.Module):
  hidden_size: int

  @nn.compact
  def __call__(self, queries):
    cell = nn.LSTMCell(self.hidden_size)
    memory, _ = nn.RNN(cell, return_carry=True, name="encoder")(queries)
    decoder = nn.RNN(
      DecoderCell(self.hidden_size, queries.shape[-1]),
      split_rngs={"params": False, "lstm": True},
      name="decoder",
    )
    start = jnp.zeros_like(queries[:, 0])
    return decoder(queries, initial_carry=(memory, start))


def batch(step, size):
  """Returns a query and its answer, one-hot [size, 3, 3]."""
  digits = np.random.default_rng(step).integers(3, size=(size, 3))
  query = np.eye(3, dtype=np.float32)[np.sort(digits)]
  return {"query": query, "answer": query[:, ::-1]}


def make_tx(config):
  return optax.adam(config.learning_rate)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch, lstm_key):
  lstm_key = jax.random.fold_in(lstm_key, state.step)

  def loss_fn(params):
    logits = state.apply_fn(
      {"params": params}, batch["query"], rngs={"lstm": lstm_key}
    )
    losses = optax.softmax_cross_entropy(logits, batch["answer"])
    return losses.mean(), logits

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, logits), grads = grad_fn(state.params)
  state = state.apply_gradients(grads=grads)
  right = jnp.argmax(logits, -1) == jnp.argmax(batch["answer"], -1)
  return state, {"loss": loss, "accuracy": right.all(axis=-1).mean()}


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  model, key = Seq2seq(config.hidden_size), jax.random.key(0)
  rngs = {"params": key, "lstm": key}
  params = jax.jit(model.init)(rngs, jnp.ones((1, 3, 3)))["params"]
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
    examples = jax.device_put(
      batch(step, config.batch_size), NamedSharding(mesh, P("data"))
    )
    state, metrics = train_step(state, examples, key)
    if step + 1 == config.checkpoint_every:
      checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
      checkpoints.wait_until_finished()
    yield metrics["loss"], state
