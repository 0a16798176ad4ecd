"""Mechanic comes last: the parameters have to move by what it returns."""

import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

import optax

from flax_mechanic.errors import UsageError


def _code(update: Any) -> CodeType | None:
  """Returns the code of an update that is a plain function."""
  return getattr(update, "__code__", None)


_NOTHING = optax.identity()
# Updates that may follow Mechanic. A masked one is assumed to act on other
# leaves.
_HARMLESS = (
  _code(_NOTHING.update),
  _code(optax.masked(_NOTHING, True).update),
)
_CHAIN = _code(optax.chain(_NOTHING).update)
_NAMED_CHAIN = _code(optax.named_chain(("nothing", _NOTHING)).update)
_WITH_EXTRA_ARGS = _code(optax.with_extra_args_support(_NOTHING).update)


def refuse_what_follows() -> None:
  """Raises if the caller is in an `optax.chain` that goes on behind it.

  Delta is recovered from the parameters, so it loses what a transformation
  behind Mechanic scales, averages or delays. An update does not see what
  becomes of its result, nor, without keeping a copy of it, what became of the
  last one. But a chain that is being traced is on the call stack, and to look
  there costs a compiled step nothing.

  Raises:
    UsageError: something follows in a chain that is neither `optax.identity`
      nor under `optax.masked`, which is for other leaves.
  """
  for update in map(_unwrapped, _following()):
    if _code(update) not in _HARMLESS:
      name = getattr(update, "__qualname__", "a transformation")
      raise UsageError(
        f"{name.partition('.')[0]} follows mechanic in an optax.chain and "
        "would change the updates from which mechanic recovers its offset; put "
        "it in front of mechanic, where it sees the gradients, or into "
        "mechanic's base, where it sees the base's updates"
      )


def _following() -> Iterator[Any]:
  """Yields the updates that follow in the chains on the call stack."""
  frame = sys._getframe()
  while frame is not None:
    if frame.f_code in (_CHAIN, _NAMED_CHAIN):
      # As optax 0.2.8 names them; under other names nothing is found.
      variables = frame.f_locals
      done = len(variables.get("new_state", ()))
      yield from variables.get("update_fns", ())[done + 1 :]
      for _, tx in variables.get("transforms", ())[done + 1 :]:
        yield tx.update
    frame = frame.f_back


def _unwrapped(update: Any) -> Any:
  """Returns the update that `optax.with_extra_args_support` wraps, if any."""
  if _code(update) is _WITH_EXTRA_ARGS:
    for cell in update.__closure__:
      if isinstance(cell.cell_contents, optax.GradientTransformation):
        return cell.cell_contents.update
  return update
