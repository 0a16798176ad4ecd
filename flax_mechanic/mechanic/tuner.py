"""The scalar tuner: Algorithm 1 as a pure function of h.

The letters are the paper's (arXiv 2306.00144): `s` is the learned scale, with
one entry per beta; S is the sum of s; `h` is the derivative of the loss with
respect to S; `m`, `v` and `r` are the running maximum of |h|, its second moment
and the reward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
  """What the implementations of Algorithm 1 differ in.

  Attributes:
    s_1: s before the first update, in units of s_init.
    m_0: m before the first update.
    m_eps: what is added to |h| in m, in units of eps.
    clips_h: whether the reward sees h clipped to the last m.
    clamps_reward: whether r itself is kept at 0 or above; otherwise only the
      wealth is.
    decays_after_base: whether the decay term sees the parameters after the
      base's update instead of before.
  """

  s_1: float
  m_0: float
  m_eps: float
  clips_h: bool
  clamps_reward: bool
  decays_after_base: bool


RULES = {
  "optax": Rule(1.0, 0.0, 1.0, True, False, False),
  "pytorch": Rule(0.0, 1e-6, 0.0, False, True, True),
}


class TunerState(NamedTuple):
  """r_{t-1}, m_{t-1}, v_{t-1} and s_t, each [..., n], n being the betas'."""

  r: jax.Array
  m: jax.Array
  v: jax.Array
  s: jax.Array

  def resized(self, change: jax.Array) -> "TunerState":
    """Returns the state as if every h so far had been `change` times as large.

    The scale is then the same.

    Args:
      change: of the groups' shape.
    """
    change = change[..., None]
    return TunerState(
      self.r * change, self.m * change, self.v * change**2, self.s
    )


class Tuner(NamedTuple):
  """The constants of the algorithm.

  Attributes:
    betas: the decay rates of the n tuners whose scales are summed.
    eps: added to denominators.
    rule: the implementation that is followed.
    floor: whether S never falls below the initial scale.
  """

  betas: Sequence[float]
  eps: jax.typing.ArrayLike
  rule: Rule
  floor: bool

  def init(
    self,
    shape: tuple[int, ...],
    s_init: jax.typing.ArrayLike,
    dtype: jnp.dtype,
  ) -> TunerState:
    """Returns the state before the first update.

    Args:
      shape: of the groups; the state's arrays are [*shape, n].
      s_init: the initial scale, scalar.
      dtype: of the state.
    """
    full = lambda value: jnp.full([*shape, len(self.betas)], value, dtype)
    # With a floor, m_0 = 1e-6 would act as an |h| that never occurred.
    m_0 = 0.0 if self.floor else self.rule.m_0
    s_1 = full(self.rule.s_1) * jnp.asarray(s_init, dtype)
    return TunerState(r=full(0.0), m=full(m_0), v=full(0.0), s=s_1)

  def update(
    self,
    state: TunerState,
    h: jax.Array,
    s_init: jax.typing.ArrayLike,
  ) -> TunerState:
    """Returns the state after h_t, by the lines of Algorithm 1.

    Args:
      state: the state before.
      h: of the groups' shape.
      s_init: the initial scale, of that shape or a scalar.
    """
    n, rule = len(self.betas), self.rule
    h = h[..., None]
    # The rank of h, for jobs with jax_numpy_rank_promotion='raise'.
    beta = jnp.asarray(self.betas, h.dtype).reshape((1,) * (h.ndim - 1) + (n,))
    s_init = jnp.asarray(s_init, h.dtype)[..., None]

    # m_t = max(beta m_{t-1}, |h_t|)
    m = jnp.maximum(beta * state.m, jnp.abs(h) + rule.m_eps * self.eps)
    # v_t = beta^2 v_{t-1} + h_t^2
    v = beta**2 * state.v + h**2
    # r_t = max(0, beta r_{t-1} - s_t h_t)
    seen = jnp.clip(h, -state.m, state.m) if rule.clips_h else h
    r = beta * state.r - seen * state.s
    if rule.clamps_reward:
      r = jnp.maximum(r, 0.0)
    # W_t = s_init / n m_t + r_t
    W = s_init / n * m + jnp.maximum(r, 0.0)
    # s_{t+1} = W_t / (sqrt(v_t) + eps)
    s = W / (jnp.sqrt(v) + self.eps)
    if self.floor:
      S = jnp.sum(s, -1, keepdims=True)
      s = jnp.where(S > 0, s * jnp.maximum(1.0, s_init / S), s_init / n)
    return TunerState(r, m, v, s)
