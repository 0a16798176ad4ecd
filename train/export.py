r"""Writes a run's model where a plain Flax job loads it.

  python -m train.export DIR OUT [--config.FIELD=VALUE ...]

DIR  the --workdir of a run; its newest intact checkpoint is read, without what
     only the training needs
OUT  a new folder; Orbax writes the parameters that the optimizer evaluates and
     the model's batch statistics there, and a job of your own reads them:

  state = nnx.state(model, nnx.Not(nnx.RngState))
  nnx.update(model, orbax.checkpoint.StandardCheckpointer().restore(OUT, state))

A field of the run's config may have another value here, as the path of its data
on this machine: --config.data.path=FOLDER.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from flax_mechanic.checkpoints import storage
from flax_mechanic.checkpoints.checkpointer import Checkpointer
from flax_mechanic.errors import UsageError, first_line
from train import flags
from train.command import run_command
from train.job import Job, make_job


def main(argv: Sequence[str] | None = None) -> int:
  """Exports, and returns the exit status: 2 for bad input."""
  return run_command(__doc__, _report, argv)


def _report(arguments: Sequence[str]) -> Iterator[str]:
  arguments = flags.joined(arguments)
  folders = [each for each in arguments if not each.startswith("-")]
  _, overrides = flags.split([e for e in arguments if e not in folders], [])
  if len(folders) != 2:
    raise UsageError("type python -m train.export DIR OUT")
  given, out = map(storage.path, folders)
  if not storage.is_bucket(out):
    out = out.absolute()  # Orbax asks for it.
    storage.check_name(out)
  if out.exists():
    raise UsageError(f"{out} exists already; name a new folder")
  if not (given / "checkpoints").is_dir():
    raise UsageError(f"{given} holds no checkpoints; type a run's --workdir")
  if not storage.is_bucket(out):
    flags.check_writable(out.parent, str(out))
  with Checkpointer(given / "checkpoints", read_only=True) as checkpointer:
    job = _job(checkpointer, overrides)

    def exported(state: nnx.State) -> nnx.State:
      objects = nnx.merge(job.functions.graphdef, state)
      model = objects["optimizer"].eval_model(objects["model"])
      return nnx.state(model, nnx.Not(nnx.RngState))

    # By default Orbax renames in s3://.
    whole = ocp.path.atomicity.CommitFileTemporaryPath
    with (
      jax.set_mesh(job.mesh),
      ocp.StandardCheckpointer(
        temporary_path_class=whole if storage.is_bucket(out) else None
      ) as writer,
    ):
      needed = _needed(exported, job.target)
      restored = checkpointer.restore(needed, part=True)
      # Of everything else the shape is enough.
      state = nnx.merge_state(job.target, restored.state)
      writer.save(out, exported(state))
  yield from restored.damaged
  for number, where in storage.storage(given / "checkpoints").aside():
    if number > restored.step:
      yield f"step {number} is damaged and {where}"
  yield f"step {restored.step} of {given} is in {out}"


def _job(
  checkpointer: Checkpointer, overrides: Sequence[tuple[str, str | None]]
) -> Job:
  """Returns the job of the newest step whose record can be read.

  Args:
    checkpointer: of the run.
    overrides: for `flags.override`.
  """
  problem = f"{checkpointer.directory} holds no checkpoint"
  for step in reversed(checkpointer.steps()):
    try:
      record = checkpointer.read(step)
    except UsageError as error:
      problem = str(error)
      continue
    try:
      config = _config(record)
      flags.override(config, overrides)
      return make_job(config, jax.devices()[:1])
    except UsageError:
      raise
    except Exception as error:  # The config may hold anything.
      raise UsageError(
        f"the config in step {step} of {checkpointer.directory} is of no job "
        f"of this version ({type(error).__name__}: {first_line(error)}); "
        "export with the version that trained it"
      ) from error
  raise UsageError(problem)


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


def _config(record: Mapping[str, Any]) -> ConfigDict:
  """Returns a saved config, for one device.

  Its regular expressions are replaced: the run may be somebody else's, and
  there are expressions that take forever.
  """
  fields = {
    field: tuple(value) if isinstance(value, list) else value
    for field, value in record["config"].items()
  }
  config = ConfigDict(traverse_util.unflatten_dict(fields, sep="."))
  config.mesh.update(data=1, fsdp=1, tensor=1, axis_type="auto")
  config.offload_optimizer_state = False
  if config.freeze:
    frozen = map(re.escape, _frozen(record["arrays"]))
    config.freeze = (f"^({'|'.join(frozen)})$",)
  # What is exported depends on neither.
  config.no_decay = ()
  for options in config.opt.values():
    if "groups" in options:
      options.groups = ""
  return config


def _frozen(paths: Collection[str]) -> list[str]:
  """Returns the paths of the model without an array in the optimizer's state.

  Args:
    paths: of a whole state.
  """
  within = lambda part: [
    path.removeprefix(f"{part}/") for path in paths if path.startswith(part)
  ]
  model = {*within("model")}
  trained = set()
  for path in within("optimizer"):
    names = path.split("/")
    ends = ("/".join(names[i:]) for i in range(1, len(names)))
    trained.add(next((end for end in ends if end in model), ""))
  return sorted(model - trained)


if __name__ == "__main__":
  sys.exit(main())
