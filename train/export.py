r"""Writes a run's model where a plain Flax job loads it.

  python -m train.export DIR OUT

DIR  the --workdir of a run; its newest intact checkpoint is read, without what
     only the training needs
OUT  a new folder; Orbax writes the parameters that the optimizer evaluates and
     the model's batch statistics there, and a job of your own reads them:

  state = nnx.state(model, nnx.Not(nnx.RngState))
  nnx.update(model, orbax.checkpoint.StandardCheckpointer().restore(OUT, state))
"""

import sys
from collections.abc import Callable, Iterator, Sequence
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
    raise UsageError(f"{out} exists already; name a new folder")
  if not (given / "checkpoints").is_dir():
    raise UsageError(f"{given} holds no checkpoints; type a run's --workdir")
  with Checkpointer(given / "checkpoints", read_only=True) as checkpointer:
    latest = checkpointer.latest()
    if latest is None:
      raise UsageError(f"{given} holds no checkpoint")
    job = make_job(_config(checkpointer.read(latest)), jax.devices()[:1])

    def exported(state: nnx.State) -> nnx.State:
      objects = nnx.merge(job.graphdef, state)
      model = objects["optimizer"].eval_model(objects["model"])
      return nnx.state(model, nnx.Not(nnx.RngState))

    with jax.set_mesh(job.mesh), ocp.StandardCheckpointer() as writer:
      needed = _needed(exported, job.target)
      restored = checkpointer.restore(needed, part=True)
      # Of everything else the shape is enough.
      state = nnx.merge_state(job.target, restored.state)
      writer.save(out, exported(state))
  yield from restored.damaged
  yield f"step {restored.step} of {given} is in {out}"


def _needed(function: Callable[[nnx.State], Any], state: nnx.State) -> Any:
  """Returns the part of a state on which a function's results depend."""
  jaxpr = jax.make_jaxpr(function)(state).jaxpr
  needed = {id(variable) for variable in jaxpr.outvars}
  for equation in reversed(jaxpr.eqns):
    if any(id(variable) in needed for variable in equation.outvars):
      needed |= {id(variable) for variable in equation.invars}
  is_needed = jax.tree.unflatten(
    jax.tree.structure(state), [id(each) in needed for each in jaxpr.invars]
  )
  return nnx.from_flat_state(
    [
      leaf
      for leaf, (_, needs) in zip(
        nnx.to_flat_state(state), nnx.to_flat_state(is_needed), strict=True
      )
      if needs.get_value()
    ]
  )


def _config(record: Any) -> ConfigDict:
  """Returns a saved config, for one device."""
  fields = {
    field: tuple(value) if isinstance(value, list) else value
    for field, value in record["config"].items()
  }
  config = ConfigDict(traverse_util.unflatten_dict(fields, sep="."))
  config.mesh.update(data=1, fsdp=1, tensor=1, axis_type="auto")
  config.offload_optimizer_state = False
  return config


if __name__ == "__main__":
  sys.exit(main())
