"""The plugin in jobs that were not written for it.

A file of tests/recipes is a job as its author wrote it, with optax's own
optimizer; the diff beside it is what the plugin takes.
"""

import functools
import pathlib
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic.placement import Shardings
from tests import network
from tests.compilations import compilations

FOLDER = pathlib.Path(__file__).parent / "recipes"
JOBS = sorted(each.stem for each in FOLDER.glob("*.diff"))
ON_A_MESH = ["bare_optax", "linen_partitioned", "nnx_explicit"]
# What a gradient is enough for, of real parameters.
OPTIMIZERS = [
  name
  for name, row in flax_mechanic.methods().items()
  if not row.needs and name != "split_real_and_imaginary"
]


class Run(NamedTuple):
  """What is seen of a job while it runs.

  Attributes:
    initial: parameters at the start, on the host.
    losses: after each step, or each few.
    compiled: functions compiled for each.
    donated: whether each step gave up the state before it.
    params: parameters at the end, as the job has them.
    opt_state: the optimizer's state at the end, as the job has it.
  """

  initial: Any
  losses: list[float]
  compiled: list[int]
  donated: list[bool]
  params: Any
  opt_state: Any


def patch(text, diff):
  """Returns the text after a unified diff, whose hunks say where they go."""
  hunks = []
  for line in diff.splitlines(keepends=True)[2:]:
    if line.startswith("@@"):
      hunks.append(("", ""))
      continue
    old, new = hunks[-1]
    sign, line = line[0], line[1:]
    hunks[-1] = (old + line * (sign != "+"), new + line * (sign != "-"))
  for old, new in hunks:
    assert text.count(old) == 1, old
    text = text.replace(old, new)
  return text


def load(name, *, patched=True):
  text = (FOLDER / f"{name}.py").read_text()
  if patched:
    text = patch(text, (FOLDER / f"{name}.diff").read_text())
  job = types.ModuleType(name)
  exec(compile(text, f"{name}.py", "exec"), vars(job))
  return job


def run(job, config, workdir):
  states = job.train(config, workdir)
  _, state = next(states)
  initial = plain(parts(state)[0])
  before, count = jax.tree.leaves(state), compilations()
  losses, compiled, donated = [], [], []
  for loss, state in states:
    compiled.append(compilations() - count)
    # What is not read, such as the last learning rate, is not donated.
    donated.append(all(leaf.is_deleted() for leaf in before if leaf.size > 1))
    losses.append(float(loss))
    before, count = jax.tree.leaves(state), compilations()
  return Run(initial, losses, compiled, donated, *parts(state))


def parts(state):
  """Returns the parameters and the optimizer's state, as the job has them."""
  if isinstance(state, nnx.State):
    return nnx.to_pure_dict(state[0]), nnx.to_pure_dict(state[1]["opt_state"])
  if isinstance(state, tuple):
    return state[:2]
  return state.params, state.opt_state


def plain(params):
  """Returns parameters as nested dicts of NumPy's arrays."""
  params = nn.unbox(params)
  if params["head"]["bias"].ndim == 2:
    params = jax_utils.unreplicate(params)
  # A view, as `jax.device_get` returns one, would keep them from donation.
  return jax.device_get(jax.tree.map(jnp.copy, params))


def loss_fn(params, inputs, targets):
  """The jobs' loss, whose batch statistics are those of an eighth."""

  def loss(inputs, targets):
    hidden = inputs @ params["hidden"]["kernel"]
    hidden += params["hidden"].get("bias", 0.0)
    if norm := params.get("norm"):
      hidden = jax.nn.standardize(hidden, axis=0, epsilon=1e-5)
      hidden = hidden * norm["scale"] + norm["bias"]
    outputs = jnp.tanh(hidden) @ params["head"]["kernel"]
    return jnp.mean((outputs + params["head"]["bias"] - targets) ** 2)

  eighths = [x.reshape(8, -1, *x.shape[1:]) for x in (inputs, targets)]
  return jnp.mean(jax.vmap(loss)(*eighths))


def train_by_hand(tx, params, steps):
  """Returns the parameters after a plain loop on one device."""

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(loss_fn)(params, *batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.asarray, params)
  state = tx.init(params)
  for i in steps:
    params, state = step(params, state, network.batch(i))
  return params


assert_close = functools.partial(
  jax.tree.map,
  functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
)


@pytest.mark.parametrize("name", JOBS)
def test_a_diff_is_two_lines_and_one_of_config(name):
  diff = (FOLDER / f"{name}.diff").read_text().splitlines()[2:]
  added = [line[1:].strip() for line in diff if line.startswith("+")]
  config = [
    line
    for line in added
    if "add_optimizer_config" in line or line.startswith("optimizer: str")
  ]
  assert len(config) == 1
  assert len(added) <= 3
  assert all(len(line) <= 81 for line in diff)


