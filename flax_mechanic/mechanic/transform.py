"""Mechanic, a learning rate tuner (Cutkosky, Defazio, Mehta 2023).

Paper: https://arxiv.org/abs/2306.00144, Algorithm 1. The letters are the
paper's: x0 is the reference point, Delta the sum of the base optimizer's
updates, `s` the learned scale, with one entry per beta, and S its sum, so that
the parameters are x = x0 + S Delta. `tuner` learns s, `offset` knows Delta,
`sums` makes the inner products.

Before:
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, tuned_lr, ...))
After:
  tx = mechanize(optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, ...)))
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mechanic.extra_args import accepted
from flax_mechanic.mechanic import gain, initial_scale, offset, sizes
from flax_mechanic.mechanic.boxes import without_empty_boxes
from flax_mechanic.mechanic.groups import Groups
from flax_mechanic.mechanic.held import Restart, held_update
from flax_mechanic.mechanic.last import refuse_what_follows
from flax_mechanic.mechanic.offset import widen
from flax_mechanic.mechanic.sums import PAIRS, inner_products
from flax_mechanic.mechanic.tuner import RULES, Tuner, TunerState
from flax_mechanic.paths import parameter_path
from flax_mechanic.placement import Shardings, is_abstract


class MechanicState(NamedTuple):
  """State of `mechanize`; the fields up to `x0` and their order are optax's.

  Attributes:
    base_optimizer_state: the state of the wrapped transformation.
    count: int32 scalar, updates so far.
    r: reward of each beta, [num_betas].
    m: running maximum of |h| for each beta, [num_betas].
    v: running sum of h^2 for each beta, [num_betas].
    s: learned scale of each beta, [num_betas]; S is their sum, or with
      `schedule` on its way to it.
    x0: the reference point, a tree like the parameters.
    delta: Delta in float32, a tree like the parameters; a leaf is
      `optax.MaskedNode()` where the parameter is float32 or wider, since Delta
      is then recovered from x and x0.
    sizes: what is known about the gradients' sizes, of the whole and of each
      group, by which bad ones are told.
    scale: S as the parameters have it, x = x0 + scale Delta, scalar; without
      `schedule` the sum of s.
    initial_scale: what `relative_s_init` measured, scalar; 0 until the base has
      moved the parameters measurably.
    mean_norm: mean of the gradient's norm over all gradients since the first
      that was not 0, scalar; 0 without `mean_decay`.

  With groups, r, m, v and s have a row for each group, [groups, num_betas], and
  scale, initial_scale and mean_norm an entry, [groups].
  """

  base_optimizer_state: optax.OptState
  count: jax.Array
  r: jax.Array
  m: jax.Array
  v: jax.Array
  s: jax.Array
  x0: optax.Params
  delta: optax.Params
  sizes: sizes.Sizes
  scale: jax.Array
  initial_scale: jax.Array
  mean_norm: jax.Array

  @property
  def tuner(self) -> TunerState:
    """The fields that Algorithm 1 moves."""
    return TunerState(self.r, self.m, self.v, self.s)

  @property
  def skipped(self) -> jax.Array:
    """How many gradients were skipped so far, int32 scalar."""
    return self.sizes.skipped


def mechanize(
  base_optimizer: optax.GradientTransformation,
  weight_decay: jax.typing.ArrayLike = 1e-2,
  eps: jax.typing.ArrayLike = 1e-8,
  s_init: jax.typing.ArrayLike = 1e-6,
  num_betas: int = 6,
  *,
  betas: Sequence[float] | None = None,
  variant: Literal["optax", "pytorch"] = "optax",
  spike_factor: float | jax.Array = sizes.FACTOR,
  x0_dtype: jax.typing.DTypeLike | None = None,
  relative_s_init: jax.typing.ArrayLike | None = None,
  groups: str | Callable[[str], Hashable] = "",
  mean_decay: bool = False,
  schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Learns the scale of `base_optimizer`'s updates, that is its learning rate.

  Takes `optax.contrib.mechanize`'s arguments in its order and by default
  computes the same sequence to rounding. Beyond it:

  - The tuner and every inner product are float32, or float64 for float64
    parameters. A bfloat16 or float16 leaf keeps Delta in float32 beside x0, so
    that x = round(x0 + S Delta) loses nothing from step to step; the base sees
    float32 gradients and parameters and keeps its state in float32.
  - A gradient with a NaN or an Inf, one too large to be squared, or a spike
    (see `spike_factor`) is skipped: the parameters, the tuner and the base stay
    as they are, but for schedules, and `state.sizes.skipped` counts it. If the
    first gradients turn out to have been spikes, everything is put back to the
    start, the parameters too. Zeros in front of the first gradient are skipped.
  - The state shares no buffer with the parameters, so both can be donated. A
    step reads g, x and x0 once for the inner products and x0 once more in the
    base's pass; it reads and writes nothing else of the parameters' size. The
    inner products take one all-reduce.

  Give the base a schedule that peaks at 1.0. Nothing may change the updates on
  their way to the parameters, from which Delta is recovered: in an
  `optax.chain` it comes last, and what would follow it (`optax.ema`, a scale)
  goes in front of it or into its base. If the parameters are replaced
  between `init` and the first `update`, the new ones are the reference point.
  Zero gradients, empty leaves, scalar leaves and trees without leaves are fine;
  a leaf whose gradient is None stays as it is. The norm of a gradient whose
  values are below about 1e-19 is 0, since float32 has no squares of them.

  Args:
    base_optimizer: the transformation whose updates are scaled.
    weight_decay: lambda of the paper's decay term, a fraction; not the base's
      weight decay. It bounds S by about 1 / weight_decay; with 0, S is
      unbounded.
    eps: added to denominators and, in optax's rule, to |h|.
    s_init: the initial scale.
    num_betas: n, for betas 1 - 0.1^i with i = 1..n.
    betas: the betas themselves, in place of `num_betas`.
    variant: the update rule. "optax" starts from s = s_init, clips h to the
      last m and clamps the reward in the wealth only; "pytorch", that of the
      package mechanic-pytorch (whose s_init is 1e-8), starts from s = 0 and
      m = 1e-6, does not clip, and decays with the parameters after the base's
      update.
    spike_factor: a finite gradient is a spike if its norm exceeds this many
      times the largest one of late, or that of a group of leaves twice as many;
      among the first ten, up to ten times more. A norm that stays high is
      accepted after 25 steps. 0 skips none.
    x0_dtype: of x0 where the parameters are float32 or float64. "bfloat16"
      saves half a copy of the parameters in memory, and an update over adamw
      moves 10 copies instead of 11. The first update rounds the parameters to
      it once (bfloat16: by 0.2% at most); the sequence from there is that of a
      full x0.
    relative_s_init: rho; if not None or 0, the initial scale is the one with
      which an update moves the parameters by the fraction rho,
      rho (1 + |x|) / |u|, in place of `s_init`: the smallest so far, |u| being
      |Delta| / sqrt(count). S never falls below it, and `weight_decay` bounds S
      in units of it (1e-4 is good), which makes the base's learning rate
      irrelevant. It saves the steps in which s grows from 1e-6: without it the
      loss on the sweep's jobs is 1.10 times as high. 0.01 is good; 0.003 to
      0.03 are nearly the same there, but fine-tuning with 0.03 can fail.
    groups: which leaves share a scale. Each group has its own tuner, which sees
      a problem in its own variable, S_group, and keeps the algorithm's
      guarantee for it. A regular expression, searched in a leaf's path: leaves
      with equal matches are a group, and so are all that do not match. "" is
      one group, ".*" one per leaf, r"blocks/\d+" one per block; or a function,
      path -> label. With one scale the sweep's loss is 1.02 times that of one
      per leaf.
    mean_decay: whether the decay term is proportional to the mean norm of all
      gradients so far instead of the present one's. Where gradients vanish, as
      on data that is memorized, it keeps the scale from growing forever: the
      held-out loss of the sweep's memorizing jobs is 1.73 times as high without
      it.
    schedule: the base's. If it is given, S goes only a part of the way to the
      sum of s, the present learning rate over the largest so far. Otherwise
      (S_{t+1} - S_t) Delta_t moves the parameters at the end of a run as much
      as before, when the base's own updates have vanished.

  Returns:
    A transformation whose state is a `MechanicState`. Its `init` takes
    `jax.ShapeDtypeStruct`s too and then returns them. Its `update` needs
    `params`, takes `shardings`, the `Shardings` of params on an Auto mesh, and
    passes other arguments on to the base.

  Raises:
    ValueError: an unknown variant or a value out of range; by `init`, a
      parameter that is no float of 16 bits or more, or a `schedule` and a base
      without one; by `update`, if `params` is not given.
    UsageError: by `update`, if another transformation follows in an
      `optax.chain`.

  Example:
    >>> tx = mechanize(optax.adamw(1.0))
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state, params)
    >>> state.s.shape
    (6,)
  """
  if not all(hasattr(base_optimizer, name) for name in ("init", "update")):
    raise ValueError(
      f"mechanize takes a transformation, such as optax.adamw(1.0), not "
      f"{base_optimizer!r}"
    )
  betas = _checked_betas(betas, num_betas)
  _check_numbers(
    weight_decay=weight_decay,
    eps=eps,
    s_init=s_init,
    spike_factor=spike_factor,
    relative_s_init=relative_s_init,
  )
  _check_options(variant, x0_dtype, groups, schedule)
  off = isinstance(relative_s_init, _Real) and relative_s_init == 0
  rho = None if off else relative_s_init
  mechanic = _Mechanic(
    base=optax.with_extra_args_support(base_optimizer),
    tuner=Tuner(betas, eps, RULES[variant], floor=rho is not None),
    weight_decay=weight_decay,
    s_init=s_init,
    rho=rho,
    spike_factor=spike_factor,
    x0_dtype=x0_dtype,
    groups=groups,
    mean_decay=mean_decay,
    schedule=schedule,
  )
  return without_empty_boxes(
    optax.GradientTransformationExtraArgs(mechanic.init, mechanic.update)
  )


