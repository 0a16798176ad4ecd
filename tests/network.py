"""A small regression network that the optimizer tests train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_RNG = np.random.default_rng(0)
_INPUTS = _RNG.normal(size=(200, 64, 8))
_TARGETS = np.sin(_INPUTS @ _RNG.normal(size=(8, 1)))
_PARAMS = {
  "hidden": {"kernel": _RNG.normal(size=(8, 16)) / 3, "bias": np.zeros(16)},
  "head": _RNG.normal(size=(16, 1)) / 4,
}

# Where the parameters lie on a mesh with axes data and model.
SPECS = {
  "hidden": {"kernel": P("data", "model"), "bias": P("model")},
  "head": P("data", None),
}


def place(tree, mesh):
  """Returns a tree like the parameters, placed on a mesh."""
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
  )


def params(dtype=jnp.float32):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), _PARAMS)


def batch(step, dtype=jnp.float32):
  """Returns inputs [64, 8] and targets [64, 1], on the host."""
  i = step % len(_INPUTS)
  return _INPUTS[i].astype(dtype), _TARGETS[i].astype(dtype)


def loss(params, inputs, targets):
  layer = params["hidden"]
  hidden = jnp.tanh(inputs @ layer["kernel"] + layer["bias"])
  return jnp.mean((hidden @ params["head"] - targets) ** 2)


def make_step(tx, **jit_options):
  """Returns (params, state, inputs, targets) -> (params, state, loss)."""

  def step(params, state, inputs, targets):
    value, grads = jax.value_and_grad(loss)(params, inputs, targets)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  return jax.jit(step, **jit_options)


def train(tx, steps, dtype=jnp.float32):
  """Returns parameters, state and the losses after `steps` steps."""
  step = make_step(tx)
  x, losses = params(dtype), []
  state = tx.init(x)
  for i in range(steps):
    x, state, value = step(x, state, *batch(i, dtype))
    losses.append(value)
  return x, state, np.asarray([float(value) for value in losses])
