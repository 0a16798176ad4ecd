"""Mean losses and their metrics, always in float32."""

import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, jax.Array]


def cross_entropy(
  logits: jax.Array, labels: jax.Array, where: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
  """Returns the mean cross-entropy in nats, and the accuracy.

  Args:
    logits: [..., classes].
    labels: integers [...].
    where: which of them count, bool [...]; None for all.
  """
  logits, labels = logits.astype(jnp.float32), labels.astype(jnp.int32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  hits = logits.argmax(-1) == labels
  if where is None:
    return losses.mean(), {"accuracy": jnp.mean(hits, dtype=jnp.float32)}
  count = jnp.maximum(where.sum(), 1)
  accuracy = jnp.sum(hits & where, dtype=jnp.float32) / count
  return jnp.sum(losses, where=where) / count, {"accuracy": accuracy}


def squared_error(
  predictions: jax.Array, targets: jax.Array
) -> tuple[jax.Array, Metrics]:
  """Returns the mean squared error, and no metrics.

  Args:
    predictions: of any shape.
    targets: as many numbers, in the same order.
  """
  predictions = predictions.astype(jnp.float32).reshape(targets.shape)
  return jnp.mean((predictions - targets) ** 2), {}
