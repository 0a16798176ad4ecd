"""Where the leaves of a tree, and of a state over it, are placed on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic.paths import map_with_parameters, parameter_path

# jax's name of the memory kind.
HOST = "pinned_host"


class PlacedLeaf(NamedTuple):
  """A leaf, such as the one at "hidden/kernel", and its sharding if known."""

  path: str
  shape: tuple[int, ...]
  sharding: NamedSharding | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Shardings:
  """The leaves of a tree and, where known, their shardings; hashable.

  As a pytree it has no leaves, so it passes through optax's wrappers and
  through conditionals.

  Attributes:
    leaves: those of the tree. All known shardings are on one mesh of several
      devices.
    offload: whether the leaves of a state that are shaped like them are kept in
      pinned host memory.

  Example:
    >>> mesh = jax.make_mesh((2,), ("data",))
    >>> w = jax.ShapeDtypeStruct(
    ...   (4, 3), "float32", sharding=NamedSharding(mesh, P(None, None))
    ... )
    >>> Shardings.of({"w": w}).split_over(["data"]).by_path["w"].spec
    P('data', None)
  """

  leaves: tuple[PlacedLeaf, ...] = ()
  offload: bool = False

  @classmethod
  def of(cls, tree: Any) -> Self:
    """Returns what is known of arrays, or of their shapes and shardings.

    Args:
      tree: of `jax.Array` or `jax.ShapeDtypeStruct`. The sharding of a leaf
        that is not on a mesh of several devices is unknown, and so is that of a
        tracer unless the mesh is Explicit, where the type says it.

    Example:
      >>> mesh = jax.make_mesh((2,), ("data",))
      >>> halves = NamedSharding(mesh, P("data"))
      >>> w = jax.device_put(jax.numpy.ones(2), halves)
      >>> list(Shardings.of({"w": w, "b": jax.numpy.ones(2)}).by_path)
      ['w']
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      sharding = _sharding_of(leaf)
      if sharding and sharding.mesh.size == 1:
        sharding = None
      if sharding:
        sharding = _normal(sharding, leaf.ndim)
      found.append(PlacedLeaf(parameter_path(path), jnp.shape(leaf), sharding))
    if len({leaf.sharding.mesh for leaf in found if leaf.sharding}) > 1:
      found = [leaf._replace(sharding=None) for leaf in found]
    return cls(tuple(found))

  @property
  def by_path(self) -> Mapping[str, NamedSharding]:
    """Path -> sharding, of the leaves whose sharding is known."""
    return {leaf.path: leaf.sharding for leaf in self.leaves if leaf.sharding}

  @property
  def mesh(self) -> Any:
    """The mesh that the known shardings are on, or None."""
    return next((each.mesh for each in self.by_path.values()), None)

  def on(self, mesh: Any) -> Self:
    """Returns the same on another mesh, whose axes have the same names."""
    return self._map(
      lambda leaf: NamedSharding(mesh, leaf.sharding.spec)  # pyrefly: ignore
    )

  def under(self, name: str) -> Self:
    """Returns those of the subtree `tree[name]`."""
    prefix = f"{name}/"
    return dataclasses.replace(
      self,
      leaves=tuple(
        leaf._replace(path=leaf.path.removeprefix(prefix))
        for leaf in self.leaves
        if leaf.path.startswith(prefix)
      ),
    )

  def with_specs(self, specs: Mapping[str, P]) -> Self:
    """Returns the known shardings with other specs for some paths.

    A spec that names an axis which the mesh does not have is ignored.
    """

    def sharding(leaf: PlacedLeaf) -> NamedSharding:
      mesh, own = leaf.sharding.mesh, leaf.sharding.spec  # pyrefly: ignore
      spec = specs.get(leaf.path, own)
      if not {*jax.tree.leaves(tuple(spec))} <= {*mesh.axis_names}:
        spec = own
      return _normal(NamedSharding(mesh, spec), len(leaf.shape))

    return self._map(sharding)

  def split_over(self, axes: Sequence[str]) -> Self:
    """Returns the shardings with each leaf split over `axes` as well.

    This is ZeRO-1's placement of a state. A leaf is split along its first
    dimension that the axes' sizes divide; a leaf without one stays as it is.

    Args:
      axes: of the mesh, such as "data". An axis that the mesh does not have, or
        that already splits a leaf, is ignored.
    """
    return self._map(
      lambda leaf: _split_over(leaf.sharding, leaf.shape, axes)  # pyrefly: ignore
    )

  def for_state(self, shard_over: Sequence[str], offload: bool) -> Self:
    """Returns the shardings of a state's leaves that are shaped like these.

    Args:
      shard_over: axes over which they are split as well.
      offload: whether they are kept in pinned host memory.
    """
    return dataclasses.replace(self.split_over(shard_over), offload=offload)

  def of_state(self, state: Any) -> Any:
    """Returns the shardings of an optimizer's state over these parameters.

    A leaf is placed like the parameter whose shape it has and whose path is
    part of its own; other leaves are replicated over the mesh.

    Args:
      state: arrays or their shapes, as `tx.init(params)` returns them.

    Returns:
      A tree like `state` of `NamedSharding`s; of None where nothing is known.
    """
    return self._map_state(
      lambda value, sharding, offloaded: _in_memory(sharding, offloaded), state
    )

  def offloaded(self, state: Any) -> Any:
    """Returns a tree like a state of bools: what is kept in host memory."""
    return self._map_state(lambda value, sharding, offloaded: offloaded, state)

  def place(self, tree: Any) -> Any:
    """Returns a state, or concrete parameters, placed by these shardings.

    Of shapes, it is said where the arrays will be.
    """

    def place(value, sharding, offloaded):
      if is_abstract(value):
        return value.update(sharding=_in_memory(sharding, offloaded))
      value = _place(value, sharding)
      if not offloaded or _is_on_host(value):
        return value
      return jax.device_put(value, jax.memory.Space.Host)

    return self._map_state(place, tree)

  def keep(self, params: optax.Params) -> optax.Params:
    """Returns the parameters in their own placement, where it is known."""
    known = self.by_path
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _place(leaf, known.get(parameter_path(path))), params
    )

  def init(
    self, tx: optax.GradientTransformation, params: optax.Params
  ) -> optax.OptState:
    """Returns `tx.init(params)`, every leaf created in its placement.

    Args:
      tx: any optax transformation.
      params: those whose shardings these are.
    """
    here = Shardings.of(params)
    known = len(here.by_path) == len(self.by_path) == len(self.leaves) > 0
    if is_traced(params) or is_abstract(params) or not known:
      return self.place(tx.init(params))
    # A sharding that was read while tracing names no devices.
    shardings = self.on(here.mesh).of_state(jax.eval_shape(tx.init, params))
    return jax.jit(tx.init, out_shardings=shardings)(params)

  def extra_args(self) -> Mapping[str, Any]:
    """Returns the extra arguments that pass them to an update."""
    return {"shardings": self} if self.by_path else {}

  def _map(self, new: Callable[[PlacedLeaf], NamedSharding]) -> Self:
    """Returns the same with the known shardings replaced."""
    return dataclasses.replace(
      self,
      leaves=tuple(
        leaf._replace(sharding=new(leaf)) if leaf.sharding else leaf
        for leaf in self.leaves
      ),
    )

  def _map_state(
    self, f: Callable[[Any, NamedSharding | None, bool], Any], state: Any
  ) -> Any:
    """Maps `f(leaf, its sharding, whether on the host)` over a state."""
    whole = self.mesh and NamedSharding(self.mesh, P())

    def of_leaf(value, leaf):
      if leaf is not None:
        return f(value, leaf.sharding, self.offload)
      return f(value, whole and _normal(whole, jnp.ndim(value)), False)

    parameters = {leaf.path: leaf for leaf in self.leaves}
    return map_with_parameters(of_leaf, state, parameters)


