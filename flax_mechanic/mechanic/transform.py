"""Mechanic, a learning rate tuner (Cutkosky, Defazio, Mehta 2023).

Paper: https://arxiv.org/abs/2306.00144, Algorithm 1. The letters are the
paper's: x0 is the reference point, Delta the sum of the base optimizer's
updates, `s` the learned scale, one entry a beta, and S its sum, so that the
parameters are x = x0 + S Delta; `h` is the tuner's own scalar gradient; `m`,
`v` and `r` are its running maximum, second moment and reward.

Before:
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, tuned_lr, ...))
After:
  tx = mechanize(optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, ...)))
"""

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_mechanic.mechanic.guard import guarded_update
from flax_mechanic.mechanic.sums import PAIRS, Sums, inner_products
from flax_mechanic.paths import parameter_path
from flax_mechanic.placement import Shardings


class MechanicState(NamedTuple):
  """State of `mechanize`; the fields up to `x0` and their order are optax's.

  Attributes:
    base_optimizer_state: the state of the wrapped transformation.
    count: int32 scalar, updates so far.
    r: reward of each beta, [num_betas].
    m: running maximum of |h| for each beta, [num_betas].
    v: running sum of h^2 for each beta, [num_betas].
    s: learned scale of each beta, [num_betas]; S is their sum.
    x0: the reference point, a tree like the parameters and of their dtypes; a
      leaf is `optax.MaskedNode()` where only Delta is kept.
    delta: Delta, a tree like the parameters, float32 or wider; a leaf is
      `optax.MaskedNode()` where it is recovered from x and x0.
    skipped: int32 scalar, gradients skipped so far.
    grad_norm: running mean of the gradient's norm, scalar; 0 at the start.
    scale: S as the parameters have it, x = x0 + scale Delta, scalar; the sum of
      s, except with `delayed_scale`.
    s_init: the initial scale that `relative_s_init` asks for, scalar; 0 until
      the base has moved the parameters.
    mean_norm: running mean of the gradient's norm, which starts with the first
      that is not 0; a new one weighs 1 / (count + 1). Scalar, 0 without
      `mean_decay`.

  With groups, a row of r, m, v and s and an entry of scale, s_init and
  mean_norm is that of a group: [groups, num_betas] and [groups].
  """

  base_optimizer_state: optax.OptState
  count: jax.Array
  r: jax.Array
  m: jax.Array
  v: jax.Array
  s: jax.Array
  x0: optax.Params
  delta: optax.Params
  skipped: jax.Array
  grad_norm: jax.Array
  scale: jax.Array
  s_init: jax.Array
  mean_norm: jax.Array


class _Rule(NamedTuple):
  """What the implementations of Algorithm 1 differ in.

  Attributes:
    s_start: s before the first update, over `s_init`.
    m_start: m before the first update.
    m_eps: what is added to |h| in m, over `eps`.
    clips: whether h is clipped to the last m in the reward.
    clamps: whether the reward is kept at 0 or above, or only in the wealth.
    decays_after_base: whether the decay term sees the parameters after the
      base's own update, or before.
    stores_delta: whether Delta is kept by default.
  """

  s_start: float
  m_start: float
  m_eps: float
  clips: bool
  clamps: bool
  decays_after_base: bool
  stores_delta: bool


_RULES = {
  "optax": _Rule(1.0, 0.0, 1.0, True, False, False, False),
  "pytorch": _Rule(0.0, 1e-6, 0.0, False, True, True, False),
  "paper": _Rule(0.0, 0.0, 0.0, False, True, False, True),
}

# What `x0_dtype` is for.
_WIDE = (jnp.float32, jnp.float64)

# How fast the running mean of the gradient's norm forgets, and how many times
# over it a gradient is a spike if nothing is said.
_NORM_DECAY = 0.9
_SPIKE_FACTOR = 1000.0

# With a relative initial scale: how far parameters must have moved over their
# norm, for their offset to be above float32's rounding; and how many times
# s_init the scale may rise to, tenfold a step, to get there.
_CLEAR = 2e-6
_RISE = 1e4
# How many updates there are at most in an offset that has just become clear.
_YOUNG = 10


