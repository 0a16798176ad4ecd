"""What the tests of single methods compare with, and small jobs to run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import flax_mechanic
from flax_mechanic import Optimizer, TrainState
from tests import network
from tests.test_config import make_config

# Schedules are kept in float32; these values lose nothing there.
RATE = 2.0**-5
SHAPE = optax.linear_schedule(1.0, 0.0, 32)
CLIP = 5.0
AGGREGATE = "differentially_private_aggregate"


def build(optimizer, shape=None, **fields):
  config = make_config(optimizer=optimizer, **{"learning_rate": RATE} | fields)
  return flax_mechanic.make_optimizer(config, shape)


def under(row, **options):
  """Names the options of a row as `build` takes them."""
  return {f"opt__{row}__{option}": value for option, value in options.items()}


def scheduled(count):
  return RATE * SHAPE(count)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_close(actual, expected, tolerance=1e-10):
  # In this order, a tree whose structure differs is an error.
  jax.tree.map(lambda expected, actual: None, expected, actual)
  error = np.linalg.norm(flat(actual) - flat(expected))
  assert error <= tolerance * np.linalg.norm(flat(expected))


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


# A model of two layers in NNX, in Linen and in NumPy.


class Mlp(nnx.Module):
  def __init__(self, width, rngs):
    self.hidden = nnx.Linear(3, width, rngs=rngs)
    self.head = nnx.Linear(width, 2, rngs=rngs)

  def __call__(self, inputs):
    return self.head(jnp.tanh(self.hidden(inputs)))


class LinenMlp(linen.Module):
  width: int

  @linen.compact
  def __call__(self, inputs):
    hidden = linen.Dense(self.width, name="hidden")(inputs)
    return linen.Dense(2, name="head")(jnp.tanh(hidden))


def measure(outputs, targets):
  errors = outputs - targets
  aux = {"outputs": outputs, "error": jnp.mean(jnp.abs(errors))}
  return jnp.mean(errors**2), aux


def initial(width=4):
  rng = np.random.default_rng(0)
  layer = lambda *shape: {
    "kernel": rng.normal(size=shape) / 2,
    "bias": rng.normal(size=shape[1:]) / 2,
  }
  return {"hidden": layer(3, width), "head": layer(width, 2)}


def batch(step, size=8):
  rng = np.random.default_rng(100 + step)
  inputs = rng.normal(size=(size, 3))
  # Of very different sizes, so that some gradients are clipped and some not.
  targets = rng.normal(size=(size, 2)) * np.geomspace(0.1, 10, size)[:, None]
  return inputs, targets


@nnx.jit
def minimize_model(model, optimizer, inputs, targets):
  return optimizer.minimize(
    model,
    lambda model, inputs, targets: measure(model(inputs), targets),
    inputs,
    targets,
    has_aux=True,
  )


class NnxRun:
  def __init__(self, tx, params):
    self.model = Mlp(len(params["hidden"]["bias"]), nnx.Rngs(0))
    nnx.update(self.model, jax.tree.map(jnp.asarray, params))
    self.optimizer = Optimizer(self.model, tx)

  def step(self, inputs, targets):
    return minimize_model(self.model, self.optimizer, inputs, targets)

  @property
  def params(self):
    return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))


class LinenRun:
  def __init__(self, tx, params):
    model = LinenMlp(len(params["hidden"]["bias"]))
    self.state = TrainState.create(
      apply_fn=model.apply, params=jax.tree.map(jnp.asarray, params), tx=tx
    )

  @staticmethod
  @jax.jit
  def _step(state, inputs, targets):
    def loss_fn(params, inputs, targets):
      return measure(state.apply_fn({"params": params}, inputs), targets)

    return state.minimize(loss_fn, inputs, targets, has_aux=True)

  def step(self, inputs, targets):
    self.state, output = self._step(self.state, inputs, targets)
    return output

  @property
  def params(self):
    return self.state.params


in_nnx_and_linen = pytest.mark.parametrize("run", [NnxRun, LinenRun])


def numpy_value_and_grad(params, inputs, targets):
  """The mean squared error of the model and its gradient, by hand."""
  hidden, head = params["hidden"], params["head"]
  h = np.tanh(inputs @ hidden["kernel"] + hidden["bias"])
  errors = h @ head["kernel"] + head["bias"] - targets
  d_out = 2 * errors / errors.size
  d_hidden = d_out @ head["kernel"].T * (1 - h**2)
  return np.mean(errors**2), {
    "hidden": {"kernel": inputs.T @ d_hidden, "bias": d_hidden.sum(0)},
    "head": {"kernel": h.T @ d_out, "bias": d_out.sum(0)},
  }


def numpy_grad(params, inputs, targets):
  return numpy_value_and_grad(params, inputs, targets)[1]


def add(a, b, factor=1.0):
  return jax.tree.map(lambda a, b: a + factor * np.asarray(b), a, b)


def norm(tree):
  return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def numpy_aggregate(params, inputs, targets):
  """The mean of gradients that are clipped one by one; how many were."""
  clipped, total = 0, jax.tree.map(np.zeros_like, params)
  for i in range(len(inputs)):
    grads = numpy_grad(params, inputs[i : i + 1], targets[i : i + 1])
    clipped += norm(grads) > CLIP
    total = add(total, grads, min(1.0, CLIP / norm(grads)) / len(inputs))
  return total, clipped


def numpy_sam_grad(params, inputs, targets, rho):
  """The gradient at w + rho g / |g|, and the loss at w."""
  value, grads = numpy_value_and_grad(params, inputs, targets)
  worst = add(params, grads, rho / norm(grads))
  return value, numpy_grad(worst, inputs, targets)


def fed(tx, params, gradient, steps):
  """Parameters after `steps` of optax's `tx` on `gradient(params, *batch)`."""
  tx = optax.with_extra_args_support(tx)
  state, update = tx.init(params), jax.jit(tx.update)
  for i in range(steps):
    value, grads = gradient(params, *batch(i))
    updates, state = update(grads, state, params, value=value)
    params = add(params, updates)
  return params


# On the shared network.


def batches(steps, dtype):
  pairs = [network.batch(i, dtype) for i in range(steps)]
  return tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True))


def minimize(tx, steps, dtype=jnp.float32, start=None):
  """Returns the state and the losses after `steps` steps of `TrainState`."""

  @jax.jit
  def run(x, batches):
    state = TrainState.create(apply_fn=None, params=x, tx=tx)
    return jax.lax.scan(
      lambda state, batch: state.minimize(network.loss, *batch), state, batches
    )

  return run(start or network.params(dtype), batches(steps, dtype))


def by_hand(tx, steps, start=None, loss=network.loss):
  """Parameters, state and losses of the same in optax's words, in float64."""
  tx = optax.with_extra_args_support(tx)

  def step(carry, batch):
    x, state = carry
    value, grads = jax.value_and_grad(loss)(x, *batch)
    updates, state = tx.update(grads, state, x, value=value)
    return (optax.apply_updates(x, updates), state), value

  @jax.jit
  def run(x, batches):
    return jax.lax.scan(step, (x, tx.init(x)), batches)

  start = start or network.params(jnp.float64)
  (x, state), losses = run(start, batches(steps, jnp.float64))
  return x, state, losses
