"""Another run's checkpoint as the start: ours, or a plain Orbax job's."""

import json
import shutil

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from optax import contrib

from flax_mechanic import (
  Checkpointer,
  Optimizer,
  TrainState,
  UsageError,
  load_params,
  mechanize,
)
from flax_mechanic.checkpoints import record

BASES = {
  "adamw": lambda: optax.adamw(optax.constant_schedule(1e-2)),
  "sgd": lambda: optax.chain(
    optax.clip_by_global_norm(10.0), optax.sgd(1e-2, momentum=0.9)
  ),
  "lion": lambda: optax.lion(1e-3),
}


def close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), a, b)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class Model(nnx.Module):
  """The regression network, in NNX."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(8, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(16, 1, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(self.norm(jnp.tanh(self.hidden(x)))))


def train_nnx(model, optimizer, steps):
  loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
  for i in range(steps):
    grads = nnx.grad(loss_fn)(model, *network.batch(i))
    optimizer.update(model, grads)


def train_linen(state, start, steps):
  for i in range(start, start + steps):
    grads = jax.grad(network.loss)(state.params, *network.batch(i))
    state = state.apply_gradients(grads=grads)
  return state


def save_standard(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)


def save_managed(path, tree):
  with ocp.CheckpointManager(path) as manager:
    manager.save(3, args=ocp.args.StandardSave({"old": jnp.ones(1)}))
    manager.save(12, args=ocp.args.StandardSave(tree))


def save_composite(path, tree):
  model, optimizer = nnx.State(tree[0]), nnx.State(tree[1])
  with ocp.CheckpointManager(path) as manager:
    manager.save(
      12,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(model),
        optimizer=ocp.args.StandardSave(optimizer),
      ),
    )


@pytest.mark.parametrize("save", [save_standard, save_managed, save_composite])
@pytest.mark.parametrize("base", BASES)
def test_a_plain_run_under_mechanic(tmp_path, base, save):
  model = Model()
  plain = nnx.Optimizer(model, BASES[base](), wrt=nnx.Param)
  train_nnx(model, plain, 3)
  save(tmp_path / "plain", nnx.state((model, plain)))

  new = Model()
  optimizer = Optimizer(new, mechanize(BASES[base]()))
  (where, told) = optimizer.init_from(new, tmp_path / "plain")
  assert str(tmp_path / "plain") in where
  saved = nnx.state(model, nnx.Not(nnx.RngState))
  same(nnx.as_pure(nnx.state(new, nnx.Not(nnx.RngState))), nnx.as_pure(saved))
  state = nnx.as_pure(optimizer.opt_state)
  moments = nnx.as_pure(plain.opt_state)
  untouched = state.base_optimizer_state
  if base == "adamw":
    # The schedule's count starts from 0.
    assert (int(moments[2].count), int(untouched[2].count)) == (3, 0)
    moments, untouched = moments[0], untouched[0]
  same(untouched, moments)
  params = nnx.as_pure(nnx.state(new, nnx.Param))
  same(state.x0, params)
  assert (int(state.count), float(state.scale)) == (0, pytest.approx(6e-6))
  assert told.startswith("taken from its optimizer: ")
  assert "x0" in told.split("restarts: ")[1]
  train_nnx(new, optimizer, 2)


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize("save", [save_standard, save_managed])
def test_a_linen_run_of_optax_mechanize_goes_on_as_it_would(
  tmp_path, save, store_delta
):
  base = optax.adamw(1e-1)
  theirs = train_state.TrainState.create(
    apply_fn=None,
    params=network.params(),
    tx=optax.chain(optax.identity(), contrib.mechanize(base)),
  )
  theirs = train_linen(theirs, 0, 30)
  save(tmp_path / "plain", theirs)
  ours = TrainState.create(
    apply_fn=None,
    params=jax.tree.map(jnp.zeros_like, network.params()),
    tx=mechanize(base, store_delta=store_delta, spike_factor=0.0),
  )
  ours, notes = ours.init_from(tmp_path / "plain")
  assert "restarts" not in " ".join(notes)
  same(ours.params, theirs.params)
  kept = ours.opt_state.delta if store_delta else ours.opt_state.x0
  assert jax.tree.structure(kept) == jax.tree.structure(ours.params)
  before = network.params()
  moved = lambda a: float(optax.global_norm(optax.tree.sub(a, before)))
  theirs, ours = train_linen(theirs, 30, 20), train_linen(ours, 30, 20)
  assert moved(theirs.params) > 0.1
  close(ours.params, theirs.params, rtol=1e-3, atol=1e-4)


def test_an_nnx_run_of_optax_mechanize(tmp_path):
  model = Model()
  plain = nnx.Optimizer(
    model, contrib.mechanize(optax.adamw(1e-1)), wrt=nnx.Param
  )
  train_nnx(model, plain, 5)
  save_standard(tmp_path / "plain", nnx.state((model, plain)))
  new = Model()
  optimizer = Optimizer(new, mechanize(optax.adamw(1e-1)))
  optimizer.init_from(new, tmp_path / "plain")
  state, theirs = (nnx.as_pure(each.opt_state) for each in (optimizer, plain))
  for field in ("base_optimizer_state", "count", "r", "m", "v", "s", "x0"):
    same(getattr(state, field), getattr(theirs, field))
  assert float(state.scale) == pytest.approx(float(jnp.sum(theirs.s)))


def ours(tx, steps=20):
  state = TrainState.create(
    apply_fn=None, params=network.params(), tx=mechanize(BASES["adamw"](), **tx)
  )
  return train_linen(state, 0, steps)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A --workdir of ours, and the state whose checkpoint it holds."""
  folder, state = tmp_path_factory.mktemp("run"), ours({})
  with Checkpointer(folder / "checkpoints") as checkpointer:
    checkpointer.save(20, {"params": state.params, "opt": state.opt_state})
  return folder, state


