"""A Linen job whose state is split over a mesh, as its modules annotate it."""

import functools

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tests import network


def get_config():
  config = ConfigDict()
  config.optimizer = "adamw"
  config.learning_rate = 0.03
  config.weight_decay = 0.01
  config.num_steps = 30
  config.checkpoint_every = 20
  config.mesh = (4, 2)
  return config


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    init = nn.initializers.lecun_normal()
    columns = nn.with_partitioning(init, (None, "model"))
    rows = nn.with_partitioning(init, ("model", None))
    hidden = nn.tanh(nn.Dense(16, kernel_init=columns, name="hidden")(inputs))
    return nn.Dense(1, kernel_init=rows, name="head")(hidden)


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.linear_schedule(rate, 0.0, config.num_steps)
  return optax.adamw(schedule, weight_decay=config.weight_decay)


def create(model, tx):
  params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
  return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train_step(state, inputs, targets):
  def loss_fn(params):
    outputs = state.apply_fn({"params": params}, inputs)
    return jnp.mean((outputs - targets) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=grads), loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  axis_types = (AxisType.Auto, AxisType.Auto)
  mesh = jax.make_mesh(config.mesh, ("data", "model"), axis_types)
  place = lambda spec: NamedSharding(mesh, spec)
  init = functools.partial(create, Mlp(), make_tx(config))
  specs = nn.get_partition_spec(jax.eval_shape(init))
  shardings = jax.tree.map(place, specs)
  state = jax.jit(init, out_shardings=shardings)()
  step_fn = jax.jit(
    train_step,
    in_shardings=(shardings, place(P("data")), place(P("data"))),
    out_shardings=(shardings, place(P())),
    donate_argnums=0,
  )
  checkpoints = ocp.CheckpointManager(workdir)
  first = checkpoints.latest_step() or 0
  if first:
    state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
  yield None, state
  for step in range(first, config.num_steps):
    state, loss = step_fn(state, *network.batch(step))
    if step + 1 == config.checkpoint_every:
      checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
      checkpoints.wait_until_finished()
    yield loss, state
