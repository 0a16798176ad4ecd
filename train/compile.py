r"""Compiles the training step for devices that this machine does not have.

  python -m train.compile --config=FILE[:VARIANT] --topology=TOPOLOGY

prints what a step needs on each device: memory, and whether it fits, matrix
products, bytes and collectives. It compares the job's base optimizer alone,
optax's mechanize over it and mechanic over it, and adds the job's own optimizer
if that is another.

--topology=v5e:16x16     a slice of a TPU pod; also v5p:4x4x4, v6e:16x16,
                         v4:4x4x4 and others; needs the extra [tpu]
--topology=cpu:8         that many CPU devices
--num_slices=N           that many slices of the topology; config.mesh.data goes
                         from slice to slice, as far as it divides
--config.FIELD=VALUE     replaces a field of the job, any number of times

For example:

  python -m train.compile --config=configs/text.py:1b --topology=v5e:16x16
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from flax_mechanic import make_optimizer, methods
from flax_mechanic.errors import UsageError, first_line
from train import flags
from train.command import run_command
from train.cost import program, updates
from train.cost.step import measure
from train.fields import check_fields
from train.job import make_job
from train.mesh import slices
from train.tables import format_table

# GiB of HBM a chip.
_HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_FORMAT = re.compile(
  r"(cpu):([1-9]\d*)|(v4|v5e|v5p|v6e):([1-9]\d*(?:x[1-9]\d*)+)"
)


def main(argv: Sequence[str] | None = None) -> int:
  """Compiles, prints, and returns the exit status: 2 for bad input."""
  return run_command(__doc__, _report, argv)


def _report(arguments: Sequence[str]) -> Iterator[str]:
  updates.register_reference()
  config, given = flags.read(arguments, ["topology"], ["num_slices"])
  check_fields(config)
  topology = given["topology"]
  devices = _devices(topology, given.get("num_slices", "1"))
  hbm = _HBM.get(topology.split(":")[0])
  yield (
    f"{len(devices)} devices of {devices[0].device_kind}"
    + (f", {hbm} GiB of HBM each" if hbm else "")
    + f", {len({device.process_index for device in devices})} processes"
    + (f", {slices(devices)} slices" if slices(devices) > 1 else "")
  )
  columns = {}
  for name, variant in _variants(config):
    start = time.perf_counter()
    columns[name] = measure(make_job(variant, devices), hbm)
    yield f"compiled with {name} in {time.perf_counter() - start:.0f} s"
  labels = dict.fromkeys(label for each in columns.values() for label in each)
  rows = [
    [label, *(column.get(label, "") for column in columns.values())]
    for label in labels
  ]
  yield ""
  yield format_table([["a step, on each device", *columns], *rows])
  yield ""
  yield (
    "In all: the arguments (parameters, the optimizer's state, the batch), "
    "temporaries and the program. Matrix products and collectives are counted "
    "in every layer; the compiler counts the bytes of a loop over layers once "
    "(--noconfig.model.scan_layers unrolls it, and takes longer). A send goes "
    "from slice to slice, and the other collectives stay within one."
  )


def _devices(topology: str, num_slices: str) -> Sequence[Any]:
  """Returns the devices of that many slices of a topology.

  Raises:
    UsageError: there is no such topology, or no compiler for it is installed.
  """
  match = _FORMAT.fullmatch(topology)
  if not match:
    raise UsageError(
      f"--topology={topology} is unknown; type --topology=v5e:16x16 (or v4, "
      "v5p, v6e) or --topology=cpu:8"
    )
  if not num_slices.isdecimal() or (count := int(num_slices)) < 1:
    raise UsageError(
      f"--num_slices={num_slices} is no number of slices; type --num_slices=2"
    )
  if match[1] and count > 1:
    raise UsageError(
      f"--topology={topology} has no slices; leave --num_slices out, or type "
      "--topology=v5e:16x16"
    )
  jax.config.update("jax_platforms", "cpu")
  if match[1]:
    jax.config.update("jax_num_cpu_devices", int(match[2]))
    return jax.devices()
  try:
    return program.tpu_devices(topology, count)
  except ImportError:
    raise UsageError(
      f"--topology={topology} needs the compiler for TPUs; type "
      'pip install -e ".[tpu]" -c constraints.txt, or --topology=cpu:8'
    ) from None
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(
      f"--topology={topology} is not one that the compiler knows "
      f"({first_line(error)}); type --topology=v5e:16x16"
    ) from None


def _variants(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields the job with each update over its base, and as it is.

  A base that cannot be under mechanic is replaced by mechanic's default one.
  """

  def with_update(update: updates.Update, base: str) -> ConfigDict:
    variant = config.copy_and_resolve_references()
    update.configure(variant, base)
    return variant

  flag = updates.UPDATES[updates.FLAG]
  base = config.opt[config.optimizer].get("base", config.optimizer)
  try:
    make_optimizer(with_update(flag, base))
  except UsageError:
    base = methods()[updates.FLAG].options["base"]
  for name in ("base alone", "optax's mechanize", updates.FLAG):
    update = updates.UPDATES[name]
    yield (name if update.row else base), with_update(update, base)
  if config.optimizer not in (base, updates.FLAG):
    yield config.optimizer, config


if __name__ == "__main__":
  sys.exit(main())
