"""Which leaves share a tuner."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from flax_mechanic.paths import parameter_path


class Groups(NamedTuple):
  """A partition of a tree's leaves; static.

  Attributes:
    of_leaf: the number of each leaf's group, from 0, in the tree's order.
    shape: of an array with one entry per group: [groups], or [] where all
      leaves share one tuner because no pattern was given.
  """

  of_leaf: tuple[int, ...]
  shape: tuple[int, ...]

  @classmethod
  def of(
    cls, pattern: str | Callable[[str], Hashable], params: optax.Params
  ) -> Self:
    """Returns the groups that a pattern makes of a tree.

    Args:
      pattern: a regular expression, searched in each leaf's path: leaves with
        equal matches form a group, and so do all leaves without a match; or a
        function path -> label. "" puts all leaves in one group, as does a tree
        without leaves.
      params: the tree.

    Example:
      >>> Groups.of("^hidden", {"head": 0, "hidden": {"bias": 1, "kernel": 2}})
      Groups(of_leaf=(0, 1, 1), shape=(2,))
    """
    paths = [
      parameter_path(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    if not pattern or not paths:
      return cls((0,) * len(paths), ())
    if callable(pattern):
      labels = [pattern(path) for path in paths]
    else:
      matches = [re.search(pattern, path) for path in paths]
      labels = [match and match.group() for match in matches]
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return cls(tuple(numbers[label] for label in labels), (len(numbers),))

  @property
  def size(self) -> int:
    """How many groups there are."""
    return self.shape[0] if self.shape else 1

  def spread(self, values: jax.Array, params: optax.Params) -> Any:
    """Returns a tree like `params` of each leaf's entry in `values`.

    Args:
      values: of the groups' shape.
      params: the tree whose groups these are.
    """
    treedef = jax.tree.structure(params)
    if not self.shape:
      return treedef.unflatten([values] * len(self.of_leaf))
    # Indices that XLA does not see as constants: with them, leaves of one shape
    # share a kernel, which halves the time that XLA:CPU compiles (jax 0.12).
    # Unsigned: for signed indices jax adds code that wraps negative ones.
    indices = jax.lax.optimization_barrier(
      [jnp.uint32(group) for group in range(self.size)]
    )
    entries = [
      jax.lax.dynamic_slice(values, (i,), (1,)).reshape(()) for i in indices
    ]
    return treedef.unflatten([entries[group] for group in self.of_leaf])

  def only(self, leaves: Iterable[int]) -> Self:
    """Returns the groups of some of the leaves, named by their indices."""
    return self._replace(of_leaf=tuple(self.of_leaf[i] for i in leaves))

  def total(self, values: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Returns each group's sum of one scalar per leaf."""
    # One by one: if they were stacked first, XLA would not merge all-reduces.
    totals = [jnp.zeros([], dtype)] * self.size
    for group, value in zip(self.of_leaf, values, strict=True):
      totals[group] += value
    return jnp.stack(totals) if self.shape else totals[0]