class _Learned(NamedTuple):
  """What an update does, as far as the inner products decide it.

  Attributes:
    ok: whether the gradient is used, bool scalar.
    restart: whether everything goes back to the start, likewise.
    forget: whether the base goes back to its start, likewise.
    S: the new scale, of the groups' shape.
    fields: the state's new fields, those of the parameters' size aside.
  """

  ok: jax.Array
  restart: jax.Array
  forget: jax.Array
  S: jax.Array
  fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Mechanic:
  """The transformation; the fields are `mechanize`'s arguments, checked."""

  base: optax.GradientTransformationExtraArgs
  tuner: Tuner
  weight_decay: jax.typing.ArrayLike
  s_init: jax.typing.ArrayLike
  rho: jax.typing.ArrayLike | None
  spike_factor: float | jax.Array
  x0_dtype: jax.typing.DTypeLike | None
  groups: str | Callable[[str], Hashable]
  mean_decay: bool
  schedule: optax.Schedule | None

  def init(self, params: optax.Params) -> MechanicState:
    if is_abstract(params):
      return jax.eval_shape(self.init, params)
    params = jax.tree.map(jnp.asarray, params)  # Some may be Python's numbers.
    _check_dtypes(params)
    dtype = _tuner_dtype(params)
    shape = Groups.of(self.groups, params).shape
    x0, delta = offset.init(params, self.x0_dtype, dtype)
    wide = jax.tree.map(lambda x: widen(x, dtype), params)
    base_state = self.base.init(wide)
    if self.schedule is not None:
      gain.check(base_state)
    return MechanicState(
      base_state,
      x0=x0,
      delta=delta,
      sizes=sizes.init(math.prod(shape), dtype),
      **self._start(shape, dtype),
    )

  def update(
    self,
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
    refuse_what_follows()
    params, updates = jax.tree.map(jnp.asarray, (params, updates))
    groups, dtype = Groups.of(self.groups, params), state.s.dtype
    x0 = offset.reference_point(state.count == 0, params, state.x0)
    offsets = self._offsets(params, x0, state, groups)

    g = _map(
      lambda x, g: widen(jnp.zeros_like(x) if g is None else g, dtype),
      params,
      updates,
    )
    x = jax.tree.map(lambda leaf: leaf.position, offsets)
    if shardings is not None:
      extra_args |= accepted(self.base, {"shardings": shardings})
    base_update = functools.partial(self.base.update, **extra_args)
    decayed = x
    if self.tuner.rule.decays_after_base:
      u, _ = base_update(g, state.base_optimizer_state, x)
      decayed = jax.tree.map(jnp.add, x, u)
    sums = inner_products(
      g,
      decayed,
      jax.tree.map(lambda leaf: leaf.delta, offsets),
      dtype,
      shardings,
      groups=groups,
      pairs=PAIRS if self.rho is None else (*PAIRS, "dd"),
    )
    learned = self._learn(sums, state)
    accept = lambda new, old: jnp.where(learned.ok, new, old)

    # The base receives g_t and sends u_t.
    u, base_state = held_update(
      base_update,
      accept,
      g,
      state.base_optimizer_state,
      x,
      Restart(learned.forget, self.base.init(x)),
    )
    u = _map(lambda _, g, u: None if g is None else u, params, updates, u)
    # Delta_{t+1} = Delta_t + u_t, x_{t+1} = x0 + S_{t+1} Delta_{t+1}
    S = groups.spread(learned.S, params)
    moved, delta = offset.advance(offsets, u, S, accept, learned.restart)
    return moved, state._replace(
      base_optimizer_state=base_state, x0=x0, delta=delta, **learned.fields
    )

  def _learn(self, sums: Sequence[jax.Array], state: MechanicState) -> _Learned:
    """Judges a gradient and learns s from it, both by its inner products."""
    # v is checked before it is stored, since an infinite v would stay so. This
    # h assumes that sizes have not changed.
    h, *_ = self._h(sums, state, jnp.ones([]))
    v = jnp.max(state.v, -1) + jnp.square(h)
    verdict, known = sizes.judge(
      state.sizes,
      sums[0],
      self.spike_factor,
      finite=jnp.all(jnp.isfinite(jnp.stack([*sums, v]))),
      # Only early in a run is x0 its start; an adopted run's is older.
      may_restart=state.count < sizes.YOUNG,
    )
    change = verdict.change[1:].reshape(state.scale.shape)
    h, s_init, memory = self._h(sums, state, change)
    tuned = self.tuner.update(state.tuner.resized(change), h, s_init)
    # Without the barrier XLA:CPU computes the scalars anew in each leaf's
    # fusion (jax 0.12).
    ok, restart, forget, S = jax.lax.optimization_barrier(
      (
        verdict.ok,
        verdict.restart,
        # What the base remembers of gradients of another size misleads it.
        verdict.restart | verdict.lasting,
        self._scale(tuned, state),
      )
    )
    new = {
      "count": optax.safe_increment(state.count),
      "scale": S,
      **tuned._asdict(),
      **memory,
    }
    start = self._start(S.shape, S.dtype)
    fields = {
      name: jnp.where(
        ok, value, jnp.where(restart, start[name], getattr(state, name))
      )
      for name, value in new.items()
    }
    return _Learned(ok, restart, forget, S, fields | {"sizes": known})

  def _scale(self, tuned: TunerState, state: MechanicState) -> jax.Array:
    """Returns S_{t+1}: the sum of s_{t+1}, or a part of the way to it."""
    total = jnp.sum(tuned.s, -1)
    if self.schedule is None:
      return total
    fraction = gain.of(self.schedule, state.base_optimizer_state)
    fraction = fraction.astype(total.dtype)
    return (1 - fraction) * state.scale + fraction * total

  def _start(
    self, shape: tuple[int, ...], dtype: jnp.dtype
  ) -> dict[str, jax.Array]:
    """Returns the fields that an update changes, before the first one."""
    tuner = self.tuner.init(shape, self.s_init, dtype)
    return {
      "count": jnp.zeros([], jnp.int32),
      **tuner._asdict(),
      "scale": jnp.sum(tuner.s, -1),
      "initial_scale": jnp.zeros(shape, dtype),
      "mean_norm": jnp.zeros(shape, dtype),
    }

  def _offsets(
    self,
    params: optax.Params,
    x0: optax.Params,
    state: MechanicState,
    groups: Groups,
  ) -> Any:
    """Returns a tree of `offset.Recovered` and `offset.Kept`."""

    def of_leaf(x, x0, delta, S, inverse):
      if isinstance(delta, optax.MaskedNode):
        first = state.count == 0
        return offset.Recovered(x, x0, S, inverse, state.s.dtype, first)
      return offset.Kept(x, x0, S, self.tuner.eps, state.s.dtype, delta)

    S = state.scale
    inverse = groups.spread(1 / (S + self.tuner.eps), params)
    S = groups.spread(S, params)
    return _map(of_leaf, params, x0, state.delta, S, inverse)

  def _h(
    self, sums: Sequence[jax.Array], state: MechanicState, change: jax.Array
  ) -> tuple[jax.Array, jax.typing.ArrayLike, dict[str, jax.Array]]:
    """Returns h_t, the initial scale, and the fields of the state behind both.

    h_t = <Delta_t, g_t + lambda S |g_t| x_t / |x_t|>, by linearity: the decayed
    gradient is never formed.
    """
    gg, xx, gd, xd, *dd = sums
    g_norm, x_norm = jnp.sqrt(gg), jnp.sqrt(xx)
    decay, s_init = self.weight_decay * state.scale, self.s_init
    measured, mean_norm = state.initial_scale, state.mean_norm * change
    if self.rho is not None:
      decay /= jnp.where(measured > 0, measured, jnp.inf)
      measured, s_init = initial_scale.measure(
        measured,
        rho=self.rho,
        s_init=s_init,
        count=state.count,
        S=state.scale,
        x_norm=x_norm,
        delta_squared=dd[0],
        begun=(gg > 0) | (state.sizes.largest[1:].reshape(gg.shape) > 0),
      )
    if self.mean_decay:
      g_norm = mean_norm = _mean(mean_norm, g_norm, state.count + 1)
    h = gd + decay * g_norm / (x_norm + self.tuner.eps) * xd
    return h, s_init, {"initial_scale": measured, "mean_norm": mean_norm}


_Real = int | float | np.integer | np.floating

# Where 0 may be given, and what it stands for.
_ZEROS = {
  "weight_decay": "no decay",
  "spike_factor": "no spikes",
  "relative_s_init": "s_init",
}


def _check_numbers(**values: Any) -> None:
  for name, value in values.items():
    # Arrays, as optax.inject_hyperparams passes them, cannot be looked at.
    if not isinstance(value, _Real):
      continue
    if not (0 < value < math.inf or (name in _ZEROS and value == 0)):
      zero = f", or 0 for {_ZEROS[name]}" if name in _ZEROS else ""
      raise ValueError(f"{name}={value} must be above 0 and finite{zero}")


def _checked_betas(betas: Any, num_betas: Any) -> Sequence[float]:
  """Returns the betas, or those that `num_betas` stands for."""
  if betas is None:
    # In float64 the next one rounds to 1; in float32, those from the eighth on.
    if not isinstance(num_betas, int | np.integer) or not 1 <= num_betas <= 16:
      raise ValueError(
        f"num_betas={num_betas} must be a whole number from 1 to 16"
      )
    return [1.0 - 0.1**i for i in range(1, num_betas + 1)]
  given = list(betas) if np.iterable(betas) else []
  if not given or not all(
    isinstance(beta, _Real) and 0 < beta < 1 for beta in given
  ):
    raise ValueError(
      f"betas={betas} must be numbers above 0 and below 1, at least one, such "
      "as (0.9, 0.99)"
    )
  return given


def _check_options(
  variant: str, x0_dtype: Any, groups: Any, schedule: Any
) -> None:
  if variant not in RULES:
    raise ValueError(
      f"variant={variant!r} is not one of {', '.join(map(repr, RULES))}"
    )
  if x0_dtype is not None and not _is_float(x0_dtype):
    raise ValueError(
      f"x0_dtype={x0_dtype!r} must be a type of floats of 16 bits or more, "
      "such as 'bfloat16'"
    )
  if isinstance(groups, str):
    try:
      re.compile(groups)
    except re.error as error:
      raise ValueError(
        f"groups={groups!r} is not a regular expression: {error}"
      ) from None
  elif not callable(groups):
    raise ValueError(
      f"groups={groups!r} must be a regular expression, such as '.*', or a "
      "function of a path"
    )
  if schedule is not None and not callable(schedule):
    raise ValueError(
      f"schedule={schedule!r} must be the base's schedule, a function of the "
      "update count; leave it out where the base has none"
    )


def _check_dtypes(params: optax.Params) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    if not is_complex and not _is_float(leaf.dtype):
      raise ValueError(
        f"mechanize trains floats of 16 bits or more, and "
        f"{parameter_path(path)!r} is {leaf.dtype}; leave it out by "
        "--config.freeze or optax.partition"
      )


def _is_float(dtype: jax.typing.DTypeLike) -> bool:
  try:
    # JAX promotes no 8-bit float to another type by itself.
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
  except TypeError:  # The name of no type.
    return False


def _map(f: Callable[..., Any], params: optax.Params, *trees: Any) -> Any:
  """Maps over the leaves of `params` and what the trees hold in their places.

  Unlike in `jax.tree.map`, that may be None or a node without leaves.
  """
  leaves, treedef = jax.tree.flatten(params)
  others = [treedef.flatten_up_to(tree) for tree in trees]
  return treedef.unflatten(list(map(f, leaves, *others)))


def _mean(mean: jax.Array, value: jax.Array, count: jax.Array) -> jax.Array:
  """Returns a running mean that takes in a value with weight 1 / count.

  It starts with the first value that is not 0.
  """
  weight = count.astype(value.dtype)
  return jnp.where(mean > 0, mean + (value - mean) / weight, value)


def _tuner_dtype(params: optax.Params) -> jnp.dtype:
  """Returns float32, or float64 if a leaf is that wide."""
  leaves = jax.tree.leaves(params)
  with jax.numpy_dtype_promotion("standard"):
    return jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
