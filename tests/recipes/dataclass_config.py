"""A job in plain JAX, with a dataclass for a config and steps in a scan."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import optax

from tests import network


@dataclasses.dataclass(slots=True)
class Config:
  learning_rate: float = 0.03
  num_steps: int = 30
  steps_per_call: int = 5
  checkpoint_every: int = 20


def get_config():
  return Config()


def init_params(key):
  first, second = jax.random.split(key)
  return {
    "hidden": {
      "kernel": jax.random.normal(first, (8, 16)) / 3,
      "bias": jnp.zeros(16),
    },
    "head": {
      "kernel": jax.random.normal(second, (16, 1)) / 4,
      "bias": jnp.zeros(1),
    },
  }


def loss_fn(params, inputs, targets):
  hidden, head = params["hidden"], params["head"]
  features = jnp.tanh(inputs @ hidden["kernel"] + hidden["bias"])
  outputs = features @ head["kernel"] + head["bias"]
  return jnp.mean((outputs - targets) ** 2)


def make_tx(config):
  rate = config.learning_rate
  schedule = optax.linear_schedule(rate, 0.0, config.num_steps)
  return optax.adamw(schedule)


def train(config, workdir):
  """Yields loss and state, at the start and after each call; resumes."""
  tx = make_tx(config)

  def step_fn(state, batch):
    params, opt, step = state
    loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt, step + 1), loss

  @functools.partial(jax.jit, donate_argnums=0)
  def several_steps(state, batches):
    return jax.lax.scan(step_fn, state, batches)

  params = init_params(jax.random.key(0))
  state = (params, tx.init(params), jnp.int32(0))
  path = workdir / "state.pickle"
  if path.exists():
    state = jax.device_put(pickle.loads(path.read_bytes()))
  yield None, state
  for step in range(int(state[2]), config.num_steps, config.steps_per_call):
    last = step + config.steps_per_call
    batches = [network.batch(i) for i in range(step, last)]
    state, losses = several_steps(state, jax.tree.map(stack, *batches))
    if last == config.checkpoint_every:
      path.write_bytes(pickle.dumps(jax.device_get(state)))
    yield losses[-1], state


def stack(*arrays):
  return jnp.stack(arrays)
