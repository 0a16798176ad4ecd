"""What the tests of the tasks compare with: float64, by NumPy alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def create(task):
  return nnx.jit(task.create_model)(nnx.Rngs(0))


def perturbed(task):
  """A model none of whose biases is 0, nor scales 1."""
  model = create(task)
  rng = np.random.default_rng(0)
  params = nnx.state(model, nnx.Param)
  nnx.update(
    model,
    jax.tree.map(
      lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params
    ),
  )
  return model


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def join(batches):
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def f64(param):
  return np.asarray(param[...], np.float64)


def linear(layer, x):
  return x @ f64(layer.kernel) + f64(layer.bias)


def mlp(model, x):
  x = np.asarray(x, np.float64).reshape(len(x), -1)
  for layer in model.hidden:
    x = np.maximum(linear(layer, x), 0)
  return linear(model.head, x)


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
  e = np.exp(x)
  return e / e.sum(-1, keepdims=True)


def check_loss(task, model, batch, logits, labels):
  """Compares task.loss with the cross-entropy of `logits`, float64 [..., n]."""
  logits = logits.reshape(-1, logits.shape[-1])
  labels = labels.reshape(-1)
  log_z = np.log(np.exp(logits).sum(-1))
  expected = (log_z - logits[np.arange(len(labels)), labels]).mean()
  loss, metrics = nnx.jit(task.loss)(model, batch)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["accuracy"], (logits.argmax(-1) == labels).mean(), rtol=1e-6
  )
  return metrics | {"loss": loss}


def check_squared_error(task, model, batch, predictions, targets):
  """Compares task.loss with the mean squared error of `predictions`."""
  targets = np.asarray(targets, np.float64)
  expected = ((predictions.reshape(targets.shape) - targets) ** 2).mean()
  loss, metrics = nnx.jit(task.loss)(model, batch)
  assert loss.dtype == jnp.float32
  assert metrics == {}
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def check_narrow(task, dtype):
  """A task computes in that dtype; its parameters and loss are float32."""
  model = create(task)
  params = nnx.state(model, nnx.Param)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  batch = task.train_batch(0)
  jaxpr = str(jax.make_jaxpr(lambda b: task.loss(model, b))(batch))
  assert f":{dtype.replace('float', 'f')}[" in jaxpr
  step = nnx.jit(nnx.value_and_grad(task.loss, has_aux=True))
  (loss, metrics), grads = step(model, batch)
  assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype("float32")}
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
