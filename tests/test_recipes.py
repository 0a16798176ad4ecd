"""The plugin in jobs that were not written for it.

A file of tests/recipes is a job as its author wrote it, with optax's own
optimizer. The first diff beside it, `tx`, makes the optimizer by name. The
second, `full`, goes on from there: the step is one for every method.
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
from flax import nnx
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic.placement import Shardings
from tests import network
from tests.compilations import compilations
from tests.optimizers import STEPS

FOLDER = pathlib.Path(__file__).parent / "recipes"
DIFFS = sorted(each.stem for each in FOLDER.glob("*.diff"))
METHODS = flax_mechanic.methods()
# Those that train tests/network.py, on as many devices as they choose.
REGRESSIONS = ["bare_optax", "dataclass_config"]
ON_A_MESH = ["bare_optax", "gemma", "lm1b"]


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


def load(name, step=None):
  """Returns a job's module after a step, `tx` or `full`, or as it was."""
  text = (FOLDER / f"{name}.py").read_text()
  for diff in {None: [], "tx": ["tx"], "full": ["tx", "full"]}[step]:
    text = patch(text, (FOLDER / f"{name}.{diff}.diff").read_text())
  job = types.ModuleType(name)
  exec(compile(text, f"{name}.py", "exec"), vars(job))
  return job


def configure(job, devices, optimizer=None):
  config = job.get_config()
  if job.__name__ not in REGRESSIONS:
    config.devices = devices
  if optimizer:
    config.optimizer = optimizer
  if optimizer != "mechanic":  # Whose first steps are small.
    config.num_steps, config.checkpoint_every = 10, 5
  return config


def run(job, config, workdir):
  states = job.train(config, workdir)
  _, state = next(states)
  # A view, as `jax.device_get` returns one, would keep them from donation.
  initial = jax.device_get(jax.tree.map(jnp.copy, parts(state)[0]))
  before, count = jax.tree.leaves(state), compilations()
  losses, compiled, donated = [], [], []
  for loss, state in states:
    compiled.append(compilations() - count)
    # What is not read, such as the last learning rate, is not donated; under
    # pmap there is one for each device.
    donated.append(all(leaf.is_deleted() for leaf in before if leaf.size > 8))
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


def assert_equal(*trees):
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  data = lambda x: jax.random.key_data(x) if is_key(x) else x
  trees = jax.device_get(jax.tree.map(data, trees))
  jax.tree.map(np.testing.assert_array_equal, *trees)


def train_by_hand(tx, params, steps):
  """Returns a regression's parameters after a plain loop on one device."""

  def loss_fn(params, inputs, targets):
    hidden, head = params["hidden"], params["head"]
    features = jnp.tanh(inputs @ hidden["kernel"] + hidden["bias"])
    outputs = features @ head["kernel"] + head["bias"]
    return jnp.mean((outputs - targets) ** 2)

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


def changed(diff):
  """Returns a diff's added and removed lines."""
  lines = (FOLDER / f"{diff}.diff").read_text().splitlines()[2:]
  return ([line for line in lines if line.startswith(sign)] for sign in "+-")


@pytest.mark.parametrize("diff", DIFFS)
def test_a_diff_is_a_few_lines(diff):
  added, _ = changed(diff)
  assert all(len(line) <= 81 for line in added)
  if diff.endswith(".full"):
    assert len(added) <= 5
    return
  config = [
    line
    for line in added
    if "add_optimizer_config" in line or line.startswith("+  optimizer: str")
  ]
  assert len(config) == 1
  assert len(added) <= 3


def test_the_page_says_how_many_lines():
  page = (FOLDER.parent.parent / "docs" / "your_job.md").read_text()
  for diff in DIFFS:
    added, removed = changed(diff)
    link = f"[+{len(added)} -{len(removed)}](../tests/recipes/{diff}.diff)"
    assert link in page


# The rest is slow, and what is neither listed nor drawn by `flips` exhaustive.
FAST = {
  "bare_optax.tx": ["mechanic"],
  "mnist.full": ["mechanic"],
}


# Each way to update, and to keep a state: in part, beside those with keys,
# averages and copies of the parameters.
DRAWN = [*STEPS, "muon"]


def devices(diff):
  return (8,) if diff.split(".")[0] in REGRESSIONS else (8, 1)


def unflipped():
  """Yields diff and number of devices; `full` goes on from `tx`."""
  for diff in DIFFS:
    for number in devices(diff):
      last = diff.endswith(".full") and number == 8
      marks = [pytest.mark.slow if last else pytest.mark.exhaustive]
      if diff == "mnist.full" and number == 8:
        marks = []
      if diff.split(".")[0] in REGRESSIONS:
        marks = []
      yield pytest.param(diff, number, marks=marks)


@pytest.mark.parametrize(("diff", "devices"), unflipped())
def test_until_the_flag_is_flipped_nothing_changes(diff, devices, tmp_path):
  runs = []
  for step in (None, diff.split(".")[1]):
    job = load(diff.split(".")[0], step)
    (tmp_path / str(step)).mkdir()
    runs.append(run(job, configure(job, devices), tmp_path / str(step)))
  before, after = runs
  assert after.losses == before.losses
  assert_equal(after.params, before.params)


def takes(diff, row):
  """Returns whether a diff gives a method what it needs."""
  return diff.endswith(".full") or not row.needs


