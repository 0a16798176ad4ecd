"""What can be saved, and be found and read again; the rest is refused."""

import json
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorstore

from flax_mechanic.errors import UsageError
from flax_mechanic.paths import leaf_path

# Above every step; counts of updates are int32.
STEPS = 2**31


def as_step(given: Any) -> int:
  """Returns a step as Python's int.

  Raises:
    UsageError: it is no step.

  Example:
    >>> as_step(np.int64(5))
    5
  """
  try:
    step = operator.index(given)
  except TypeError:
    step = -1
  if not 0 <= step < STEPS:
    raise UsageError(
      f"step {given!r} cannot be saved: a step is an integer of at least 0, "
      f"and below {STEPS}; count updates, not tokens"
    )
  return step


def as_metrics(given: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns metrics as Python's numbers.

  Raises:
    UsageError: one is no number.

  Example:
    >>> as_metrics({"loss": np.float32(0.5)})
    {'loss': 0.5}
  """
  metrics = {name: _plain(value) for name, value in (given or {}).items()}
  for name, value in metrics.items():
    if not isinstance(value, int | float):
      raise UsageError(
        f"the metric {name!r} cannot be saved: it is {value!r}, and no number; "
        "leave it out"
      )
  return metrics


def as_data(given: Mapping[str, Any] | None) -> dict[str, Any]:
  """Returns a position in the data, its arrays as Python's numbers and lists.

  Raises:
    UsageError: JSON cannot hold it.

  Example:
    >>> as_data({"seen": [np.int64(5)]})
    {'seen': [5]}
  """
  try:
    text = json.dumps(dict(given or {}), default=_plain, sort_keys=True)
  except (TypeError, ValueError, RecursionError) as error:
    raise UsageError(
      "data cannot be saved: JSON has no more than numbers, texts, lists and "
      "dicts whose keys are texts; make it of those"
    ) from error
  return json.loads(text)


def check_state(tree: Any) -> None:
  """Raises a UsageError for a tree whose arrays Orbax would not write."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  is_leaf = bool(leaves) and not leaves[0][0]
  if is_leaf or not tree:
    raise UsageError(
      f"{'one array' if is_leaf else 'an empty state'} cannot be saved; give a "
      'dict of arrays, such as {"params": params}'
    )
  paths: dict[str, str] = {}
  for keys, leaf in leaves:
    path = leaf_path(keys)
    problem = _problem(leaf)
    if problem:
      raise UsageError(f"{path} cannot be saved: {problem}")
    name = jax.tree_util.keystr(keys, simple=True, separator=".")
    if name in paths:
      raise UsageError(
        f"{paths[name]} and {path} cannot be saved together: Orbax calls both "
        f"{name}; rename the key with a dot in it"
      )
    paths[name] = path


def _problem(leaf: Any) -> str:
  """Says why Orbax would not write a leaf, if so, and what to do instead."""
  if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
    return (
      f"it is of the type {type(leaf).__name__}, and neither an array nor a "
      "number; leave it out of the state"
    )
  if 0 in np.shape(leaf):
    return "it has no elements; leave it out of the state"
  if isinstance(leaf, int) and not -(2**63) <= leaf < 2**64:
    return "it has more than 64 bits; save it in data"
  dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
  if not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    try:
      tensorstore.dtype(str(dtype))
    except ValueError:
      return f"TensorStore has no dtype {dtype}; cast it"
  return ""


def _plain(value: Any) -> Any:
  """Returns an array of jax or NumPy as Python's number, or list of them."""
  return np.asarray(value).tolist() if hasattr(value, "dtype") else value
