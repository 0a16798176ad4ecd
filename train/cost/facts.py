"""Facts of a compiled update, exact and without running it.

  python -m train.cost.facts BASE

prints what `train.benchmark` cannot compile in a process that has one device
and times it: one JSON object, for updates on eight devices and for a TPU v5e.
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
from train.cost import program

Shapes = Sequence[tuple[int, ...]]

# A v5e without room for prefetches into on-chip memory, which move no more
# bytes of HBM but are counted as if they did.
NO_PREFETCH = {"xla_tpu_scoped_vmem_limit_kib": "120000"}
ONE_ARRAY = [(48_828, 1024)]
SIX_MATRICES = [(4096, 4096)] * 6

# On a mesh of 4x2: leaves split over both axes, over one, and over none.
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
    temporary: largest sum of the temporaries, likewise.
    aliased: what is updated in place, likewise.
    collectives: name -> how many.
  """

  accessed: float
  temporary: float
  aliased: float
  collectives: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Update:
  """An update to be measured.

  Attributes:
    make: base -> transformation.
    unavoidable: copies to read and write over the base's own.
    options: of `config.opt.mechanic` that say the same; None for the base.
  """

  make: Callable[[optax.GradientTransformation], optax.GradientTransformation]
  unavoidable: float
  options: Mapping[str, Any] | None = None


# Optax's options, and what the flag takes in their place.
_DROP_IN: dict[str, Any] = {
  "weight_decay": 1e-2,
  "mean_decay": False,
  "eps": 1e-8,
  "relative_s_init": 0.0,
  "groups": "",
}
_FLAG = {
  option: flax_mechanic.methods()["mechanic"].options[option]
  for option in _DROP_IN
}


def _mechanize(unavoidable: float, **options: Any) -> Update:
  options = _DROP_IN | options
  return Update(
    lambda base: flax_mechanic.mechanize(base, **options),
    unavoidable,
    options,
  )


BASES = {"adamw": optax.adamw, "sgd": optax.sgd, "lion": optax.lion}
# What the bases read and write: g, x, their moments; x and the moments.
BASE_COPIES = {"adamw": 7, "sgd": 3, "lion": 5}
# Over that, mechanize reads g, x and x0 for its inner products and x0 once
# more; with a delayed scale, x0 alone. Delta is written too.
UPDATES = {
  "base alone": Update(lambda base: base, 0),
  "optax mechanize": Update(contrib.mechanize, 4),
  "mechanize": _mechanize(4),
  "the flag's": _mechanize(4, **_FLAG),
  "x0_dtype=bfloat16": _mechanize(3, x0_dtype="bfloat16"),
  "store_delta": _mechanize(5, store_delta=True),
  "delayed_scale": _mechanize(1, delayed_scale=True),
  "delayed_scale, bfloat16": _mechanize(
    0.5, delayed_scale=True, x0_dtype="bfloat16"
  ),
}


def update_step(
  tx: optax.GradientTransformation,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
  """Returns (grads, state, params) -> (state, params), in donation's order."""

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return state, optax.apply_updates(params, updates)

  return step


def later_step(
  tx: optax.GradientTransformation,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
  """Returns the same for a step after the first, which takes x0 from params."""
  step = update_step(tx)

  def later(grads, state, params):
    if isinstance(state, flax_mechanic.MechanicState | contrib.MechanicState):
      state = state._replace(count=jnp.int32(1))
    return step(grads, state, params)

  return later


def copy_bytes(params: Any) -> int:
  """Returns the bytes of one float32 copy of what a device holds of a tree."""
  local = lambda leaf: (
    leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
  )
  return 4 * sum(math.prod(local(leaf)) for leaf in jax.tree.leaves(params))


def facts_of(compiled: Any, one_copy: int) -> Facts:
  """Returns the facts of a compiled function, given a copy's bytes."""
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
  """Compiles a later step, donated, over float32 leaves of these shapes."""
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
  """Parameters of several placements on a mesh, and nothing else."""

  def __init__(self, mesh: jax.sharding.Mesh):
    for name, (shape, spec) in MIXED.items():
      value = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
      setattr(self, name, nnx.Param(value))

  @property
  def params(self) -> Any:
    """The arrays by name."""
    return nnx.as_pure(nnx.state(self, nnx.Param))


def mixed_mesh(axis_type: AxisType) -> jax.sharding.Mesh:
  """Returns the mesh of 4x2 that `MIXED` is for; wants eight devices."""
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def compile_bare(tx: optax.GradientTransformation, mesh: Any) -> Facts:
  """Compiles the transformation's own update of a `MixedModel`."""
  with jax.set_mesh(mesh):
    params = MixedModel(mesh).params
    step = jax.jit(update_step(tx), donate_argnums=(1, 2))
    compiled = step.lower(params, tx.init(params), params).compile()
  return facts_of(compiled, copy_bytes(params))


def compile_optimizer(tx: optax.GradientTransformation, mesh: Any) -> Facts:
  """Compiles the update by `Optimizer` of a `MixedModel`."""
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
  """Returns a chip that is not there, or None without the compiler's wheel."""
  try:
    devices = program.tpu_devices("v5e:2x2")
  except ImportError:
    return None
  return NamedSharding(jax.sharding.Mesh(np.array(devices[:1]), ("chip",)), P())


def main(base: str) -> None:
  """Prints the facts of all updates over a base as JSON."""
  found: dict[str, dict[str, Any]] = {name: {} for name in UPDATES}
  chip = v5e()
  for name, update in UPDATES.items():
    tx = update.make(BASES[base](1.0))
    for axis_type in (AxisType.Auto, AxisType.Explicit):
      if axis_type == AxisType.Explicit and name == "optax mechanize":
        continue  # It raises a ShardingTypeError (optax 0.2.8).
      facts = compile_optimizer(tx, mixed_mesh(axis_type))
      found[name][axis_type.name] = dataclasses.asdict(facts)
    for label, shapes in (("one", ONE_ARRAY), ("six", SIX_MATRICES)):
      if chip is not None:
        for suffix, options in (("", None), (" HBM", NO_PREFETCH)):
          facts = compile_update(tx, shapes, chip, options)
          found[name][label + suffix] = dataclasses.asdict(facts)
  json.dump(found, sys.stdout)


if __name__ == "__main__":
  main(sys.argv[1])
