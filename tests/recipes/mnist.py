"""An NNX image classifier: dropout in the loss, metrics, `nnx.jit`."""

import functools

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.learning_rate = 0.1
  config.momentum = 0.9
  config.batch_size = 32
  config.num_steps = 30
  config.checkpoint_every = 20
  config.devices = 8
  return config


class Cnn(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
    self.dropout = nnx.Dropout(0.1)
    self.head = nnx.Linear(64, 4, rngs=rngs)

  def __call__(self, images, rngs):
    features = nnx.relu(self.conv(images))
    features = nnx.avg_pool(features, (2, 2), strides=(2, 2))
    features = features.reshape(len(features), -1)
    return self.head(self.dropout(features, rngs=rngs))


def batch(step, size):
  """Returns noisy images [size, 8, 8, 1] of a bar, and where it is."""
  rng = np.random.default_rng(step)
  labels = rng.integers(4, size=size)
  images = rng.normal(scale=0.5, size=(size, 8, 8, 1)).astype(np.float32)
  images[np.arange(size), :, 2 * labels] += 2.0
  return {"image": images, "label": labels.astype(np.int32)}


def make_tx(config):
  return optax.sgd(config.learning_rate, config.momentum)


def loss_fn(model, batch, rngs):
  logits = model(batch["image"], rngs)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  )
  return losses.mean(), logits


@functools.partial(nnx.jit, donate_argnums=(0, 1, 2, 4))
def train_step(model, optimizer, metrics, batch, rngs):
  grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
  (loss, logits), grads = grad_fn(model, batch, rngs)
  optimizer.update(model, grads)
  metrics.update(loss=loss, logits=logits, labels=batch["label"])
  return loss


def train(config, workdir):
  """Yields loss and state, at the start and after each step; resumes."""
  model = Cnn(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, make_tx(config), wrt=nnx.Param)
  metrics = nnx.MultiMetric(
    accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
  )
  rngs = nnx.Rngs(1)
  job = (model, optimizer, metrics, rngs)
  mesh = jax.make_mesh((config.devices,), ("data",), (AxisType.Auto,))
  nnx.update(job, jax.device_put(nnx.state(job), NamedSharding(mesh, P())))
  checkpointer = ocp.StandardCheckpointer()
  path = workdir / "state"
  if path.exists():
    nnx.update(job, checkpointer.restore(path, nnx.state(job)))
  yield None, nnx.state(job)
  for step in range(int(optimizer.step[...]), config.num_steps):
    examples = jax.device_put(
      batch(step, config.batch_size), NamedSharding(mesh, P("data"))
    )
    loss = train_step(model, optimizer, metrics, examples, rngs)
    if step + 1 == config.checkpoint_every:
      checkpointer.save(path, nnx.state(job))
      checkpointer.wait_until_finished()
    yield loss, nnx.state(job)
