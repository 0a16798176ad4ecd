"""The table that drives the shared tests: what each row needs to learn."""

import functools

import jax
import pytest

from flax_mechanic import methods
from flax_mechanic.methods import stack
from tests import network

# A learning rate of adamw that is good for digits in 200 steps.
ADAMW_RATE = 2e-2
NAMES = list(methods())


def learning_rate(name):
  """Returns the rate of a row with its own base; None if it is learned."""
  rows = stack.resolve(name, {n: row.options for n, row in methods().items()})
  if all(row.tuned for row in rows):
    return ADAMW_RATE * stack.relative_rate(rows)
  return None


def configure(config, name):
  """Flips the flag, and for a tuned method sets its learning rate."""
  config.optimizer = name
  config.learning_rate = learning_rate(name)
  if config.learning_rate is None:
    del config.learning_rate
  return config


def is_plain(name):
  """Whether a row is optax's function and keeps scalars and copies alone."""
  row = methods()[name]
  build = row.build
  if isinstance(build, functools.partial):
    build = build.func
  if not row.tuned or row.needs or not build.__module__.startswith("optax"):
    return False
  params = network.params()
  state = jax.eval_shape(row.build(1.0).init, params)
  shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
  return {leaf.shape for leaf in jax.tree.leaves(state)} <= {(), *shapes}


# Rows of each way to be built and to keep a state: adamw stands for the plain
# ones.
KINDS = [name for name in NAMES if name == "adamw" or not is_plain(name)]
# Of two that share most of their code, the second.
_TWINS = {
  *("mechanize", "dadapt_adamw", "dowg", "momo_adam"),
  "differentially_private_aggregate",
}
DISTINCT = [name for name in KINDS if name not in _TWINS]
# A row of each way in which a job updates and evaluates.
STEPS = [
  *("mechanic", "adamw", "schedule_free"),
  *{
    (row.needs, row.wraps): name
    for name, row in reversed(methods().items())
    if row.needs
  }.values(),
]


def cases(names, quick, *others):
  """Yields a case for each row; those that are not quick are slow.

  Args:
    names: of rows.
    quick: names of the quick ones.
    *others: more arguments of each case.
  """
  for name in names:
    marks = () if name in quick else pytest.mark.slow
    yield pytest.param(name, *others, marks=marks)