def mechanize(
  base_optimizer: optax.GradientTransformation,
  weight_decay: jax.typing.ArrayLike = 1e-2,
  eps: jax.typing.ArrayLike = 1e-8,
  s_init: jax.typing.ArrayLike = 1e-6,
  num_betas: int = 6,
  *,
  betas: Sequence[float] | None = None,
  s_decay: jax.typing.ArrayLike | None = None,
  store_delta: bool | None = None,
  variant: Literal["optax", "paper", "pytorch"] = "optax",
  spike_factor: jax.typing.ArrayLike | None = None,
  x0_dtype: jax.typing.DTypeLike | None = None,
  delayed_scale: bool = False,
  relative_s_init: float | None = None,
  groups: str | Callable[[str], Hashable] = "",
  mean_decay: bool = False,
  tune_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Learns the scale of `base_optimizer`'s updates, that is its learning rate.

  Takes `optax.contrib.mechanize`'s arguments in its order and by default
  computes the same sequence to rounding. Beyond it:

  - The tuner and every inner product are float32, or float64 for float64
    parameters. A bfloat16 or float16 leaf keeps Delta in float32 beside x0, so
    that x = round(x0 + S Delta) loses nothing from step to step; the base sees
    float32 gradients and parameters, and keeps its state in float32.
  - A gradient with a NaN or an Inf, or too large to be squared, is skipped: the
    parameters, the tuner and the base stay as they are, `skipped` counts it. So
    is a finite spike (see `spike_factor`).
  - The state shares no buffer with the parameters, so that both can be donated.
    A step reads g, x and x0 for the inner products, all four in one pass and
    with one all-reduce (see `inner_products`), and x0 again with what the base
    reads; nothing else of the parameters' size is read or written.

  Give the base a schedule that peaks at 1.0. If the parameters are replaced
  between `init` and the first `update`, the replaced ones are the reference
  point. A zero gradient, an empty leaf, a scalar leaf and a tree without leaves
  are fine; a leaf whose gradient is None stays as it is.

  Args:
    base_optimizer: the transformation whose updates are scaled.
    weight_decay: lambda of the paper's decay term, a fraction; it is not the
      base's weight decay. It bounds S by about 1 / weight_decay; with 0, S is
      unbounded.
    eps: added to denominators and, in optax's rule, to |h|.
    s_init: the initial scale.
    num_betas: n, for betas 1 - 0.1^i with i = 1..n.
    betas: the betas themselves, in place of `num_betas`.
    s_decay: the PyTorch package's name of `weight_decay`; takes its place.
    store_delta: whether Delta is kept in place of x0, in the same memory. x0
      recovers it as (x - x0) / S, whose rounding errors grow as 1 / S; kept, it
      is exact and costs one more write. None is False, except for the paper's
      rule, which recovers nothing from S = 0.
    variant: the update rule. "optax" starts from s = s_init, clips h to the
      last m and clamps the reward in the wealth only; "pytorch", that of the
      package mechanic-pytorch (whose s_init is 1e-8), starts from s = 0 and
      m = 1e-6, does not clip, and decays with the parameters after the base's
      update; "paper" is Algorithm 1, with |h| in m as both have it.
    spike_factor: a finite gradient whose norm is over this many times its
      running mean is skipped too; 0 is never, None is 1000, or never with
      `delayed_scale`. A norm that stays high is accepted after a few steps.
    x0_dtype: of x0 where the parameters are float32 or float64, such as
      "bfloat16" to hold half a copy in place of a whole one. The parameters are
      rounded to it in the first update, once (bfloat16: by 0.2% at most), and
      from there the sequence is that of a full x0.
    delayed_scale: whether an update applies the scale learned from the
      gradients before this one, x_{t+1} = x0 + S_t Delta_{t+1}. The inner
      products then ride in the base's own pass, and no update waits for their
      all-reduce. There is no telling a bad gradient beforehand: entries that
      are NaN or too large to be squared count as 0, and the tuner skips the
      step, which `skipped` counts; the base does not. XLA:GPU cannot write the
      parameters in place in that pass: donated, they are copied once more.
    relative_s_init: rho; if given and not 0, the initial scale is the one with
      which an update moves the parameters by a fraction rho,
      rho (1 + |x|) / |u|, in place of `s_init`: the smallest so far, |u| being
      |Delta| / sqrt(count).
      It saves the steps in which s grows from 1e-6, and S stays above it.
      `weight_decay` then bounds S in units of that scale (1e-4 is good), so
      that all is the same whatever the base's learning rate. 0.01 is good,
      0.003 to 0.03 nearly the same.
    groups: which leaves share a scale. Each group has a tuner of its own, which
      sees a problem in its own variable, S_group, and so keeps the algorithm's
      guarantee for it. A regular expression, searched in a leaf's path: leaves
      with equal matches are a group, and so are all that do not match. "" is
      one group, ".*" one a leaf, r"blocks/\d+" one a block; or a function,
      path -> label.
    mean_decay: whether the decay term is in proportion to the mean norm of all
      gradients so far, in place of the present one's. Where gradients vanish,
      as on data that is learned by heart, it then holds the scale, which would
      grow for ever smaller gains in the loss.
    tune_steps: updates after which the scale stays as it is and the base goes
      on by itself; its inner products, but for the gradient's norm, are then
      computed no more. None is never.

  Returns:
    A transformation whose state is a `MechanicState`. Its `update` wants
    `params`, takes `shardings`, the `Shardings` of params on an Auto mesh, and
    hands other arguments on to the base.

  Raises:
    ValueError: an unknown variant, a number out of range, or options that
      exclude each other; by `update`, if `params` is not given.

  Example:
    >>> tx = mechanize(optax.adamw(1.0))
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state, params)
    >>> state.s.shape
    (6,)
  """
  if variant not in _RULES:
    raise ValueError(
      f"variant={variant!r} is not one of {', '.join(map(repr, _RULES))}"
    )
  rule = _RULES[variant]
  if store_delta is None:
    store_delta = rule.stores_delta
  if rule.stores_delta and not store_delta:
    raise ValueError("variant='paper' keeps Delta: leave store_delta out")
  if store_delta and x0_dtype is not None:
    raise ValueError("store_delta keeps no x0: leave x0_dtype out")
  if spike_factor is None:
    spike_factor = 0.0 if delayed_scale else _SPIKE_FACTOR
  skips_spikes = not isinstance(spike_factor, int | float) or spike_factor > 0
  if delayed_scale and skips_spikes:
    raise ValueError(
      "delayed_scale cannot tell a spike before it is applied: set "
      "spike_factor=0"
    )
  if x0_dtype is not None and not _is_float(x0_dtype):
    raise ValueError(
      f"x0_dtype={x0_dtype!r} must be a type of floats, such as 'bfloat16'"
    )
  if not 0 <= (relative_s_init or 0.0) < float("inf"):
    raise ValueError(
      f"relative_s_init={relative_s_init} must be above 0, or 0 for s_init"
    )
  if tune_steps is not None and tune_steps < 1:
    raise ValueError(f"tune_steps={tune_steps} must be at least 1, or None")
  if isinstance(groups, str):
    try:
      re.compile(groups)
    except re.error as error:
      raise ValueError(
        f"groups={groups!r} is not a regular expression: {error}"
      ) from None
  if betas is None:
    betas = [1.0 - 0.1**i for i in range(1, num_betas + 1)]
  if s_decay is not None:
    weight_decay = s_decay
  for name, value, low in (
    ("s_init", s_init, "above 0"),
    ("eps", eps, "above 0"),
    ("weight_decay", weight_decay, "at least 0"),
  ):
    # Arrays, as optax.inject_hyperparams hands them on, cannot be looked at.
    if isinstance(value, int | float) and (
      value < 0 or (low == "above 0" and value == 0)
    ):
      raise ValueError(f"{name}={value} must be {low}")
  if not betas or not all(
    isinstance(beta, int | float) and 0 < beta < 1 for beta in betas
  ):
    raise ValueError(
      f"betas={betas} must be numbers above 0 and below 1, at least one"
    )
  base_optimizer = optax.with_extra_args_support(base_optimizer)
  pairs = (*PAIRS, "dd") if relative_s_init else PAIRS

  def init(params: optax.Params) -> MechanicState:
    dtype = _tuner_dtype(params)
    members = _members(groups, params)
    shape = () if members is None else (max(members, default=-1) + 1,)
    full = lambda value: jnp.full([*shape, len(betas)], value, dtype)
    s = full(rule.s_start) * jnp.asarray(s_init, dtype)
    return MechanicState(
      base_optimizer_state=base_optimizer.init(
        jax.tree.map(lambda x: _wide(x, dtype), params)
      ),
      count=jnp.zeros([], jnp.int32),
      r=full(0.0),
      # An |h| of 1e-6 that never was is no part of a relative initial scale.
      m=full(0.0 if relative_s_init else rule.m_start),
      v=full(0.0),
      s=s,
      x0=_map(
        lambda x: (
          jnp.array(x, x0_dtype if x.dtype in _WIDE else x.dtype)
          if not (store_delta and _is_wide(x))
          else optax.MaskedNode()
        ),
        params,
      ),
      delta=_map(
        lambda x: (
          jnp.zeros_like(_wide(x, dtype))
          if store_delta or not _is_wide(x)
          else optax.MaskedNode()
        ),
        params,
      ),
      skipped=jnp.zeros([], jnp.int32),
      grad_norm=jnp.zeros([], dtype),
      scale=jnp.sum(s, -1),
      s_init=jnp.zeros(shape, dtype),
      mean_norm=jnp.zeros(shape, dtype),
    )

  def tune(
    state: MechanicState, h: jax.Array, start: jax.typing.ArrayLike
  ) -> MechanicState:
    """Returns the state with r, m, v and s moved by h, for an initial scale."""
    beta = jnp.asarray(betas, h.dtype)
    h, start = h[..., None], jnp.asarray(start, h.dtype)[..., None]
    m = jnp.maximum(beta * state.m, jnp.abs(h) + rule.m_eps * eps)
    v = beta**2 * state.v + h**2
    loss = jnp.clip(h, -state.m, state.m) if rule.clips else h
    r = beta * state.r - loss * state.s
    if rule.clamps:
      r = jnp.maximum(r, 0.0)
    wealth = start / len(betas) * m + jnp.maximum(r, 0.0)
    s = wealth / (jnp.sqrt(v) + eps)
    if relative_s_init:
      # What is relative is right enough never to be gone below.
      S = jnp.sum(s, -1, keepdims=True)
      lift = jnp.maximum(1.0, start / S)
      s = jnp.where(S > 0, s * lift, start / len(betas))
    return state._replace(r=r, m=m, v=v, s=s)

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    shardings: Shardings | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, MechanicState]:
    if params is None:
      raise ValueError(
        "mechanize needs params: tx.update(grads, state, params)"
      )
    dtype = state.s.dtype
    first = state.count == 0
    x0 = _reference_point(first, params, state.x0)
    # x is x0 + S Delta; recovered from it, Delta is (x - x0) / (S + pad), and
    # so optax's rule has it shrink every step.
    pad = 0.0 if store_delta and variant != "optax" else eps
    members = _members(groups, params)
    S = _spread(state.scale, members, params)

    def exact_x(x, x0, delta, S):
      if _absent(x0) or _absent(delta):
        return _wide(x, dtype)
      return _wide(x0, dtype) + S * delta

    def last_delta(x, x0, delta, S):
      if not _absent(delta):
        return delta * (S / (S + pad) if pad else 1.0)
      moved = (_wide(x, dtype) - _wide(x0, dtype)) / (S + pad)
      return moved if x.dtype == x0.dtype else jnp.where(first, 0.0, moved)

    g = _map(
      lambda x, g: _wide(jnp.zeros_like(x) if g is None else g, dtype),
      params,
      updates,
    )
    x = _map(exact_x, params, x0, state.delta, S)
    base_update = lambda g, base_state, x: base_optimizer.update(
      g, base_state, x, **extra_args
    )

    # h = <Delta, g + decay x> by linearity: the decayed gradient is never
    # formed.
    decayed = x
    if rule.decays_after_base:
      u, _ = base_update(g, state.base_optimizer_state, x)
      decayed = _map(jnp.add, x, u)
    products = functools.partial(
      inner_products, dtype=dtype, shardings=shardings, groups=members
    )

    def all_products() -> Sums:
      delta = _map(last_delta, params, x0, state.delta, S)
      return products(g, decayed, delta, pairs=pairs)

    def norm_alone() -> Sums:
      (gg,) = products(g, g, g, pairs=pairs[:1])
      return gg, *(jnp.ones_like(gg) for _ in pairs[1:])

    if tune_steps is None:
      tuning, sums = True, all_products()
    else:
      tuning = state.count < tune_steps
      sums = jax.lax.cond(tuning, all_products, norm_alone)
    gg, xx, gd, xd, *dd = sums
    decay, start, known = weight_decay * state.scale, s_init, state.s_init
    if relative_s_init:
      unit = jnp.where(known > 0, known, jnp.inf)
      decay /= unit
      # Of a group whose first gradients come late, Delta is younger than count.
      young = jnp.clip(state.count, 1, _YOUNG)
      steps = jnp.where(known > 0, state.count, young).astype(dtype)
      start = relative_s_init * (1 + jnp.sqrt(xx)) * jnp.sqrt(steps / dd[0])
      # Recovered from parameters that hardly moved, Delta is all rounding.
      clear = state.scale * jnp.sqrt(dd[0]) > _CLEAR * jnp.sqrt(xx)
      known = jnp.where(clear, jnp.minimum(unit, start), known)
      rising = s_init * jnp.minimum(10.0**state.count, _RISE)
      start = jnp.where(known > 0, known, rising)
    norm, mean_norm = jnp.sqrt(gg), state.mean_norm
    if mean_decay:
      # From the first gradient that there is, as of a tuner that was adopted.
      moved = mean_norm + (norm - mean_norm) / (state.count + 1)
      mean_norm = norm = jnp.where(mean_norm > 0, moved, norm)
    h = gd + decay * norm / (jnp.sqrt(xx) + eps) * xd
    tuned = tune(state, h, start)

    norm_g = jnp.sqrt(jnp.sum(gg))
    finite = jnp.isfinite(norm_g) & jnp.all(jnp.isfinite(h))
    usual = jnp.asarray(jnp.inf, dtype)
    if skips_spikes:
      mean = state.grad_norm
      usual = jnp.where(mean > 0, spike_factor * mean, jnp.inf)
    ok = finite & (norm_g <= usual)
    if delayed_scale:
      new_scale = jnp.where(first, s_init, jnp.sum(state.s, -1)).astype(dtype)
      hold = lambda new, old: new
      u, base_state = base_update(
        _map(_squarable, g), state.base_optimizer_state, x
      )
    else:
      # Or XLA:CPU computes the scalars anew in each leaf's fusion (jax 0.12).
      new_scale = jnp.where(tuning, jnp.sum(tuned.s, -1), state.scale)
      ok, new_scale = jax.lax.optimization_barrier((ok, new_scale))
      hold = lambda new, old: jnp.where(ok, new, old)
      u, base_state = guarded_update(
        base_update, hold, g, state.base_optimizer_state, x
      )

    def next_delta(x, delta, u, g, S):
      if _absent(delta) or g is None:
        return delta
      return hold(last_delta(x, x, delta, S) + u, delta)

    new_delta = _map(next_delta, params, state.delta, u, updates, S)

    def step(x, x0, new_delta, u, g, S, new_S):
      if g is None:
        return jnp.zeros_like(x)
      if _absent(x0):
        # new_S Delta_{t+1} - S Delta_t without Delta_t, which is overwritten.
        moved = (new_S - (S + pad)) * new_delta + (S + pad) * u
      elif _absent(new_delta):
        # Written the other way round than in `last_delta`, so that XLA has
        # nothing to share between the two passes and so to write out.
        back = (_wide(x0, dtype) - _wide(x, dtype)) / (S + pad)
        if x.dtype != x0.dtype:
          back = jnp.where(first, 0.0, back)
        moved = _wide(x0, dtype) + new_S * (u - back) - _wide(x, dtype)
      else:
        new_x = (_wide(x0, dtype) + new_S * new_delta).astype(x.dtype)
        moved = _wide(new_x, dtype) - _wide(x, dtype)
      return hold(moved, 0.0).astype(x.dtype)

    keep = lambda new, old: jnp.where(ok & tuning, new, old)
    return (
      _map(
        step,
        params,
        x0,
        new_delta,
        u,
        updates,
        S,
        _spread(new_scale, members, params),
      ),
      MechanicState(
        base_optimizer_state=base_state,
        count=hold(jnp.asarray(optax.safe_increment(state.count)), state.count),
        r=keep(tuned.r, state.r),
        m=keep(tuned.m, state.m),
        v=keep(tuned.v, state.v),
        s=keep(tuned.s, state.s),
        x0=x0,
        delta=new_delta,
        skipped=state.skipped + jnp.where(ok, 0, 1),
        grad_norm=jnp.where(
          finite,
          _mean_norm(state.grad_norm, jnp.minimum(norm_g, usual)),
          state.grad_norm,
        ),
        scale=hold(new_scale, state.scale),
        s_init=keep(known, state.s_init),
        mean_norm=keep(mean_norm, state.mean_norm),
      ),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _reference_point(
  first: jax.Array, params: optax.Params, x0: optax.Params
) -> optax.Params:
  """Returns x0, or at the first update the parameters.

  Donated, x0 is not copied; a `where` would write it every step.
  """
  replaced = lambda: _map(
    lambda x, x0: x0 if _absent(x0) else x.astype(x0.dtype), params, x0
  )
  x0 = jax.lax.cond(first, replaced, lambda: x0)
  # Or XLA:TPU widens a low-precision x0 in the conditional and so writes it out
  # in float32 (libtpu 0.0.51).
  return jax.lax.optimization_barrier(x0)


def _members(
  groups: str | Callable[[str], Hashable], params: optax.Params
) -> list[int] | None:
  """Returns the group of each leaf, from 0; None if there is but one group."""
  if not groups:
    return None
  paths = [
    parameter_path(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  if callable(groups):
    labels = [groups(path) for path in paths]
  else:
    found = (re.search(groups, path) for path in paths)
    labels = [match and match.group() for match in found]
  numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
  return [numbers[label] for label in labels]


def _spread(
  values: jax.Array, members: Sequence[int] | None, params: optax.Params
) -> Any:
  """Returns a tree like `params` of each leaf's entry in its group's values."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten(
    [values] * len(leaves)
    if members is None
    else [values[group] for group in members]
  )


