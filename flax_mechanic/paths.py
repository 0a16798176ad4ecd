"""Names of leaves and parameters, patterns over them, and nodes by type."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_mechanic.errors import UsageError

# The ends of paths of a complex parameter's parts.
_PARTS = [(jax.tree_util.GetAttrKey(name),) for name in ("real", "imaginary")]


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


def map_with_parameters(
  f: Callable[[Any, Any], Any],
  state: Any,
  parameters: Mapping[str, Any],
  *,
  shape: Callable[[Any], Any] = jnp.shape,
  is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
  """Maps `f(leaf, the parameter that it belongs to)` over an optimizer's state.

  A leaf belongs to the parameter of its shape whose path is part of the leaf's,
  or to None. Among several, the surrounding path that most leaves share wins,
  then the longest parameter path, then the one nearest the end.

  Args:
    f: returns the new leaf.
    state: the whole state.
    parameters: path -> anything with the parameter's shape.
    shape: leaf -> its shape; None for what has none.
    is_leaf: as in `jax.tree.map`.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)
  candidates = []
  for path, leaf in leaves:
    names, of_leaf = leaf_path(path).split("/"), shape(leaf)
    candidates.append(
      {
        (*names[:start], None, *names[end:]): found
        # A tree that is one array has the empty path.
        for end in range(len(names) + 1)
        for start in range(end + 1)
        if (found := parameters.get("/".join(names[start:end]))) is not None
        and found.shape == of_leaf
      }
    )
  times = Counter(around for each in candidates for around in each)
  best = lambda around: (times[around], -len(around), around.index(None))
  return treedef.unflatten(
    f(leaf, each[max(each, key=best)] if each else None)
    for (_, leaf), each in zip(leaves, candidates, strict=True)
  )


def by_path(
  tree: Any, name_of: Callable[[Any], str] = leaf_path
) -> dict[str, Any]:
  """Returns path -> leaf.

  Args:
    tree: any.
    name_of: a leaf's path -> the path as text.

  Raises:
    UsageError: two leaves have one path, such as those of
      {"a/b": x, "a": {"b": y}}.
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = name_of(path)
    if name in leaves:
      raise UsageError(
        f"two arrays have the path {name!r}; a key with a slash in it is the "
        "cause: rename that key"
      )
    leaves[name] = leaf
  return leaves


def outermost(tree: Any, types: tuple[type, ...]) -> list[Any]:
  """Returns the nodes of some types, such as states, that are in no other one.

  Example:
    >>> outermost([optax.EmptyState(), 3], (optax.EmptyState,))
    [EmptyState()]
  """
  is_found = lambda node: isinstance(node, types)
  return [*filter(is_found, jax.tree.leaves(tree, is_leaf=is_found))]


def matching(patterns: Sequence[str], params: optax.Params) -> Any:
  """Returns a tree of bools: which leaves' paths match a pattern.

  The parts of a complex parameter, which are leaves of their own under
  `split_real_and_imaginary`, have its path.

  Args:
    patterns: regular expressions, searched in paths such as "blocks/0/bias".
    params: the parameters.

  Example:
    >>> matching(["bias$"], {"head": {"bias": 0, "kernel": 1}})
    {'head': {'bias': True, 'kernel': False}}
  """

  def matches(path: Any, _: Any) -> bool:
    of_complex = path[-1:] in _PARTS
    name = parameter_path(path[:-1] if of_complex else path)
    return any(re.search(pattern, name) for pattern in patterns)

  return jax.tree_util.tree_map_with_path(matches, params)


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
