"""muon on a mesh: each matrix is orthogonalized by one device."""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib
from optax.contrib import _muon

from flax_mechanic.paths import parameter_path
from flax_mechanic.placement import Shardings, axes_of

# optax's function is replaced while a muon is built, by one thread at a time.
_REPLACING = threading.Lock()


def muon(
  learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
  """Returns `optax.contrib.muon`, whose matrices are dealt out over a mesh.

  optax orthogonalizes a matrix where it is placed, and the layers of a stack
  all at once (0.2.8). Where a mesh splits the matrices, each device gathers
  whole stacks and computes their products. Here the matrices of one shape, of
  all parameters, are dealt out to the devices that hold parts of them. A device
  gets one matrix at a time, orthogonalizes it alone, and returns it in parts.

  Args:
    learning_rate: as optax's.
    **options: optax's other arguments.

  Returns:
    A transformation with optax's state. Its update takes `shardings`, the
    `Shardings` of the state's leaves. Without them, where they split no matrix,
    and with `preconditioning="aol"`, which tells rows from columns, it is
    optax's.
  """
  with _REPLACING:
    original = _muon.scale_by_muon
    dealt_out: Any = functools.partial(_dealt_out, original)
    _muon.scale_by_muon = dealt_out
    try:
      return contrib.muon(learning_rate, **options)
    finally:
      _muon.scale_by_muon = original


def _dealt_out(
  scale_by_muon: Callable[..., optax.GradientTransformation],
  *,
  weight_dimension_numbers: Callable[[optax.Updates], Any],
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """Returns optax's transformation with another update on a mesh."""
  options["weight_dimension_numbers"] = weight_dimension_numbers
  in_place = scale_by_muon(**options)
  # With no steps and aol, which normalizes within the first step alone, optax
  # returns the momentum itself.
  by_rows = options["preconditioning"] == "aol"
  momentum = scale_by_muon(
    **options | {"ns_steps": 0, "preconditioning": "aol", "adaptive": False}
  )

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    shardings: Shardings | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    del params, extra_args
    if shardings is None or by_rows or not _is_split(updates, shardings):
      return in_place.update(updates, state)

    def orthogonalize(x: jax.Array, numbers: Any = None) -> jax.Array:
      return _muon.orthogonalize_via_newton_schulz(
        x,
        state.ns_coeffs,
        options["ns_steps"],
        options["preconditioning"],
        options["eps"],
        numbers,
      )

    mu_hat, new = momentum.update(
      updates, optax.tree.set(state, ns_coeffs=jnp.zeros(3))
    )
    numbers = weight_dimension_numbers(updates)
    updates = _map_matrices(orthogonalize, mu_hat, numbers, shardings)
    updates = shardings.keep(updates)
    if options["adaptive"]:
      updates = jax.tree.map(
        lambda m, u: jnp.sum(m.conj() * u) * u, mu_hat, updates
      )
    return updates, optax.tree.set(new, ns_coeffs=state.ns_coeffs)

  return optax.GradientTransformationExtraArgs(in_place.init, update)


def _is_split(updates: Any, shardings: Shardings) -> bool:
  """Whether a mesh splits any leaf, outside of `shard_map`."""
  known = shardings.by_path
  found = jax.tree_util.tree_leaves_with_path(updates)
  mapped = lambda leaf: (
    AxisType.Manual in jax.typeof(leaf).sharding.mesh.axis_types
  )
  return any(
    any(_split(path, leaf, known)) and not mapped(leaf) for path, leaf in found
  )


def _split(
  path: Any, leaf: jax.Array, known: Mapping[str, NamedSharding]
) -> list[tuple[str, ...]]:
  """Returns, for each axis of a leaf, the mesh's axes that split it."""
  sharding = known.get(parameter_path(path))
  if sharding is None:
    return [()] * leaf.ndim
  return [
    tuple(name for name in names if sharding.mesh.shape[name] > 1)
    for names in axes_of(sharding, leaf.ndim)
  ]


def _map_matrices(
  f: Callable[..., jax.Array], tree: Any, numbers: Any, shardings: Shardings
) -> Any:
  """Maps a function of a matrix over a tree, each matrix on one device.

  Args:
    f: [rows, columns] -> the same, which transposes with its argument and
      leaves rows of zeros alone; or of any leaf and its `MuonDimensionNumbers`.
    tree: of matrices and stacks of them.
    numbers: a tree like it of `MuonDimensionNumbers`.
    shardings: of its leaves.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  known = shardings.by_path
  mapped, back, alike = [], {}, {}
  for i, ((path, leaf), number) in enumerate(
    zip(leaves, structure.flatten_up_to(numbers), strict=True)
  ):
    split = _split(path, leaf, known)
    rows, columns = _muon._normalize_axes(leaf, number)
    if not any(split[axis] for axis in (*rows, *columns)):
      mapped.append(f(leaf, number))
      continue
    devices = _Devices(shardings.mesh, sum(split, ()))
    stack, back[i] = _fold(leaf, number, split, devices.size)
    alike.setdefault((devices, stack.shape[1:], stack.dtype), []).append(i)
    mapped.append(stack)
  for (devices, *_), indices in alike.items():
    done = devices.map(f, [mapped[i] for i in indices])
    for i, stack in zip(indices, done, strict=True):
      mapped[i] = back[i](stack)
  return jax.tree.unflatten(structure, mapped)


def _fold(
  leaf: jax.Array,
  numbers: contrib.MuonDimensionNumbers,
  split: Sequence[Sequence[str]],
  devices: int,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """Returns a leaf as [n, rows, columns], and the way back.

  What the devices divide becomes the rows; if they divide both or neither, what
  is split over more axes already.

  Args:
    leaf: a matrix or a stack.
    numbers: which of its axes are rows and columns.
    split: for each of its axes, the mesh's axes that split it.
    devices: how many will share the rows.
  """
  fold, unfold = _muon._compute_muon_reshape(leaf, numbers)
  stack = fold(leaf)
  rows, columns = (
    (size % devices == 0, sum(len(split[axis]) for axis in axes))
    for size, axes in zip(
      stack.shape[1:], _muon._normalize_axes(leaf, numbers), strict=True
    )
  )
  if columns > rows:
    return stack.mT, lambda stack: unfold(stack.mT)
  return stack, unfold


@dataclasses.dataclass(frozen=True)
class _Devices:
  """Those along some axes of a mesh."""

  mesh: Any
  axes: tuple[str, ...]

  @property
  def size(self) -> int:
    """How many there are."""
    return math.prod(self.mesh.shape[axis] for axis in self.axes)

  def map(
    self, f: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array]
  ) -> Sequence[jax.Array]:
    """Maps `f` over the matrices of stacks, one on each device at a time.

    Args:
      f: as `_map_matrices` has it.
      stacks: each [n, rows, columns], with any n.
    """
    rows = stacks[0].shape[1]
    spec = P(None, self.axes)
    on_each = jax.shard_map(
      functools.partial(self._in_turns, f),
      mesh=self.mesh,
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )
    padding = ((0, 0), (0, -rows % self.size), (0, 0))
    done = on_each([jnp.pad(stack, padding) for stack in stacks])
    return [stack[:, :rows] for stack in done]

  def _in_turns(
    self, f: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array]
  ) -> Sequence[jax.Array]:
    """Maps `f` on a device that has some rows of each matrix."""
    lengths = [len(stack) for stack in stacks]
    rows = jnp.concatenate(stacks)
    missing = -len(rows) % self.size
    rows = jnp.pad(rows, ((0, missing), (0, 0), (0, 0)))
    # Turns, devices, a device's part of the rows, columns.
    rows = rows.reshape(-1, self.size, *rows.shape[1:])
    exchange = functools.partial(
      jax.lax.all_to_all, axis_name=self.axes, tiled=True
    )
    whole = exchange(rows, split_axis=1, concat_axis=2)
    done = jax.lax.map(lambda matrix: f(matrix[0])[None], whole)
    rows = exchange(done, split_axis=2, concat_axis=1)
    rows = rows.reshape(-1, *rows.shape[2:])[: sum(lengths)]
    return jnp.split(rows, np.cumsum(lengths)[:-1])
