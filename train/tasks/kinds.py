"""The kinds of models of a task, by `config.model.name`."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import ml_collections
from flax import nnx

from flax_mechanic.errors import UsageError, did_you_mean


class Kind(NamedTuple):
  """One of a task's models.

  Attributes:
    create: (config.model, dtype=, rngs=) -> a new model.
    fields: of config.model, except the name.
    check: config.model -> None; raises a UsageError for values out of range.
    config: an example with these fields, such as configs/digits.py:vit.
    optional: fields that may be missing, as in configs of earlier versions.
  """

  create: Callable[..., nnx.Module]
  fields: Sequence[str]
  check: Callable[[ml_collections.ConfigDict], None]
  config: str
  optional: Sequence[str] = ()


def find_kind(
  model: ml_collections.ConfigDict, kinds: Mapping[str, Kind], task: str
) -> Kind:
  """Returns the kind that `model.name` names, after a check of its fields.

  Args:
    model: the job's config.model.
    kinds: the task's kinds by name.
    task: the task's name, for the error.

  Raises:
    UsageError: no such kind, fields of another kind, or values out of range.
  """
  if model.name not in kinds:
    raise UsageError(
      f"config.model.name={model.name!r} is not a model for {task}"
      f"{did_you_mean(model.name, kinds)}"
    )
  kind = kinds[model.name]
  given = [field for field in model if field != "name"]
  differences = {
    "needs": [field for field in kind.fields if field not in given],
    "has no": [
      field for field in given if field not in (*kind.fields, *kind.optional)
    ],
  }
  if any(differences.values()):
    raise UsageError(
      f"config.model.name={model.name!r} "
      + " and ".join(
        f"{verb} {', '.join(fields)}"
        for verb, fields in differences.items()
        if fields
      )
      + f"; type --config={kind.config}"
    )
  kind.check(model)
  return kind


def check_sizes(
  model: ml_collections.ConfigDict, fields: Sequence[str]
) -> None:
  """Raises a UsageError where one of these fields is below 1."""
  for field in fields:
    if model[field] < 1:
      raise UsageError(f"config.model.{field}={model[field]} must be 1 or more")


def check_heads(model: ml_collections.ConfigDict) -> None:
  """Raises a UsageError where num_heads does not divide embed_dim."""
  if model.embed_dim % model.num_heads:
    raise UsageError(
      f"config.model.embed_dim={model.embed_dim} must be a multiple of"
      f" {model.num_heads}, config.model.num_heads"
    )
