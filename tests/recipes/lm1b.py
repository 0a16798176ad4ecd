"""A Linen language model on a mesh, placed as its modules annotate it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.learning_rate = 1 / 32
  config.b2 = 0.98
  config.weight_decay = 0.1
  config.batch_size = 16
  config.warmup_steps = 4
  config.num_steps = 30
  config.checkpoint_every = 20
  config.devices = 8
  return config


def partitioned(*names):
  return nn.with_partitioning(nn.initializers.xavier_uniform(), names)


class TransformerLM(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(8, 16, embedding_init=partitioned(None, "model"))
    features = embed(jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1])
    mask = nn.make_causal_mask(tokens)
    attention = nn.MultiHeadDotProductAttention(
      num_heads=2, dropout_rate=0.1, deterministic=False
    )
    features += attention(nn.LayerNorm()(features), mask=mask)
    wide = nn.Dense(32, kernel_init=partitioned(None, "model"))
    narrow = nn.Dense(16, kernel_init=partitioned("model", None))
    features += narrow(nn.gelu(wide(nn.LayerNorm()(features))))
    return nn.Dense(8)(nn.LayerNorm()(features))


def batch(step, size):
  """Returns tokens [size, 8] that count up; 0 pads the end."""
  rng = np.random.default_rng(step)
  tokens = 1 + (rng.integers(7, size=(size, 1)) + np.arange(8)) % 7
  lengths = rng.integers(6, 9, size=(size, 1))
  return np.where(np.arange(8) < lengths, tokens, 0).astype(np.int32)


def rsqrt_schedule(rate, shift):
  return lambda count: rate * (count + shift) ** -0.5 * shift**0.5


def make_tx(config):
  rate, warmup_steps = config.learning_rate, config.warmup_steps
  warmup = optax.linear_schedule(0.0, rate, warmup_steps)
  schedule = optax.join_schedules(
    [warmup, rsqrt_schedule(rate, warmup_steps)], [warmup_steps]
  )
  return optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)


def create(model, tx):
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  params = model.init(rngs, jnp.ones((1, 8), jnp.int32))["params"]
  return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train_step(state, tokens, key):
  key = jax.random.fold_in(key, state.step)

  def loss_fn(params):
    weights = tokens > 0
    logits = state.apply_fn({"params": params}, tokens, rngs={"dropout": key})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.sum(losses * weights) / jnp.sum(weights)

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=grads), loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  columns = min(2, config.devices)
  mesh = jax.make_mesh(
    (config.devices // columns, columns),
    ("data", "model"),
    (AxisType.Auto, AxisType.Auto),
  )
  place = lambda spec: NamedSharding(mesh, spec)
  init = functools.partial(create, TransformerLM(), make_tx(config))
  specs = nn.get_partition_spec(jax.eval_shape(init))
  shardings = jax.tree.map(place, specs)
  state = jax.jit(init, out_shardings=shardings)()
  step_fn = jax.jit(
    train_step,
    in_shardings=(shardings, place(P("data")), place(P())),
    out_shardings=(shardings, place(P())),
    donate_argnums=0,
  )
  checkpoints = ocp.CheckpointManager(workdir)
  first = checkpoints.latest_step() or 0
  if first:
    state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
  yield None, state
  for step in range(first, config.num_steps):
    tokens = batch(step, config.batch_size)
    state, loss = step_fn(state, tokens, jax.random.key(2))
    if step + 1 == config.checkpoint_every:
      checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
      checkpoints.wait_until_finished()
    yield loss, state