def refuses(diff, row):
  """Returns whether a job's loss takes no batch of one.

  imagenet's has batch statistics, and gemma's says how a batch is split.
  """
  whole = diff in ("imagenet.full", "gemma.full")
  return whole and "per_example" in row.needs


def flips():
  """Yields diff, optimizer and number of devices: every combination.

  Each way to update and each to keep a state is drawn with an NNX or a Linen
  job in turns, and Mechanic with every job. The others are exhaustive.
  """
  shapes = ["mnist", "gemma"], ["vae", "lm1b", "imagenet", "seq2seq"]
  drawn = {(diff, "mechanic", 8) for diff in DIFFS if diff.endswith(".full")}
  for i, optimizer in enumerate(DRAWN):
    names = shapes[i % 2]
    name = names[i // 2 % len(names)]
    step = "full" if METHODS[optimizer].needs or i // 2 % 2 else "tx"
    drawn.add((f"{name}.{step}", optimizer, (8, 1)[i // 4 % 2]))
  for optimizer, row in METHODS.items():
    for diff in DIFFS:
      if not takes(diff, row) or refuses(diff, row):
        continue
      for number in devices(diff):
        mark = pytest.mark.exhaustive
        if (diff, optimizer, number) in drawn:
          mark = pytest.mark.slow
        fast = number == 8 and optimizer in FAST.get(diff, ())
        marks = [] if fast else [mark]
        yield pytest.param(diff, optimizer, number, marks=marks)


@pytest.mark.parametrize(("diff", "optimizer", "devices"), flips())
def test_the_flag_flipped(diff, optimizer, devices, tmp_path):
  name, step = diff.split(".")
  job = load(name, step)
  config = configure(job, devices, optimizer)
  whole = run(job, config, tmp_path)
  assert np.all(np.isfinite(whole.losses))
  if optimizer == "mechanic":
    assert np.mean(whole.losses[-5:]) < 0.8 * whole.losses[0]
  assert all(whole.donated)
  assert whole.compiled[1] == whole.compiled[-1] == 0
  if name in ON_A_MESH and devices == 8:
    wanted = Shardings.of(whole.params).of_state(whole.opt_state)
    lies = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(lies, whole.opt_state, wanted)))

  # The job kept only one checkpoint, of a step on the way.
  resumed = run(job, config, tmp_path)
  assert 0 < len(resumed.losses) < len(whole.losses)
  assert resumed.losses == whole.losses[-len(resumed.losses) :]
  assert_equal(*((each.params, each.opt_state) for each in (resumed, whole)))

  if name in REGRESSIONS:
    steps = range(config.num_steps)
    by_hand = train_by_hand(job.make_tx(config), whole.initial, steps)
    assert_close(whole.params, by_hand)


@pytest.mark.parametrize(
  ("optimizer", "words"),
  [
    ("momo", r"needs value: call minimize, or update\(\.\.\., value=\.\.\.\)"),
    ("sam", "needs grad_fn: call minimize, or update"),
    ("dpsgd", "needs a gradient for each example: call minimize, or update"),
  ],
)
@pytest.mark.parametrize("name", ["dataclass_config", "vae"])
def test_what_a_gradient_is_not_enough_for_says_so(
  name, optimizer, words, tmp_path
):
  job = load(name, "tx")
  config = configure(job, 8, optimizer)
  with pytest.raises(ValueError, match=f"^this optimizer {words}"):
    run(job, config, tmp_path)


def test_batch_statistics_bar_a_gradient_for_each_example(tmp_path):
  job = load("imagenet", "full")
  with pytest.raises(flax_mechanic.UsageError, match="batch statistics"):
    run(job, configure(job, 8, "dpsgd"), tmp_path)


@pytest.mark.slow
def test_gemma_takes_a_gradient_for_each_example_with_other_axes(tmp_path):
  job = load("gemma", "full")
  config = configure(job, 8, "differentially_private_aggregate")
  with pytest.raises(flax_mechanic.UsageError, match="batches of one"):
    run(job, config, tmp_path)
  # As docs/your_job.md says, in the model alone.
  names = vars(job) | {"P": lambda *axes: P(None, *axes[1:])}
  code = job.Transformer.__call__.__code__
  job.Transformer.__call__ = types.FunctionType(code, names)
  (tmp_path / "without").mkdir()
  losses = run(job, config, tmp_path / "without").losses
  assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("step", "optimizer"),
  [("tx", "adamw"), ("tx", "schedule_free"), ("full", "mechanic")],
)
def test_steps_that_a_dynamic_scale_skips(step, optimizer, tmp_path):
  job = load("imagenet", step)
  config = configure(job, 8, optimizer)
  config.loss_scale = 2.0**10
  batch, bad = job.batch, [0, 1, 5]
  job.batch = lambda step, size: jax.tree.map(
    lambda x: x * np.inf if step in bad and x.ndim > 1 else x,
    batch(step, size),
  )
  states, taken = job.train(config, tmp_path), []
  next(states)
  for step, (_, state) in enumerate(states):
    if state.dynamic_scale.fin_steps[0] > 0:
      taken.append(step)
  assert taken == [step for step in range(config.num_steps) if step not in bad]

  job.batch = lambda step, size: batch(taken[step], size)
  (tmp_path / "others").mkdir()
  states = job.train(config, tmp_path / "others")
  for _ in [None, *taken]:
    _, alone = next(states)
  assert_close(state.params, alone.params)


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
