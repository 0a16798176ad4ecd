"""Counts what jax compiles."""

import jax

# jit's own count of its cache also counts entries that compile nothing (keys
# among the arguments, jax 0.10).
_COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: _COMPILED.append(event)
)


def compilations():
  """Returns how many functions have been compiled so far."""
  return _COMPILED.count("/jax/core/compile/jaxpr_to_mlir_module_duration")