def test_what_else_lies_in_a_workdir_is_left_alone(run, tmp_path):
  folder, saved = run
  shutil.copytree(folder, tmp_path / "run")
  save_standard(tmp_path / "run" / "model", network.params())
  step = tmp_path / "run" / "checkpoints" / "20"
  shutil.copytree(step, step.with_name("damaged_30"))
  state = ours({}, steps=0)
  state, (where, told) = state.init_from(tmp_path / "run")
  assert where == f"starting from {step}"
  assert "mu" in told.split("restarts")[0]
  same(state.params, saved.params)


@pytest.mark.parametrize("options", [{}, {"groups": ".*"}], ids=str)
def test_delta_becomes_x0_and_the_reverse(tmp_path, options):
  delta = {"store_delta": True}
  saved = {}
  for name, more in (("delta", delta), ("x0", {})):
    saved[name] = ours(options | more | {"relative_s_init": 0.01})
    save_standard(tmp_path / name, saved[name])
  x0, _ = ours(options, steps=1).init_from(tmp_path / "delta")
  close(x0.opt_state.x0, network.params())
  same(x0.opt_state.scale, saved["delta"].opt_state.scale)
  found, _ = ours(options | delta, steps=1).init_from(tmp_path / "x0")
  scales = np.broadcast_to(found.opt_state.scale, 3)
  for S, *leaves in zip(
    scales,
    *map(
      jax.tree.leaves,
      (found.params, saved["x0"].opt_state.x0, found.opt_state.delta),
    ),
    strict=True,
  ):
    x, x0, delta = leaves
    np.testing.assert_allclose(x, x0 + S * delta, rtol=1e-5, atol=1e-6)


def test_the_scale_of_a_group_of_several_leaves_is_not_guessed(tmp_path):
  groups = {"groups": "^hidden"}
  save_standard(tmp_path / "run", ours(groups | {"store_delta": True}))
  state, (_, told) = ours(groups, steps=0).init_from(tmp_path / "run")
  assert "x0" in told.split("restarts: ")[1]
  same(state.opt_state.x0, state.params)


@pytest.mark.parametrize(
  ("tx", "moments"),
  [
    (mechanize(BASES["adamw"](), num_betas=4), True),
    (mechanize(BASES["lion"]()), False),
  ],
)
def test_a_tuner_that_does_not_fit_restarts(run, tx, moments):
  folder, saved = run
  state = TrainState.create(apply_fn=None, params=network.params(), tx=tx)
  state, notes = state.init_from(folder)
  assert int(state.opt_state.count) == 0
  same(state.opt_state.x0, saved.params)
  assert "scale" in notes[-1].split("restarts: ")[1]
  mu = lambda state: state.opt_state.base_optimizer_state[0].mu
  if moments:
    same(mu(state), mu(saved))
  else:
    assert optax.global_norm(mu(state)) == 0.0


def test_parameters_only(run):
  folder, saved = run
  state = TrainState.create(
    apply_fn=None, params=network.params(), tx=mechanize(BASES["adamw"]())
  )
  state, notes = state.init_from(folder, params_only=True)
  assert len(notes) == 1
  same(state.params, saved.params)
  assert optax.global_norm(state.opt_state.base_optimizer_state[0].mu) == 0.0


def test_a_placement_and_a_dtype_of_one_s_own(run):
  folder, saved = run
  mesh = jax.make_mesh((8,), ("data",))
  lies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  kernel = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=lies)
  loaded = load_params(folder, {"hidden": {"kernel": kernel}})["hidden"]
  assert loaded["kernel"].sharding.is_equivalent_to(lies, 2)
  same(loaded["kernel"], saved.params["hidden"]["kernel"].astype(jnp.bfloat16))


def test_what_is_not_there_is_said(run, tmp_path):
  folder, _ = run
  wrong = {
    "nothing": (tmp_path / "no", {"head": jnp.ones(1)}, "is not a directory"),
    "empty": (tmp_path, {"head": jnp.ones(1)}, "holds no checkpoint"),
    "shape": (folder, {"head": jnp.ones(1)}, r"head has shape \(16, 1\) there"),
    "leaf": (folder, {"tail": jnp.ones(1)}, "holds no tail; train the model"),
  }
  for directory, params, sentence in wrong.values():
    with pytest.raises(UsageError, match=sentence):
      load_params(directory, params)


def test_two_copies_are_one_too_many(tmp_path):
  w = {"w": jnp.ones(2)}
  save_standard(
    tmp_path / "two", {"ema": w, "params": w, "opt_state": [{"mu": w}]}
  )
  same(load_params(tmp_path / "two", w), w)  # By the usual name.
  save_standard(tmp_path / "odd", {"ema": w, "raw": w})
  with pytest.raises(UsageError, match="under each of ema/, raw/"):
    load_params(tmp_path / "odd", w)


def test_a_damaged_array_is_named(run, tmp_path):
  folder, saved = run
  folder = shutil.copytree(folder, tmp_path / "run")
  path = folder / "checkpoints" / "20" / "record" / "metadata"
  contents = record.unseal(json.loads(path.read_text()))
  contents["arrays"]["params/head"]["checksum"] = "0" * 16
  path.write_text(json.dumps(record.seal(contents)))
  sentence = r"array params/head of .*/20 is damaged; name the folder of"
  with pytest.raises(UsageError, match=sentence):
    load_params(folder, saved.params)
  path.write_text(path.read_text()[1:])
  with pytest.raises(UsageError, match=r"/20 cannot be read .*; name the"):
    load_params(folder, saved.params)
