"""The offset Delta of the parameters x = x0 + S Delta, leaf by leaf.

A leaf of float32 or wider keeps x0 alone, and Delta is recovered from x. A
narrower leaf would lose Delta to rounding, so it keeps Delta beside x0, in
float32, and x is the rounded sum.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Accept = Callable[[jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Recovered:
  """A leaf that keeps x0 alone.

  Attributes:
    x: the parameter.
    x0: the reference point, perhaps in another dtype than x.
    S: the scale that x was made with, x = x0 + S Delta.
    inverse: 1 / (S + eps), by which Delta is recovered; optax lets it shrink by
      S / (S + eps) this way.
    dtype: what is computed in.
    first: whether this is the first update, at which Delta is 0.
  """

  x: jax.Array
  x0: jax.Array
  S: jax.Array
  inverse: jax.Array
  dtype: jnp.dtype
  first: jax.Array

  @property
  def kept(self) -> optax.MaskedNode:
    """What is kept of Delta."""
    return optax.MaskedNode()

  @property
  def position(self) -> jax.Array:
    """The exact x."""
    return widen(self.x, self.dtype)

  @property
  def delta(self) -> jax.Array:
    """Delta_t."""
    return self._zero_at_first(
      (self.position - widen(self.x0, self.dtype)) * self.inverse
    )

  def advance(
    self, u: jax.Array, S: jax.Array, accept: Accept
  ) -> tuple[jax.Array, Any]:
    """Returns x_{t+1} - x_t and the Delta_{t+1} that is kept, if any.

    Args:
      u: the base's update, Delta_{t+1} = Delta_t + u.
      S: the new scale.
      accept: (new, old) -> new, or old if the update is skipped.
    """
    x, x0 = self.position, widen(self.x0, self.dtype)
    # The negative of `delta`, so that XLA shares nothing between the pass of
    # the inner products and this one, which it would have to write out.
    minus_delta = self._zero_at_first((x0 - x) * self.inverse)
    moved = x0 + S * (u - minus_delta) - x
    return accept(moved, 0.0).astype(self.x.dtype), self.kept

  def _zero_at_first(self, delta: jax.Array) -> jax.Array:
    # An x0 that was rounded is not x, even at the first update.
    if self.x.dtype == self.x0.dtype:
      return delta
    return jnp.where(self.first, 0.0, delta)


@dataclasses.dataclass(frozen=True)
class Kept:
  """A leaf that keeps x0 and Delta; the attributes are those of `Recovered`.

  Attributes:
    eps: added to S.
    kept: Delta_t before it shrinks, which is kept.
  """

  x: jax.Array
  x0: jax.Array
  S: jax.Array
  eps: jax.typing.ArrayLike
  dtype: jnp.dtype
  kept: jax.Array

  @property
  def position(self) -> jax.Array:
    """The exact x, before it was rounded."""
    return widen(self.x0, self.dtype) + self.S * self.kept

  @property
  def delta(self) -> jax.Array:
    """Delta_t."""
    return self.kept * (self.S / (self.S + self.eps))

  def advance(
    self, u: jax.Array, S: jax.Array, accept: Accept
  ) -> tuple[jax.Array, Any]:
    """See `Recovered.advance`."""
    delta = accept(self.delta + u, self.kept)
    x = widen(self.x0, self.dtype) + S * delta
    moved = widen(x.astype(self.x.dtype), self.dtype)
    moved -= widen(self.x, self.dtype)
    return accept(moved, 0.0).astype(self.x.dtype), delta


def init(
  params: optax.Params,
  x0_dtype: jax.typing.DTypeLike | None,
  dtype: jnp.dtype,
) -> tuple[optax.Params, optax.Params]:
  """Returns x0 and Delta before the first update.

  Args:
    params: the parameters.
    x0_dtype: of x0 where a parameter is float32 or float64; None is its own.
    dtype: of Delta, or complex where the parameter is.
  """

  def x0(x):
    wide = x.dtype in (jnp.float32, jnp.float64)
    return jnp.array(x, x0_dtype if wide and x0_dtype else x.dtype)

  def delta(x):
    is_wide = jnp.finfo(x.dtype).bits >= 32
    return optax.MaskedNode() if is_wide else jnp.zeros_like(widen(x, dtype))

  return jax.tree.map(x0, params), jax.tree.map(delta, params)


def reference_point(
  first: jax.Array, params: optax.Params, x0: optax.Params
) -> optax.Params:
  """Returns x0, or at the first update the parameters.

  Donated, x0 is not copied; a `where` would write it at every step.
  """
  replaced = lambda: jax.tree.map(lambda x, x0: x.astype(x0.dtype), params, x0)
  x0 = jax.lax.cond(first, replaced, lambda: x0)
  # Without the barrier XLA:TPU widens a low-precision x0 inside the conditional
  # and writes it out in float32 (libtpu 0.0.51).
  return jax.lax.optimization_barrier(x0)


def advance(
  offsets: Any, u: optax.Updates, S: Any, accept: Accept, restart: jax.Array
) -> tuple[optax.Updates, optax.Params]:
  """Returns the parameters' updates, and Delta where it is kept.

  Args:
    offsets: a tree of `Recovered` and `Kept`.
    u: the base's updates, a tree like it; a leaf that is None stays.
    S: each leaf's new scale, likewise.
    accept: see `Recovered.advance`.
    restart: whether the parameters go back to x0 instead.
  """
  leaves, treedef = jax.tree.flatten(offsets)

  def put_back(leaf, moved, kept):
    back = (leaf.x0.astype(leaf.x.dtype) - leaf.x).astype(leaf.x.dtype)
    kept = jax.tree.map(lambda d: jnp.where(restart, 0.0, d), kept)
    return jnp.where(restart, back, moved), kept

  advanced = [
    (jnp.zeros_like(leaf.x), leaf.kept)
    if u is None
    else put_back(leaf, *leaf.advance(u, S, accept))
    for leaf, u, S in zip(
      leaves, treedef.flatten_up_to(u), treedef.flatten_up_to(S), strict=True
    )
  ]
  moved, delta = zip(*advanced, strict=True) if advanced else ((), ())
  return treedef.unflatten(moved), treedef.unflatten(delta)


def widen(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns x in `dtype`, or in its own dtype if that is wider or complex."""
  with jax.numpy_dtype_promotion("standard"):
    return x.astype(jnp.promote_types(x.dtype, dtype))
