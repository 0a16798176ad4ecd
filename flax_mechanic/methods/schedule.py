"""Learning rate schedules as shapes with peak 1.0, made of optax's."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from flax_mechanic.errors import UsageError, did_you_mean


def _warmup_stable_decay(num_steps: int, warmup: int) -> optax.Schedule:
  half = (warmup + num_steps) // 2
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, 1.0, warmup),
      optax.constant_schedule(1.0),
      optax.linear_schedule(1.0, 0.0, num_steps - half),
    ],
    [warmup, half],
  )


_SCHEDULES: dict[str, Callable[[int, int], optax.Schedule]] = {
  "constant": lambda num_steps, warmup: optax.constant_schedule(1.0),
  "warmup": lambda num_steps, warmup: optax.warmup_constant_schedule(
    0.0 if warmup else 1.0, 1.0, warmup
  ),
  "warmup_cosine": lambda num_steps, warmup: optax.warmup_cosine_decay_schedule(
    0.0, 1.0, warmup, num_steps
  ),
  "warmup_linear": lambda num_steps, warmup: optax.join_schedules(
    [
      optax.linear_schedule(0.0, 1.0, warmup),
      optax.linear_schedule(1.0, 0.0, num_steps - warmup),
    ],
    [warmup],
  ),
  "warmup_stable_decay": _warmup_stable_decay,
  "rsqrt": lambda num_steps, warmup: optax.join_schedules(
    [
      optax.linear_schedule(0.0, 1.0, warmup),
      # It is evaluated, and not used, during the warm-up too.
      lambda count: (1.0 + jnp.maximum(count, 0) / max(1, warmup)) ** -0.5,
    ],
    [warmup],
  ),
}


def make_schedule(
  name: str, num_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
  """Returns a schedule with peak 1.0, for `make_optimizer` to scale.

  Args:
    name: "constant"; "warmup", linear from 0 and constant after;
      "warmup_cosine" and "warmup_linear", which fall to 0 at `num_steps`;
      "warmup_stable_decay", which is constant for half of the rest and then
      falls linearly to 0; or "rsqrt", which falls as
      sqrt(warmup_steps / step).
    num_steps: length of the run, in optimizer updates.
    warmup_steps: length of the linear warm-up from 0, in updates.

  Raises:
    UsageError: the name is unknown, or the warm-up is longer than the run.

  Example:
    >>> float(make_schedule("warmup_linear", 100, 10)(5))
    0.5
  """
  if name not in _SCHEDULES:
    raise UsageError(
      f"config.schedule.name={name!r} is not a schedule"
      + did_you_mean(name, _SCHEDULES)
    )
  if num_steps < 1:
    raise UsageError(
      f"the run has {num_steps} updates; it must have at least 1"
    )
  if name != "constant" and not 0 <= warmup_steps < num_steps:
    raise UsageError(
      f"config.schedule.warmup_steps={warmup_steps} must be at least 0 and "
      f"less than the {num_steps} updates of the run; type "
      f"--config.schedule.warmup_steps={num_steps // 10}"
    )
  return _SCHEDULES[name](num_steps, warmup_steps)
