"""Mechanic, a learning rate tuner (Cutkosky, Defazio, Mehta 2023).

Paper: https://arxiv.org/abs/2306.00144, Algorithm 1. The letters are the
paper's: `s` is the learned scale, one entry a beta, whose sum S multiplies the
base optimizer's updates; `h` is the tuner's own scalar gradient; `m`, `v` and
`r` are its running maximum, second moment and reward.

Before:
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, tuned_lr, ...))
After:
  tx = mechanize(optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, ...)))
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MechanicState(NamedTuple):
  """State of `mechanize`; fields, names and order are optax's.

  Attributes:
    base_optimizer_state: the state of the wrapped transformation.
    count: int32 scalar, updates so far.
    r: reward of each beta, [num_betas].
    m: running maximum of |h| for each beta, [num_betas].
    v: running sum of h^2 for each beta, [num_betas].
    s: learned scale of each beta, [num_betas]; S is their sum.
    x0: the reference point, a tree like the parameters and of their dtypes.
  """

  base_optimizer_state: optax.OptState
  count: jax.Array
  r: jax.Array
  m: jax.Array
  v: jax.Array
  s: jax.Array
  x0: optax.Params


def mechanize(
  base_optimizer: optax.GradientTransformation,
  weight_decay: jax.typing.ArrayLike = 1e-2,
  eps: jax.typing.ArrayLike = 1e-8,
  s_init: jax.typing.ArrayLike = 1e-6,
  num_betas: int = 6,
) -> optax.GradientTransformationExtraArgs:
  """Learns the scale of `base_optimizer`'s updates, that is its learning rate.

  Takes `optax.contrib.mechanize`'s arguments in its order and computes the same
  sequence to rounding. Beyond it: the tuner's scalars and inner products are
  float32 or wider whatever the parameters are, the state shares no buffer with
  the parameters (so that both can be donated), and no inner product flattens a
  leaf (so that sharded leaves are reduced where they lie, on Auto and on
  Explicit meshes).

  Give the base a schedule that peaks at 1.0. If the parameters are replaced
  between `init` and the first `update`, the replaced ones are the reference
  point.

  Args:
    base_optimizer: the transformation whose updates are scaled.
    weight_decay: lambda of the paper's decay term, a fraction; it is not the
      base's weight decay.
    eps: added to denominators and to |h|.
    s_init: the initial scale.
    num_betas: n, for betas 1 - 0.1^i with i = 1..n.

  Returns:
    A transformation whose state is a `MechanicState`. Its `update` wants
    `params` and hands extra arguments on to the base.

  Raises:
    ValueError: by `update`, if `params` is not given.

  Example:
    >>> tx = mechanize(optax.adamw(1.0))
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state, params)
    >>> state.s.shape
    (6,)
  """
  base_optimizer = optax.with_extra_args_support(base_optimizer)

  def init(params: optax.Params) -> MechanicState:
    dtype = _tuner_dtype(params)
    zeros = lambda: jnp.zeros([num_betas], dtype)
    return MechanicState(
      base_optimizer_state=base_optimizer.init(params),
      count=jnp.zeros([], jnp.int32),
      r=zeros(),
      m=zeros(),
      v=zeros(),
      s=zeros() + jnp.asarray(s_init, dtype),
      x0=jax.tree.map(jnp.copy, params),
    )

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, MechanicState]:
    if params is None:
      raise ValueError(
        "mechanize needs params: tx.update(grads, state, params)"
      )
    dtype = state.s.dtype
    base_updates, base_optimizer_state = base_optimizer.update(
      updates, state.base_optimizer_state, params, **extra_args
    )
    x0 = jax.lax.cond(state.count == 0, lambda: params, lambda: state.x0)

    # The offset recovered from the parameters is -delta in the paper's sign,
    # as optax's updates already point downhill.
    S = jnp.sum(state.s)
    offset = jax.tree.map(
      lambda x0, x: (_wide(x0, dtype) - _wide(x, dtype)) / (S + eps), x0, params
    )

    # h = <g + decay x, offset> by linearity: the decayed gradient is never
    # formed, and all four sums read each leaf once.
    norm_g = jnp.sqrt(_vdot(updates, updates, dtype))
    norm_x = jnp.sqrt(_vdot(params, params, dtype))
    decay = weight_decay * S * norm_g / (norm_x + eps)
    h = _vdot(updates, offset, dtype) + decay * _vdot(params, offset, dtype)

    betas = 1.0 - 0.1 ** jnp.arange(1, num_betas + 1, dtype=dtype)
    m = jnp.maximum(betas * state.m, jnp.abs(h) + eps)
    v = betas**2 * state.v + h**2
    # Clipping h to the previous m is optax's addition to the paper.
    r = betas * state.r + jnp.clip(h, -state.m, state.m) * state.s
    wealth = jnp.asarray(s_init, dtype) / num_betas * m + jnp.maximum(r, 0.0)
    s = wealth / (jnp.sqrt(v) + eps)

    new_S = jnp.sum(s)
    new_updates = jax.tree.map(
      lambda x0, x, delta, u: (
        _wide(x0, dtype) - new_S * (delta - u) - _wide(x, dtype)
      ).astype(x.dtype),
      x0,
      params,
      offset,
      base_updates,
    )
    return new_updates, MechanicState(
      base_optimizer_state=base_optimizer_state,
      count=jnp.asarray(optax.safe_increment(state.count)),
      r=r,
      m=m,
      v=v,
      s=s,
      x0=x0,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _tuner_dtype(params: optax.Params) -> jnp.dtype:
  """Returns float32, or float64 if a leaf is that wide."""
  leaves = jax.tree.leaves(params)
  return jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype


def _wide(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, dtype))


def _vdot(a: optax.Params, b: optax.Params, dtype: jnp.dtype) -> jax.Array:
  """Returns Re <a, b> summed over all leaves, accumulated in `dtype`.

  `optax.tree.vdot` ravels each leaf on jax 0.10 and newer (optax 0.2.8; fixed
  in its repository), which gathers leaves that are sharded over two axes and
  raises on Explicit meshes.
  """

  def leaf(a, b):
    product = _wide(a, dtype) * _wide(jnp.conj(b), dtype)
    return jnp.sum(jnp.real(product))

  return jax.tree.reduce(
    operator.add, jax.tree.map(leaf, a, b), jnp.zeros([], dtype)
  )
