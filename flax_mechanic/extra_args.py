"""The extra arguments that a transformation's update takes."""

import inspect
from collections.abc import Mapping
from typing import Any

import optax


def accepted(
  tx: optax.GradientTransformation, extra: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns those extra arguments that `tx.update` takes.

  Example:
    >>> sorted(accepted(optax.contrib.momo(), {"value": 1.0, "grad_fn": None}))
    ['grad_fn', 'value']
    >>> accepted(optax.sgd(0.1), {})
    {}
  """
  parameters = inspect.signature(tx.update).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return dict(extra)
  names = {p.name for p in parameters}
  return {name: value for name, value in extra.items() if name in names}
