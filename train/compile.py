r"""Compiles the training step for devices that are not there.

  python -m train.compile --config=FILE[:VARIANT] --topology=TOPOLOGY

prints what the step takes of each device: memory, and whether it fits, matrix
products, bytes, collectives; for the job's base optimizer alone, for optax's
mechanize and for mechanic over it, and for the job's optimizer if that is
another.

--topology=v5e:16x16     a slice of a TPU pod; also v5p:4x4x4, v6e:16x16,
                         v4:4x4x4 and others; wants the extra [tpu]
--topology=cpu:8         as many devices of a CPU
--config.FIELD=VALUE     replaces a field of the job, any number of times

For example:

  python -m train.compile --config=configs/text.py:1b --topology=v5e:16x16
"""

import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from flax_mechanic import make_optimizer
from flax_mechanic.errors import UsageError
from train import flags
from train.command import run_command
from train.cost import program
from train.job import Job, make_job
from train.tables import format_table

# GiB of HBM a chip.
_HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_FORMAT = re.compile(r"(cpu):(\d+)|(v4|v5e|v5p|v6e):(\d+(?:x\d+)+)")
_MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
  """Compiles, prints, and returns the exit status: 2 for bad input."""
  return run_command(__doc__, _report, argv)


def _report(arguments: Sequence[str]) -> Iterator[str]:
  config, given = flags.read(arguments, ["topology"])
  topology = given["topology"]
  devices = _devices(topology)
  hbm = _HBM.get(topology.split(":")[0])
  yield (
    f"{len(devices)} devices of {devices[0].device_kind}"
    + (f", {hbm} GiB of HBM each" if hbm else "")
    + f", {len({device.process_index for device in devices})} processes"
  )
  columns = {}
  for name, variant, tx in _variants(config):
    start = time.perf_counter()
    columns[name] = _measure(make_job(variant, devices, tx), hbm)
    yield f"compiled with {name} in {time.perf_counter() - start:.0f} s"
  labels = dict.fromkeys(label for each in columns.values() for label in each)
  rows = [
    [label, *(column.get(label, "") for column in columns.values())]
    for label in labels
  ]
  yield ""
  yield format_table([["a step, of each device", *columns], *rows])
  yield ""
  yield (
    "In all: the arguments (parameters, optimizer's state, batch), temporaries "
    "and the program. Matrix products and collectives are counted in every "
    "layer; the compiler counts the bytes of a loop over layers once "
    "(--noconfig.model.scan_layers unrolls it, and takes longer)."
  )


def _devices(topology: str) -> Sequence[Any]:
  """Returns the topology's devices.

  Raises:
    UsageError: there is no such topology, or no compiler for it here.
  """
  match = _FORMAT.fullmatch(topology)
  if not match:
    raise UsageError(
      f"--topology={topology} is not known; type --topology=v5e:16x16 (or v4, "
      "v5p, v6e) or --topology=cpu:8"
    )
  jax.config.update("jax_platforms", "cpu")
  if match[1]:
    jax.config.update("jax_num_cpu_devices", int(match[2]))
    return jax.devices()
  try:
    return program.tpu_devices(topology)
  except ImportError:
    raise UsageError(
      f"--topology={topology} wants the compiler for TPUs; type "
      'pip install -e ".[tpu]" -c constraints.txt, or --topology=cpu:8'
    ) from None
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(
      f"--topology={topology} is not one that the compiler knows "
      f"({str(error).splitlines()[0]}); type --topology=v5e:16x16"
    ) from None


def _variants(
  config: ConfigDict,
) -> Iterator[tuple[str, ConfigDict, optax.GradientTransformation | None]]:
  """Yields the job with its base, optax's and our mechanize over that, as is.

  A base that mechanic does not take is left for adamw.
  """

  def with_optimizer(name: str, base: str = "") -> ConfigDict:
    variant = config.copy_and_resolve_references()
    variant.optimizer = name
    if base:
      variant.opt[name].base = base
    return variant

  base = config.opt[config.optimizer].get("base", config.optimizer)
  try:
    make_optimizer(with_optimizer("mechanic", base))
  except UsageError:
    base = "adamw"
  alone = with_optimizer(base)
  yield base, alone, None
  yield "optax's mechanize", alone, contrib.mechanize(make_optimizer(alone))
  yield "mechanic", with_optimizer("mechanic", base), None
  if config.optimizer not in (base, "mechanic"):
    yield config.optimizer, config, None


def _measure(job: Job, hbm: int | None) -> Mapping[str, str]:
  """Compiles a job's training step; returns label -> value."""
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
    column[kind] = f"{found.count}, {_mib(found.bytes)} MiB"
  return column


def _held(tree: Any) -> int:
  """Returns the bytes that a device holds of a tree."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _mib(count: float) -> str:
  return f"{count / _MIB:,.1f}"


if __name__ == "__main__":
  sys.exit(main())
