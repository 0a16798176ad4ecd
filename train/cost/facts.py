"""Facts of a compiled update: exact, and found without running it.

  python -m train.cost.facts BASE [one] [six]

prints, as one JSON object, the facts of every update on eight devices and on a
TPU v5e. `train.benchmark` runs this in a second process, because its own has
one device.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import flax_mechanic
from train.cost import program, updates

Shapes = Sequence[tuple[int, ...]]

# Leaves a v5e no room to prefetch into on-chip memory. A prefetch moves no more
# bytes of HBM, but the compiler counts it as if it did.
NO_PREFETCH = {"xla_tpu_scoped_vmem_limit_kib": "120000"}
ONE_ARRAY = [(48_828, 1024)]
SIX_MATRICES = [(4096, 4096)] * 6

# On a mesh of 4x2: leaves split over both axes, over one axis, and over none.
MIXED = {
  "both": ((512, 256), P("data", "model")),
  "one": ((256, 512), P("data", None)),
  "other": ((512, 512), P(None, "model")),
  "whole": ((512,), P()),
  "whole_too": ((64, 64), P(None, None)),
}


@dataclasses.dataclass(frozen=True)
class Facts:
  """What the compiler says of a donated update.

  Attributes:
    accessed: bytes read and written, in float32 copies of the parameters.
    temporary: peak memory of the temporaries, in copies.
    aliased: memory that is updated in place, in copies.
    collectives: kind -> how many.
  """

  accessed: float
  temporary: float
  aliased: float
  collectives: Mapping[str, int]


def update_step(
  tx: optax.GradientTransformation,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
  """Returns a step, (grads, state, params) -> (state, params).

  Its results are in the order of the arguments that are donated for them.
  """

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  return step


def later_step(
  tx: optax.GradientTransformation,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
  """Returns a step after the first; the first takes x0 from the parameters."""
  step = update_step(tx)

  def later(grads, state, params):
    if isinstance(state, flax_mechanic.MechanicState | contrib.MechanicState):
      state = state._replace(count=jnp.int32(1))
    return step(grads, state, params)

  return later


def copy_bytes(params: Any) -> int:
  """Returns the bytes of a float32 copy of one device's part of a tree."""
  local = lambda leaf: (
    leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
  )
  return 4 * sum(math.prod(local(leaf)) for leaf in jax.tree.leaves(params))


def facts_of(compiled: Any, one_copy: int) -> Facts:
  """Returns the facts of a compiled function, in copies of so many bytes."""
  memory = compiled.memory_analysis()
  found = program.collectives(compiled.as_text())
  return Facts(
    accessed=compiled.cost_analysis()["bytes accessed"] / one_copy,
    temporary=memory.temp_size_in_bytes / one_copy,
    aliased=memory.alias_size_in_bytes / one_copy,
    collectives={kind: each.count for kind, each in found.items()},
  )


def compile_update(
  tx: optax.GradientTransformation,
  shapes: Shapes,
  sharding: NamedSharding | None = None,
  options: dict[str, Any] | None = None,
) -> Facts:
  """Compiles a donated step after the first, over float32 leaves."""
  spec = lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=sharding
  )
  params = {
    f"p{i}": jax.ShapeDtypeStruct(shape, jnp.float32)
    for i, shape in enumerate(shapes)
  }
  state = jax.eval_shape(tx.init, params)
  params, state = jax.tree.map(spec, (params, state))
  step = jax.jit(later_step(tx), donate_argnums=(1, 2))
  lowered = step.lower(params, state, params)
  return facts_of(lowered.compile(options), copy_bytes(params))


class MixedModel(nnx.Module):
  """Parameters with the placements of `MIXED`, and nothing else."""

  def __init__(self, mesh: jax.sharding.Mesh):
    for name, (shape, spec) in MIXED.items():
      value = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
      setattr(self, name, nnx.Param(value))

  @property
  def params(self) -> Any:
    """The arrays by name."""
    return nnx.as_pure(nnx.state(self, nnx.Param))


def mixed_mesh(axis_type: AxisType) -> jax.sharding.Mesh:
  """Returns the mesh of 4x2 that `MIXED` is for; needs eight devices."""
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def compile_optimizer(tx: optax.GradientTransformation, mesh: Any) -> Facts:
  """Compiles `Optimizer.update` of a `MixedModel`."""
  with jax.set_mesh(mesh):
    model = MixedModel(mesh)
    grads = nnx.state(MixedModel(mesh), nnx.Param)
    optimizer = flax_mechanic.Optimizer(model, tx)
    step = nnx.jit(
      lambda model, optimizer, grads: optimizer.update(model, grads) and None,
      donate_argnums=(0, 1),
    )
    compiled = step.lower(model, optimizer, grads).compile()
  return facts_of(compiled, copy_bytes(model.params))


def v5e() -> NamedSharding | None:
  """Returns one chip to compile for, or None if libtpu is not installed."""
  try:
    devices = program.tpu_devices("v5e:2x2")
  except ImportError:
    return None
  return NamedSharding(jax.sharding.Mesh(np.array(devices[:1]), ("chip",)), P())


_ON_V5E = {"one": ONE_ARRAY, "six": SIX_MATRICES}


def main(base: str, *arrays: str) -> None:
  """Prints the facts of all updates over a base as JSON.

  Args:
    base: a row of the table.
    *arrays: of "one" and "six", what to compile for a v5e; both by default.
  """
  updates.register_reference()
  found: dict[str, dict[str, Any]] = {name: {} for name in updates.UPDATES}
  chip = v5e()
  for name, update in updates.UPDATES.items():
    tx = update.make(base)
    facts = compile_optimizer(tx, mixed_mesh(AxisType.Auto))
    found[name]["eight devices"] = dataclasses.asdict(facts)
    for label in arrays or _ON_V5E:
      if chip is not None:
        for suffix, options in (("", None), (" HBM", NO_PREFETCH)):
          facts = compile_update(tx, _ON_V5E[label], chip, options)
          found[name][label + suffix] = dataclasses.asdict(facts)
  json.dump(found, sys.stdout)


if __name__ == "__main__":
  main(*sys.argv[1:])