def _is_float(dtype: jax.typing.DTypeLike) -> bool:
  try:
    return jnp.issubdtype(dtype, jnp.floating)
  except TypeError:  # The name of no type.
    return False


def _is_wide(x: jax.Array) -> bool:
  return jnp.finfo(x.dtype).bits >= 32


def _absent(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def _map(f: Callable[..., Any], params: optax.Params, *trees: Any) -> Any:
  """Maps over the leaves of `params` and what the trees hold in their places.

  Unlike in `jax.tree.map`, that may be None or a node without leaves.
  """
  leaves, treedef = jax.tree.flatten(params)
  others = [treedef.flatten_up_to(tree) for tree in trees]
  return treedef.unflatten(list(map(f, leaves, *others)))


def _mean_norm(mean: jax.Array, norm: jax.Array) -> jax.Array:
  moved = _NORM_DECAY * mean + (1 - _NORM_DECAY) * norm
  return jnp.where(mean > 0, moved, norm)


def _tuner_dtype(params: optax.Params) -> jnp.dtype:
  """Returns float32, or float64 if a leaf is that wide."""
  leaves = jax.tree.leaves(params)
  return jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype


def _wide(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, dtype))


def _squarable(g: jax.Array) -> jax.Array:
  """Returns g with 0 for what is NaN or too large to be squared."""
  limit = jnp.sqrt(jnp.finfo(g.dtype).max)
  return jnp.where(jnp.abs(g) < limit, g, 0.0)
