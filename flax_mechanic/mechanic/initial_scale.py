"""An initial scale relative to the parameters' size, in place of `s_init`."""

import jax
import jax.numpy as jnp

# An offset is measurable where it moved the parameters by more than this
# fraction of their norm, which is well above float32's rounding.
_MEASURABLE = 2e-6
# Until then the scale rises from s_init tenfold per update, at most this far.
_MAX_RISE = 1e4
# An offset that is measured for the first time is the sum of at most so many
# updates, however many zero updates there were before.
_MAX_AGE = 10


def measure(
  previous: jax.Array,
  *,
  rho: jax.typing.ArrayLike,
  s_init: jax.typing.ArrayLike,
  count: jax.Array,
  S: jax.Array,
  x_norm: jax.Array,
  delta_squared: jax.Array,
  begun: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Measures the scale at which an update moves x by the fraction rho.

  That is rho (1 + |x|) / |u|, where the size of an update, |u|, is taken to be
  |Delta| / sqrt(count); the smallest scale measured so far counts.

  Args:
    previous: what was measured so far, 0 if nothing was.
    rho: the fraction.
    s_init: the scale to start from until an offset is measurable.
    count: updates so far, int32 scalar.
    S: the learned scale.
    x_norm: |x|.
    delta_squared: |Delta|^2.
    begun: whether there was a gradient yet. Without one, Delta is the base's
      weight decay alone, which says nothing about its updates.

  Returns:
    What is measured now, 0 if still nothing; and the initial scale to use.
    Arrays are of the groups' shape.
  """
  seen = previous > 0
  age = jnp.where(seen, count, jnp.clip(count, 1, _MAX_AGE)).astype(S.dtype)
  present = rho * (1 + x_norm) * jnp.sqrt(age / delta_squared)
  smallest = jnp.where(seen, jnp.minimum(previous, present), present)
  moved = S * jnp.sqrt(delta_squared) > _MEASURABLE * x_norm
  measurable = begun & moved
  measured = jnp.where(measurable, smallest, previous)
  rise = jax.lax.pow(jnp.asarray(10.0), count)
  rising = s_init * jnp.minimum(rise, _MAX_RISE)
  return measured, jnp.where(measured > 0, measured, rising)
