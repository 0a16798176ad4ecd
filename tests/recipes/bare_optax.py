"""A job that calls optax itself, with a rule for what is split over a mesh."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tests import network


def get_config():
  config = ConfigDict()
  config.learning_rate = 0.03
  config.weight_decay = 0.01
  config.grad_clip = 1.0
  config.num_steps = 30
  config.checkpoint_every = 20
  return config


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    hidden = nn.tanh(nn.Dense(16, name="hidden")(inputs))
    return nn.Dense(1, name="head")(hidden)


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.cosine_decay_schedule(rate, config.num_steps)
  return optax.chain(
    optax.clip_by_global_norm(config.grad_clip),
    optax.adamw(schedule, weight_decay=config.weight_decay),
  )


def fsdp(tree, mesh):
  """Splits the first dimension of each leaf that the devices divide."""

  def sharding(leaf):
    for axis, size in enumerate(leaf.shape):
      if size % mesh.size == 0:
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))
    return NamedSharding(mesh, P())

  return jax.tree.map(sharding, tree)


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  mesh = Mesh(jax.devices(), ("fsdp",))
  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
  model = Mlp()
  tx = make_tx(config)

  def init():
    params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    return params, tx.init(params), jnp.int32(0)

  def update_fn(state, inputs, targets):
    params, opt, step = state

    def loss_fn(params):
      outputs = model.apply({"params": params}, inputs)
      return jnp.mean((outputs - targets) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt, step + 1), loss

  shardings = fsdp(jax.eval_shape(init), mesh)
  update = jax.jit(
    update_fn,
    in_shardings=(shardings, rows, rows),
    out_shardings=(shardings, whole),
    donate_argnums=0,
  )
  state = jax.jit(init, out_shardings=shardings)()
  path = workdir / "state.msgpack"
  if path.exists():
    saved = serialization.from_bytes(state, path.read_bytes())
    state = jax.device_put(saved, shardings)
  yield None, state
  for step in range(int(state[2]), config.num_steps):
    state, loss = update(state, *network.batch(step))
    if step + 1 == config.checkpoint_every:
      path.write_bytes(serialization.to_bytes(state))
    yield loss, state
