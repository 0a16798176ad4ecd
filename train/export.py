r"""Writes a run's model where a plain Flax job loads it.

  python -m train.export DIR OUT

DIR  the --workdir of a run; its newest checkpoint that is intact is read
OUT  a new folder; Orbax writes the model's parameters and batch statistics
     there, those that the optimizer evaluates, and a job of one's own reads
     them:

  state = nnx.state(model, nnx.Not(nnx.RngState))
  nnx.update(model, orbax.checkpoint.StandardCheckpointer().restore(OUT, state))
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from flax_mechanic.checkpoints.checkpointer import Checkpointer
from flax_mechanic.errors import UsageError
from train.command import run_command
from train.job import make_job


def main(argv: Sequence[str] | None = None) -> int:
  """Exports, and returns the exit status: 2 for bad input."""
  absl.logging.set_verbosity(absl.logging.ERROR)
  return run_command(__doc__, _report, argv)


def _report(arguments: Sequence[str]) -> Iterator[str]:
  if len(arguments) != 2:
    raise UsageError("type python -m train.export DIR OUT")
  given, out = (Path(each).expanduser().absolute() for each in arguments)
  if out.exists():
    raise UsageError(f"{out} is there already; name a new folder")
  if not (given / "checkpoints").is_dir():
    raise UsageError(f"{given} holds no checkpoints; type a run's --workdir")
  with Checkpointer(given / "checkpoints", read_only=True) as checkpointer:
    latest = checkpointer.latest()
    if latest is None:
      raise UsageError(f"{given} holds no checkpoint")
    job = make_job(_config(checkpointer.read(latest)), jax.devices()[:1])
    with jax.set_mesh(job.mesh):
      restored = checkpointer.restore(job.target)
  with jax.set_mesh(job.automatic), ocp.StandardCheckpointer() as writer:
    model = job.eval_model(restored.state)
    writer.save(out, nnx.state(model, nnx.Not(nnx.RngState)))
  yield f"step {restored.step} of {given} is in {out}"


def _config(record: Any) -> ConfigDict:
  """Returns a saved config, for one device."""
  fields = {
    field: tuple(value) if isinstance(value, list) else value
    for field, value in record["config"].items()
  }
  config = ConfigDict(traverse_util.unflatten_dict(fields, sep="."))
  config.mesh.update(data=1, fsdp=1, tensor=1)
  config.offload_optimizer_state = False
  return config


if __name__ == "__main__":
  sys.exit(main())