def state_sharding(
  tx: optax.GradientTransformation,
  params: optax.Params,
  *,
  shard_over: Sequence[str] = (),
  offload: bool = False,
) -> Any:
  """Returns the sharding of each leaf of an optimizer's state.

  Nothing is allocated. A leaf shaped like a parameter is placed like it;
  vectors over betas, scalars, keys and factored leaves are replicated over the
  mesh.

  Args:
    tx: any optax transformation.
    params: arrays on a mesh, or `jax.ShapeDtypeStruct`s with their shardings.
    shard_over: axes of the mesh, such as ["data"], over which the leaves shaped
      like parameters are split as well (ZeRO-1).
    offload: whether those leaves are kept in pinned host memory.

  Returns:
    A tree like `tx.init(params)` of `NamedSharding`s; of None if the parameters
    are on no mesh of several devices.

  Example:
    >>> mesh = jax.make_mesh((2,), ("data",))
    >>> w = jax.ShapeDtypeStruct(
    ...   (4, 3), "float32", sharding=NamedSharding(mesh, P(None, None))
    ... )
    >>> shardings = state_sharding(
    ...   optax.sgd(0.1, momentum=0.9), {"w": w}, shard_over=["data"]
    ... )
    >>> shardings[0].trace["w"].spec
    P('data', None)
  """
  shardings = Shardings.of(params).for_state(shard_over, offload)
  return shardings.of_state(jax.eval_shape(tx.init, params))


