"""Where the leaves of a tree lie on a mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
from jax.sharding import NamedSharding


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Shardings:
  """The shardings of a tree's leaves by their paths; hashable.

  As a pytree it has no leaves, so that it passes through optax's wrappers and
  through conditionals.

  Attributes:
    by_path: pairs of a path, such as "hidden/kernel", and its sharding; a leaf
      of which nothing is known is left out.
  """

  by_path: tuple[tuple[str, NamedSharding], ...] = ()

  @classmethod
  def of(cls, tree: Any) -> Self:
    """Returns the shardings of concrete arrays on meshes of several devices.

    Args:
      tree: arrays; tracers are left out, and so are arrays on one device. A
        `NamedSharding` in a leaf's place is taken as it is.

    Example:
      >>> from jax.sharding import PartitionSpec
      >>> mesh = jax.make_mesh((2,), ("data",))
      >>> halves = NamedSharding(mesh, PartitionSpec("data"))
      >>> w = jax.device_put(jax.numpy.ones(2), halves)
      >>> [path for path, _ in Shardings.of({"w": w, "b": 0.0}).by_path]
      ['w']
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      sharding = leaf if isinstance(leaf, NamedSharding) else None
      if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        sharding = leaf.sharding
      if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        found.append((leaf_path(path), sharding))
    return cls(tuple(found))

  def extra_args(self) -> Mapping[str, Any]:
    """Returns the extra arguments of an update that hand them on."""
    return {"shardings": self} if self.by_path else {}


def leaf_path(path: Any) -> str:
  """Returns a leaf's path as text, such as "blocks/0/bias"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
