"""Which gradients are bad: judged by the sizes of the good ones before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A spike is so many times as large as the largest gradient of late; among the
# first gradients, when little is known, up to so many times more. Bad gradients
# often come together, so right after one less is enough.
FACTOR = 4.0
YOUNG = 10
_AFTER_BAD = 2.0
# Of late: the largest size is forgotten at this rate.
_DECAY = 0.97
# Parts of the gradient vary more than the whole: the factor is twice as large
# for them. A part that is smaller than this fraction of the whole does no harm,
# whatever its own size was.
_OF_PART = 2.0
_PART = 0.1
# The first gradients were bad if a later one is so many times smaller than the
# smallest of them.
_RESTART = 50.0
# So many unusual gradients in a row are a lasting change. Their largest size is
# the usual one then, but each raises it at most by this factor, so that a spike
# among them does little. A gradient is unusually small if it is so many times
# smaller than the smallest of late; where gradients vanish bit by bit, as on
# data that is memorized, none is.
_LASTING = 25
_RISE = 2.0
_SMALL = 20.0
# Fewer in a row are used if they are hardly spikes, at most so many times the
# limit: an update may have led to a place with larger gradients, and only
# gradients lead away from it. That is no lasting change.
_SOON = 6
_MODERATE = 1.5
# Where most gradients have vanished, as on data that is memorized, those of the
# few examples that are still wrong look like spikes. After so many spikes, with
# fewer than 64 other gradients to each, one is used if no part of it is larger
# than the largest that was used before. Spikes in a row count as one.
_FAMILIAR = 5.0
_OTHER = 1 / 64


class Sizes(NamedTuple):
  """What is known about the sizes of the gradients.

  Attributes:
    peak: the largest norms of late that were accepted, [1 + parts]: that of the
      whole gradient, and those of its parts (leaves or groups of them); 0 where
      none was above 0 yet.
    largest: the largest norms that were ever accepted, [1 + parts].
    least: the smallest norm of the whole of late, scalar.
    pending: what `peak` will be if the sizes stay unusual.
    unusual: int32 scalar, how many in a row were unusual.
    spikes: scalar, how many spikes there were of late, those in a row counted
      as one; each gradient that is none takes 1/64 away.
    young: int32 scalar, how many gradients are still to come that count as the
      first ones; negative if others were before them, of which nothing is
      known, so that there is no start to go back to.
    skipped: int32 scalar, gradients skipped so far.
    skipped_in_a_row: int32 scalar, those since the last that was accepted.
  """

  peak: jax.Array
  largest: jax.Array
  least: jax.Array
  pending: jax.Array
  unusual: jax.Array
  spikes: jax.Array
  young: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array


class Verdict(NamedTuple):
  """What to do with a gradient; scalars, if nothing else is said.

  Attributes:
    ok: whether it is used; otherwise nothing changes.
    restart: whether the ones before it were bad, so that the optimizer has to
      be as before the first; then it is not used.
    lasting: whether a lasting change of the sizes is accepted.
    change: by how much it has multiplied them, [1 + parts], like `Sizes.peak`;
      1 where there is none.
  """

  ok: jax.Array
  restart: jax.Array
  lasting: jax.Array
  change: jax.Array


def init(parts: int, dtype: jax.typing.DTypeLike) -> Sizes:
  """Returns the state before the first gradient."""
  return Sizes(
    peak=jnp.zeros([1 + parts], dtype),
    largest=jnp.zeros([1 + parts], dtype),
    least=jnp.zeros([], dtype),
    pending=jnp.zeros([1 + parts], dtype),
    unusual=jnp.zeros([], jnp.int32),
    spikes=jnp.zeros([], dtype),
    young=jnp.full([], YOUNG, jnp.int32),
    skipped=jnp.zeros([], jnp.int32),
    skipped_in_a_row=jnp.zeros([], jnp.int32),
  )


def judge(
  state: Sizes,
  squares: jax.Array,
  factor: jax.typing.ArrayLike = FACTOR,
  finite: jax.Array | bool = True,
  may_restart: jax.Array | bool = True,
) -> tuple[Verdict, Sizes]:
  """Judges a gradient by its size and those before it.

  - One that is not finite, or that is too large to be squared, is bad.
  - So is a spike: the norm of the whole is more than `factor` times the largest
    one of late, or that of a part is more than twice as many times. A bad
    gradient does not change what is known, so that any number of them is told
    from good ones. But after 25 unusual gradients in a row, the size that they
    have is the usual one; and the sixth in a row is used if none of them is
    above 1.5 times the limit. Right after a bad gradient, twice the largest
    norm is enough for a spike. After more than 5 rows of spikes with fewer than
    64 other gradients to each, one of which no part is larger than the largest
    one ever used is no spike: it is of examples that are rarely wrong by now.
  - If one of the first ten is 50 times smaller than all before it, those were
    bad.
  - Zeros in front of the first gradient are no gradients.

  Args:
    state: what is known.
    squares: squared norms of the parts, [parts] or a scalar.
    factor: of a spike; 0 for judging whether it is finite alone.
    finite: whether what else was computed from the gradient is finite.
    may_restart: whether the optimizer can be put back to its start.

  Returns:
    What to do, and what is known now.
  """
  norms = _norms(squares).astype(state.peak.dtype)
  norm, peak = norms[0], state.peak[0]
  finite = jnp.isfinite(norm) & finite
  judged = finite & (norm > 0) & (jnp.asarray(factor) > 0)
  after_bad = jnp.where(state.skipped_in_a_row > 0, _AFTER_BAD, jnp.inf)
  allowed = jnp.full_like(norms, _OF_PART).at[0].set(1.0) * state.peak
  leeway = (1 + jnp.abs(state.young)).astype(norms.dtype)
  limits = jnp.minimum(factor, after_bad) * leeway * allowed
  is_spike = judged & jnp.any(
    (state.peak > 0) & (norms > limits) & (norms > _PART * peak)
  )
  spikes = jnp.where(
    is_spike,
    state.spikes + (state.skipped_in_a_row == 0).astype(state.spikes.dtype),
    jnp.maximum(state.spikes - _OTHER, 0),
  )
  is_spike &= ~((spikes > _FAMILIAR) & jnp.all(norms <= state.largest))
  is_young = (state.young > 0) & may_restart
  restart = judged & is_young & (_RESTART * norm < state.least)
  is_small = judged & (_SMALL * norm < state.least)

  unusual = jnp.where(is_spike | is_small, state.unusual + 1, 0)
  before = jnp.where(
    unusual > 1, state.pending, jnp.where(is_spike, state.peak, norms)
  )
  pending = jnp.clip(norms, before, _RISE * before)
  of_row = jnp.maximum(pending, norms)
  moderate = is_spike & jnp.all(
    (of_row <= _MODERATE * factor * allowed) | (of_row <= _PART * peak)
  )
  # A spike that comes alone after small ones is none of their row.
  in_row = is_small | (state.skipped_in_a_row >= _SOON - 1)
  lasting = in_row & (unusual >= _LASTING)
  soon = in_row & (unusual >= _SOON) & moderate
  ok = finite & ~restart & (~is_spike | lasting | soon)
  # Unless zeros come first, of which nothing follows.
  known = (norm > 0) | (peak > 0)

  usual = ok & ~is_small & (norm > 0)
  recent = jnp.where(
    norms > 0, jnp.maximum(norms, _DECAY * state.peak), state.peak
  )
  least = jnp.minimum(
    norm, jnp.where(state.least > 0, state.least / _DECAY, jnp.inf)
  )
  known_anew = restart | lasting
  new_peak = jnp.where(
    known_anew,
    jnp.where(restart, norms, pending),
    jnp.where(usual, recent, state.peak),
  )
  before_it = jnp.where(restart, 0.0, state.largest)
  skipped = ~ok
  change = _ratio(pending, state.peak, lasting)
  return Verdict(ok & known, restart, lasting, change), Sizes(
    peak=new_peak,
    largest=jnp.maximum(before_it, new_peak),
    least=jnp.where(known_anew, norm, jnp.where(usual, least, state.least)),
    # A gradient that is not finite says nothing about sizes.
    pending=jnp.where(finite, pending, state.pending),
    unusual=jnp.where(
      finite, jnp.where(lasting | soon, 0, unusual), state.unusual
    ),
    spikes=jnp.where(lasting, 0.0, spikes),
    young=state.young
    - jnp.where(finite & (norm > 0), jnp.sign(state.young), 0),
    skipped=state.skipped + skipped.astype(jnp.int32),
    skipped_in_a_row=jnp.where(skipped, state.skipped_in_a_row + 1, 0),
  )


def _norms(squares: jax.Array) -> jax.Array:
  """Returns the norm of the whole and those of its parts, [1 + parts]."""
  squares = jnp.ravel(squares)
  return jnp.sqrt(jnp.append(jnp.sum(squares), squares))


def _ratio(new: jax.Array, old: jax.Array, lasting: jax.Array) -> jax.Array:
  """Returns new / old where a change is lasting and both are known, else 1."""
  has_changed = lasting & (new > 0) & (old > 0)
  return jnp.where(has_changed, new, 1.0) / jnp.where(has_changed, old, 1.0)
