"""How far S goes towards the sum of s: less as the schedule falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mechanic.mechanic.held import SCHEDULES
from flax_mechanic.paths import outermost

# The counts at which a schedule's peak is looked for, 8% apart.
_COUNTS = np.unique(np.geomspace(1, 2**30, 256).astype(np.int32)) - 1


def of(schedule: optax.Schedule, base_state: optax.OptState) -> jax.Array:
  """Returns the fraction of the way that S goes in this update, scalar.

  It is the learning rate over the largest one so far: 1 while the schedule
  rises or is constant, 0 once it has fallen to 0.

  Args:
    schedule: update count -> learning rate, of any peak.
    base_state: of the base before the update, which counts for its schedule.
  """
  count = _counts(base_state)[0]
  rate = schedule(count)
  # The schedule of constants: XLA computes it when it compiles.
  before = jnp.where(count >= _COUNTS, jax.vmap(schedule)(_COUNTS), 0.0)
  peak = jnp.maximum(jnp.max(before), rate)
  return jnp.where(peak > 0, jnp.maximum(rate / peak, 0.0), 1.0)


def check(base_state: optax.OptState) -> None:
  """Raises a ValueError where a base's state counts for no schedule."""
  if not _counts(base_state):
    raise ValueError(
      "mechanize(schedule=...) is the base's schedule, and the base has none; "
      "give it to both, as in mechanize(optax.adamw(schedule), "
      "schedule=schedule)"
    )


def _counts(base_state: optax.OptState) -> list[jax.Array]:
  return [node.count for node in outermost(base_state, SCHEDULES)]
