"""The job's mesh, how arrays are placed on it, and how batches get there."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from flax_mechanic.errors import UsageError, did_you_mean

# "data" splits the batch; "fsdp" the batch, the parameters and the optimizer's
# state; "tensor" the parameters and the activations.
AXES = ("data", "fsdp", "tensor")

# The models' logical axes -> the mesh's axes that they are split over. Flax's
# own rules do not ask whether the sizes divide (flax 0.12), and a head of ten
# classes does not divide by eight.
RULES: Mapping[str | None, tuple[str, ...]] = {
  None: (),
  "batch": ("data", "fsdp"),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
}

_AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def one_device() -> Mesh:
  """Returns the mesh of a job on one device."""
  return jax.make_mesh(
    (1,) * len(AXES),
    AXES,
    devices=jax.devices()[:1],
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh that `config.mesh` describes.

  Args:
    config: `data`, `fsdp` and `tensor` are sizes, at most one of them -1 for
      what the others leave; `axis_type` is auto or explicit.
    devices: all devices of all processes by default.

  Raises:
    UsageError: the sizes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if config.axis_type not in _AXIS_TYPES:
    raise UsageError(
      f"config.mesh.axis_type={config.axis_type!r} is unknown"
      f"{did_you_mean(config.axis_type, _AXIS_TYPES)}"
    )
  sizes = {axis: config[axis] for axis in AXES}
  given = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or known < 1 or min(sizes.values()) < -1:
    raise UsageError(
      f"config.mesh is {given}: each must be 1 or more, except that one may be "
      "-1, for the devices that the others leave"
    )
  if len(devices) % known or (not free and known != len(devices)):
    raise UsageError(
      f"config.mesh is {given}, and there are {len(devices)} devices; type "
      f"--config.mesh.{(free or AXES)[0]}=-1 and sizes whose product divides "
      f"{len(devices)}"
    )
  sizes |= dict.fromkeys(free, len(devices) // known)
  axis_types = (_AXIS_TYPES[config.axis_type],) * len(AXES)
  if slices(devices) > 1:
    return Mesh(_over_slices(devices, sizes.values()), AXES, axis_types)
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices
  )


def slices(devices: Iterable[Any]) -> int:
  """Returns of how many slices devices are: TPU pods, machines of GPUs."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _over_slices(devices: Sequence[Any], sizes: Iterable[int]) -> np.ndarray:
  """Arranges devices so that the first axes go from slice to slice.

  The network between slices is slow, and what "data" moves is the least.
  """
  rest, within, between = slices(devices), [], []
  for size in sizes:
    between.append(math.gcd(size, rest))
    within.append(size // between[-1])
    rest //= between[-1]
  return mesh_utils.create_hybrid_device_mesh(within, between, devices)


def logical(*axes: str | None) -> dict[str, Any]:
  """Returns the metadata of a parameter whose axes have these logical names.

  For example `nnx.Linear(4, 8, kernel_metadata=logical("embed", "mlp"))`.
  """
  return {"out_sharding": axes, "eager_sharding": False}


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> P:
  """Returns the partition of an array by `RULES`.

  A dimension that the mesh's axes do not divide is not split.

  Args:
    axes: the logical name of each dimension.
    shape: of the array.
    mesh: a `Mesh` or an `AbstractMesh`; one without axes splits nothing.
  """
  entries = []
  for axis, size in zip(axes, shape, strict=True):
    names = tuple(n for n in RULES[axis] if mesh.shape.get(n, 1) > 1)
    divides = size % math.prod(mesh.shape[n] for n in names) == 0
    entries.append(
      (names if len(names) > 1 else names[0]) if names and divides else None
    )
  return P(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation's placement by `RULES`; call it while tracing.

  Args:
    x: an activation; returned unchanged unless the mesh set has automatic axes.
    *axes: the logical name of each dimension.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or set(mesh.axis_types) != {AxisType.Auto}:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def annotate(model: nnx.Module) -> None:
  """Replaces the logical axes of the parameters by those of the mesh set.

  A parameter without names is replicated.
  """
  mesh = jax.sharding.get_abstract_mesh()
  for _, node in nnx.iter_graph(model):
    if isinstance(node, nnx.Param):
      shape = node.get_value().shape
      axes = node.get_metadata().get("out_sharding") or (None,) * len(shape)
      node.set_metadata(out_sharding=tuple(spec(axes, shape, mesh)))


def batch_sharding(size: int, mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches of a size."""
  return NamedSharding(mesh, spec(("batch",), (size,), mesh))


def spread(
  load: Callable[[slice], Mapping[str, np.ndarray]], size: int, mesh: Mesh
) -> Mapping[str, Any]:
  """Returns a batch with its leading axis split over the mesh.

  Args:
    load: rows -> those rows of the batch. Each process loads its own.
    size: of the whole batch. If the mesh does not divide it, the batch is
      replicated.
    mesh: the job's.
  """
  rows = batch_sharding(size, mesh)
  indices = rows.addressable_devices_indices_map((size,)).values()
  spans = [index[0].indices(size) for index in indices if index is not None]
  first = min(start for start, _, _ in spans)
  mine = load(slice(first, max(stop for _, stop, _ in spans)))

  def place_rows(array: np.ndarray) -> jax.Array:
    def of_device(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(size)
      return array[start - first : stop - first]

    shape = (size, *array.shape[1:])
    return jax.make_array_from_callback(shape, rows, of_device)

  return {name: place_rows(array) for name, array in mine.items()}
