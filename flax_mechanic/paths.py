"""Names of leaves and parameters: paths as text, and patterns over them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from flax_mechanic.errors import UsageError


def leaf_path(path: Any) -> str:
  """Returns a leaf's path as text, such as "blocks/0/bias"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_path(path: Any) -> str:
  """Returns a parameter's path as text, whether or not its array is boxed.

  An NNX variable and Linen's `Partitioned` hold the array in an attribute
  `value`; `nnx.Optimizer` shows them to its transformation in `init` but not in
  `update` (flax 0.12).
  """
  boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
  return leaf_path(path[:-1] if boxed else path)


def parameter_of(
  path: Any, shape: tuple[int, ...], parameters: Mapping[str, Any]
) -> Any:
  """Returns the parameter that a leaf of an optimizer's state belongs to.

  That is the parameter of its shape with the longest path inside the leaf's own
  path, or None; of two of one length, the one nearest to the leaf, since what
  is before it may be optax's names.

  Args:
    path: of the leaf of the state.
    shape: of that leaf.
    parameters: path -> anything with the parameter's shape.
  """
  names = leaf_path(path).split("/")
  # A tree that is one array has the empty path.
  for length in range(len(names), -1, -1):
    for start in reversed(range(len(names) - length + 1)):
      found = parameters.get("/".join(names[start : start + length]))
      if found is not None and found.shape == shape:
        return found
  return None


def by_path(tree: Any) -> dict[str, Any]:
  """Returns path -> leaf.

  Raises:
    UsageError: two leaves have one path, such as those of
      {"a/b": x, "a": {"b": y}}.
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = leaf_path(path)
    if name in leaves:
      raise UsageError(
        f"two arrays have the path {name!r}; a key with a slash in it is the "
        "cause: rename that key"
      )
    leaves[name] = leaf
  return leaves


def matching(patterns: Sequence[str], params: optax.Params) -> Any:
  """Returns a tree of bools: which leaves' paths match a pattern.

  Args:
    patterns: regular expressions, searched in paths such as "blocks/0/bias".
    params: the parameters.

  Example:
    >>> matching(["bias$"], {"head": {"bias": 0, "kernel": 1}})
    {'head': {'bias': True, 'kernel': False}}
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(
      re.search(pattern, parameter_path(path)) for pattern in patterns
    ),
    params,
  )


def check_found(
  patterns: Sequence[str], params: optax.Params, field: str
) -> None:
  """Raises a UsageError for a pattern that matches no parameter's path.

  Args:
    patterns: as in `matching`.
    params: the parameters.
    field: the config field that holds the patterns.
  """
  paths = [
    parameter_path(path)
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  ]
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in paths):
      raise UsageError(
        f"{field}={pattern!r} is found in no parameter's path; some are "
        + ", ".join(paths[:4])
      )