@pytest.mark.parametrize("name", JOBS)
def test_until_the_flag_is_flipped_nothing_changes(name, tmp_path):
  job, patched = load(name, patched=False), load(name)
  before = run(job, job.get_config(), tmp_path)
  config = patched.get_config()
  steps = range(config.num_steps)
  after = train_by_hand(patched.make_tx(config), before.initial, steps)
  assert_close(plain(before.params), after)


def flips():
  """Yields every job with mechanic, and two with each other optimizer.

  Those are one of those on a mesh and one of the others, in turns.
  """
  elsewhere = [name for name in JOBS if name not in ON_A_MESH]
  for i, optimizer in enumerate(OPTIMIZERS):
    if optimizer == "mechanic":
      for name in JOBS:
        dear = name in ("nnx_jit", "linen_pmap")
        yield pytest.param(name, optimizer, marks=[pytest.mark.slow] * dear)
      continue
    for names in (ON_A_MESH, elsewhere):
      name = names[i % len(names)]
      yield pytest.param(name, optimizer, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "optimizer"), flips())
def test_the_flag_flipped(name, optimizer, tmp_path):
  job = load(name)
  config = job.get_config()
  config.optimizer = optimizer
  whole = run(job, config, tmp_path)
  if optimizer == "mechanic":
    assert np.mean(whole.losses[-5:]) < 0.8 * whole.losses[0]
  assert all(whole.donated)
  assert whole.compiled[1] == whole.compiled[-1] == 0
  if name in ON_A_MESH:
    wanted = Shardings.of(whole.params).of_state(whole.opt_state)
    lies = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(lies, whole.opt_state, wanted)))

  # The job kept only one checkpoint, of a step on the way.
  resumed = run(job, config, tmp_path)
  assert 0 < len(resumed.losses) < len(whole.losses)
  assert resumed.losses == whole.losses[-len(resumed.losses) :]
  ends = [
    jax.device_get((each.params, each.opt_state)) for each in (resumed, whole)
  ]
  jax.tree.map(np.testing.assert_array_equal, *ends)

  steps = range(config.num_steps)
  by_hand = train_by_hand(job.make_tx(config), whole.initial, steps)
  assert_close(plain(whole.params), by_hand)


@pytest.mark.parametrize(
  ("optimizer", "words"),
  [
    ("momo", r"needs value: call minimize, or update\(\.\.\., value=\.\.\.\)"),
    ("sam", "needs grad_fn: call minimize, or update"),
    ("dpsgd", "needs a gradient for each example: call minimize, or update"),
  ],
)
@pytest.mark.parametrize("name", ["dataclass_config", "nnx_jit"])
def test_what_a_gradient_is_not_enough_for_says_so(
  name, optimizer, words, tmp_path
):
  job = load(name)
  config = job.get_config()
  config.optimizer = optimizer
  with pytest.raises(ValueError, match=f"^this optimizer {words}"):
    run(job, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["mechanic", "adamw", "schedule_free"])
def test_steps_that_a_dynamic_scale_skips(optimizer, tmp_path):
  job = load("linen_pmap")
  config = job.get_config()
  config.optimizer = optimizer
  config.loss_scale = 2.0**127  # Overflows, and is halved, at the start.
  states, taken = job.train(config, tmp_path), []
  initial = plain(next(states)[1].params)
  for step, (_, state) in enumerate(states):
    if state.dynamic_scale.fin_steps[0] > 0:
      taken.append(step)
  assert 0 < len(taken) < config.num_steps
  by_hand = train_by_hand(job.make_tx(config), initial, taken)
  assert_close(plain(state.params), by_hand)


@pytest.mark.slow
def test_shard_map_takes_the_place_of_pmap():
  config = flax_mechanic.add_optimizer_config(ConfigDict(), "mechanic")
  tx = flax_mechanic.make_optimizer(config)
  mesh = jax.make_mesh((8,), ("batch",))
  rows, whole = P("batch"), P()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(whole, whole, rows, rows),
    out_specs=whole,
  )
  def step(params, state, inputs, targets):
    mine = jax.lax.pcast(params, "batch", to="varying")
    grads = jax.grad(network.loss)(mine, inputs, targets)
    grads = jax.lax.pmean(grads, "batch")
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  with jax.set_mesh(mesh):
    params = jax.device_put(network.params(), whole)
    state = jax.device_put(tx.init(params), whole)
    for i in range(10):
      batch = jax.device_put(network.batch(i), rows)
      params, state = step(params, state, *batch)
  by_hand, _, _ = network.train(tx, 10)
  assert_close(params, by_hand)
