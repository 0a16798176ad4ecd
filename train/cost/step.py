"""What a job's training step needs on each device."""

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import jax

from train.cost import program
from train.job import Job
from train.mesh import slices

_MIB = 2**20


def measure(job: Job, hbm: int | None) -> Mapping[str, str]:
  """Compiles a job's training step and returns what it needs, as text.

  Args:
    job: on devices that need not be there.
    hbm: GiB of memory a device, to say whether the step fits; None where that
      is not known.

  Returns:
    Label -> value, of one device.
  """
  model, optimizer = (job.target[part] for part in ("model", "optimizer"))
  batch = job.batch_target()
  count = sum(leaf.size for leaf in jax.tree.leaves(model))
  column = {
    "parameters": f"{count / 1e6:,.1f} million",
    "parameters, MiB": _mib(_held(model)),
    "optimizer's state, MiB": _mib(_held(optimizer)),
    "batch, MiB": _mib(_held(batch)),
  }
  with jax.set_mesh(job.mesh):
    traced = cast(Any, job.train_step).trace(job.target, batch)
    flops = program.matmul_flops(traced.jaxpr)
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      over = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", str(error))
      why = f", it takes {over[1]} of {over[2]}" if over else ""
      return column | {"fits": f"no{why}"}
  memory = compiled.memory_analysis()
  total = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  column |= {
    "arguments as compiled, MiB": _mib(memory.argument_size_in_bytes),
    "temporaries, MiB": _mib(memory.temp_size_in_bytes),
    "program, MiB": _mib(memory.generated_code_size_in_bytes),
    "in all, MiB": _mib(total),
  }
  if hbm:
    fits = total <= hbm * 1024 * _MIB
    column["fits"] = (
      f"{'yes' if fits else 'no'}, {total / (hbm * 1024 * _MIB):.0%}"
    )
  if memory.host_argument_size_in_bytes:
    column["host memory, MiB"] = _mib(memory.host_argument_size_in_bytes)
  cost = compiled.cost_analysis() or {}
  column |= {
    "GFLOP in matrix products": f"{flops / job.mesh.size / 1e9:,.1f}",
    "compiler's bytes, MiB": _mib(cost.get("bytes accessed", 0)),
  }
  for kind, found in program.collectives(compiled.as_text()).items():
    if kind != "send" or slices(job.mesh.devices.flat) > 1:
      column[kind] = f"{found.count}, {_mib(found.bytes)} MiB"
  return column


def _held(tree: Any) -> int:
  """Returns the bytes of one device's part of a tree."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _mib(count: float) -> str:
  return f"{count / _MIB:,.1f}"
