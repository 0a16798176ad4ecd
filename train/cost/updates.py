"""The updates that the tools compare: rows of the table of optimizers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib
from optax.tree_utils import _tree_math

import flax_mechanic

# The flag's row, the drop-in's, and the one that `register_reference` adds.
FLAG = "mechanic"
DROP_IN = "mechanize"
REFERENCE = "optax_mechanize"


class Update(NamedTuple):
  """An update to be measured.

  Attributes:
    row: of the table, over a base; "" is the base alone.
    unavoidable: copies of the parameters that it must read or write in addition
      to the base's own.
    options: of the row, where they are not its defaults.
    guard: whether bad gradients are skipped.
  """

  row: str
  unavoidable: float
  options: Mapping[str, Any] = {}
  guard: bool = True

  def configure(self, config: ConfigDict, base: str) -> None:
    """Sets a job's optimizer to this update over a base."""
    config.optimizer = self.row or base
    config.guard = self.guard
    if self.row:
      config.opt[self.row].update({"base": base, **self.options})

  def make(self, base: str) -> optax.GradientTransformation:
    """Returns the transformation, as the flag builds it."""
    config = ConfigDict({"learning_rate": 1.0})
    flax_mechanic.add_optimizer_config(config)
    self.configure(config, base)
    return flax_mechanic.make_optimizer(config)


# The guard reads g for its norm; mechanize reads g, x and x0 for its inner
# products, which say the norm, and x0 once more.
UPDATES = {
  "base alone": Update("", 0, guard=False),
  "base, guarded": Update("", 1),
  "optax's mechanize": Update(REFERENCE, 4, guard=False),
  "mechanize": Update(DROP_IN, 4),
  "mechanic": Update(FLAG, 4),
  "x0_dtype=bfloat16": Update(DROP_IN, 3, {"x0_dtype": "bfloat16"}),
}


def register_reference() -> None:
  """Adds optax's own mechanize to the table, as `REFERENCE`.

  It is not part of the flag, so each tool adds it before it reads a config.
  """
  if REFERENCE not in flax_mechanic.methods():
    flax_mechanic.register(
      REFERENCE,
      lambda base, learning_rate: _unrepaired(contrib.mechanize(base)),
      options={"base": flax_mechanic.methods()[FLAG].options["base"]},
      tuned=False,
      schedule=None,
      summary="optax.contrib.mechanize as it is, to compare with",
      advice="mechanize, which computes the same",
    )


def bases() -> Sequence[str]:
  """Returns the rows that any of the updates can be over."""
  rows = flax_mechanic.methods()
  return [
    name
    for name, row in rows.items()
    if row.tuned and not row.wraps and not row.needs
    if name not in rows[FLAG].refuses
  ]


def base_copies(base: str) -> float:
  """Returns what a base's update must read and write, in copies.

  It reads g, x and its state, and writes x and its state.
  """
  params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  state = jax.eval_shape(Update("", 0).make(base).init, params)
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  return 3 + 2 * round(held / (params.size * 4), 1)


# Optax's own, read before the flag repairs it.
_VDOT = _tree_math._vdot


def _unrepaired(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns `tx` without the flag's repair of optax's inner products."""

  def update(updates, state, params=None):
    repaired, _tree_math._vdot = _tree_math._vdot, _VDOT
    try:
      return tx.update(updates, state, params)
    finally:
      _tree_math._vdot = repaired

  return optax.GradientTransformation(tx.init, update)