def on_device(tree: Any) -> Any:
  """Returns a tree with what is in host memory moved to the devices."""
  return jax.tree.map(
    lambda leaf: (
      jax.device_put(leaf, jax.memory.Space.Device)
      if _is_on_host(leaf)
      else leaf
    ),
    tree,
  )


def axes_of(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
  """Returns, for each dimension of an array, the mesh's axes that split it.

  Example:
    >>> mesh = jax.make_mesh((2,), ("data",))
    >>> axes_of(NamedSharding(mesh, P("data")), ndim=2)
    [('data',), ()]
  """
  entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
  return [
    entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    for entry in entries
  ]


def is_traced(tree: Any) -> bool:
  """Whether a leaf of the tree is being traced."""
  return any(
    isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)
  )


def is_abstract(tree: Any) -> bool:
  """Whether a leaf of the tree is a shape without an array."""
  return any(
    isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)
  )


def _sharding_of(leaf: Any) -> NamedSharding | None:
  traced = isinstance(leaf, jax.core.Tracer)
  sharding = getattr(jax.typeof(leaf) if traced else leaf, "sharding", None)
  if not isinstance(sharding, NamedSharding):
    return None
  types = {*sharding.mesh.axis_types}
  # No one function places an array over axes of both types.
  known = len(types) == 1 and not (traced and types == {AxisType.Auto})
  return sharding if known else None


def _split_over(
  sharding: NamedSharding, shape: tuple[int, ...], axes: Sequence[str]
) -> NamedSharding:
  mesh = sharding.mesh
  dims = axes_of(sharding, len(shape))
  taken = {name for names in dims for name in names}
  more = tuple(a for a in axes if a in mesh.shape and a not in taken)
  for i, (size, names) in enumerate(zip(shape, dims, strict=True)):
    parts = math.prod(mesh.shape[name] for name in names + more)
    if more and size and size % parts == 0:
      dims[i] = names + more
      entries = [
        names[0] if len(names) == 1 else names or None for names in dims
      ]
      return _normal(NamedSharding(mesh, P(*entries)), len(dims))
  return sharding


def _normal(sharding: NamedSharding, ndim: int) -> NamedSharding:
  """Returns the sharding with the spec that a compiled function's results have.

  An equal sharding with another spec would make jit compile the step again at
  the second call.
  """
  entries = list(sharding.spec)
  if AxisType.Explicit in sharding.mesh.axis_types:
    entries += [None] * (ndim - len(entries))
  else:
    while entries and entries[-1] is None:
      entries.pop()
  return NamedSharding(sharding.mesh, P(*entries))


def _in_memory(
  sharding: NamedSharding | None, offloaded: bool
) -> NamedSharding | None:
  """Returns the sharding, in pinned host memory if it is offloaded."""
  return sharding.with_memory_kind(HOST) if sharding and offloaded else sharding


def _is_on_host(leaf: Any) -> bool:
  return (
    isinstance(leaf, jax.Array)
    and jax.typeof(leaf).memory_space == jax.memory.Space.Host
  )


def _place(leaf: Any, sharding: NamedSharding | None) -> Any:
  if sharding is None:
    return leaf
  typed = jax.typeof(leaf).sharding
  if not isinstance(leaf, jax.core.Tracer):
    if isinstance(sharding.mesh, jax.sharding.AbstractMesh):
      if not isinstance(leaf.sharding, NamedSharding):
        return leaf
      sharding = NamedSharding(leaf.sharding.mesh, sharding.spec)
    return jax.device_put(leaf, sharding)
  if AxisType.Explicit in typed.mesh.axis_types:
    return jax.sharding.reshard(leaf, NamedSharding(typed.mesh, sharding.spec))
  return jax.lax.with_sharding_constraint(leaf, sharding)
