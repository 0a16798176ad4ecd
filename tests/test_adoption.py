"""Another run's checkpoint as the start: ours, or a plain Orbax job's."""

import contextlib
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import checkpoints, train_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from optax import contrib

from flax_mechanic import (
  Checkpointer,
  Optimizer,
  TrainState,
  UsageError,
  add_optimizer_config,
  adopt,
  load_params,
  make_optimizer,
  mechanize,
)
from flax_mechanic.checkpoints import record
from tests.references import assert_same

BASES = {
  "adamw": lambda: optax.adamw(optax.constant_schedule(1e-2)),
  "sgd": lambda: optax.chain(
    optax.clip_by_global_norm(10.0), optax.sgd(1e-2, momentum=0.9)
  ),
  "lion": lambda: optax.lion(1e-3),
}


def close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), a, b)


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


@nnx.jit
def step_nnx(model, optimizer, x, y):
  loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
  optimizer.update(model, nnx.grad(loss_fn)(model))


def train_nnx(model, optimizer, steps):
  for i in range(steps):
    step_nnx(model, optimizer, *network.batch(i))


@jax.jit
def step_linen(state, x, y):
  grads = jax.grad(network.loss)(state.params, x, y)
  return state.apply_gradients(grads=grads)


def train_linen(state, start, steps):
  for i in range(start, start + steps):
    state = step_linen(state, *network.batch(i))
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


@pytest.mark.parametrize(
  ("base", "save"),
  [
    ("adamw", save_standard),
    ("adamw", save_managed),
    ("adamw", save_composite),
    pytest.param("sgd", save_standard, marks=pytest.mark.slow),
    pytest.param("lion", save_standard, marks=pytest.mark.slow),
  ],
)
def test_a_plain_run_under_mechanic(tmp_path, base, save):
  model = Model()
  plain = nnx.Optimizer(model, BASES[base](), wrt=nnx.Param)
  train_nnx(model, plain, 3)
  save(tmp_path / "plain", nnx.state((model, plain)))

  new = Model()
  optimizer = Optimizer(new, mechanize(BASES[base]()))
  (where, note) = optimizer.init_from(new, tmp_path / "plain")
  assert str(tmp_path / "plain") in where
  saved = nnx.state(model, nnx.Not(nnx.RngState))
  assert_same(
    nnx.as_pure(nnx.state(new, nnx.Not(nnx.RngState))), nnx.as_pure(saved)
  )
  state = nnx.as_pure(optimizer.opt_state)
  moments = nnx.as_pure(plain.opt_state)
  untouched = state.base_optimizer_state
  if base == "adamw":
    # The schedule's count starts from 0.
    assert (int(moments[2].count), int(untouched[2].count)) == (3, 0)
    moments, untouched = moments[0], untouched[0]
  assert_same(untouched, moments)
  params = nnx.as_pure(nnx.state(new, nnx.Param))
  assert_same(state.x0, params)
  assert (int(state.count), float(state.scale)) == (0, pytest.approx(6e-6))
  assert note.startswith("taken from its optimizer: ")
  assert "x0" in note.split("restarts: ")[1]
  train_nnx(new, optimizer, 2)


def test_a_linen_run_of_optax_mechanize_goes_on_as_it_would(tmp_path):
  base = optax.adamw(1e-1)
  theirs = train_state.TrainState.create(
    apply_fn=None,
    params=network.params(),
    tx=optax.chain(optax.identity(), contrib.mechanize(base)),
  )
  theirs = train_linen(theirs, 0, 30)
  save_standard(tmp_path / "plain", theirs)
  ours = TrainState.create(
    apply_fn=None,
    params=jax.tree.map(jnp.zeros_like, network.params()),
    tx=mechanize(base, spike_factor=0.0),
  )
  ours, notes = ours.init_from(tmp_path / "plain")
  # What optax does not have is not named.
  taken = "count, m, mu, nu, r, s, scale, v, x0"
  assert notes[1:] == [f"taken from its optimizer: {taken}"]
  assert_same(ours.params, theirs.params)
  assert_same(ours.opt_state.x0, theirs.opt_state[1].x0)
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
    assert_same(getattr(state, field), getattr(theirs, field))
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


def test_other_folders_in_a_workdir_are_ignored(run, tmp_path):
  folder, saved = run
  shutil.copytree(folder, tmp_path / "run")
  save_standard(tmp_path / "run" / "model", network.params())
  step = tmp_path / "run" / "checkpoints" / "20"
  shutil.copytree(step, step.with_name("damaged_30"))
  state = ours({}, steps=0)
  state, (where, note) = state.init_from(tmp_path / "run")
  assert where == f"starting from {step}"
  assert "mu" in note.split("restarts")[0]
  assert_same(state.params, saved.params)


def test_what_is_known_of_gradients_goes_on(run):
  folder, saved = run
  state, (_, note) = ours({}, steps=0).init_from(folder)
  assert "s, scale, sizes, v" in note
  assert_same(state.opt_state.sizes, saved.opt_state.sizes)


FORMER = {"initial_scale": "s_init"}


def with_delta_alone(state, leaf_scales):
  """Returns a run as the development versions of 0.1.0 saved it.

  They could keep Delta in place of x0, kept S beside s, and had another name
  for a field.
  """
  saved = state.opt_state._asdict()
  delta = jax.tree.map(
    lambda x, x0, S: (x - x0) / S, state.params, saved.pop("x0"), leaf_scales
  )
  saved |= {"delta": delta, "scale": jnp.sum(saved["s"], -1)}
  for field, former in FORMER.items():
    if field in saved:
      saved[former] = saved.pop(field)
  return {"params": state.params, "opt_state": saved}


@pytest.mark.parametrize(
  "groups", [pytest.param("", marks=pytest.mark.slow), ".*"]
)
def test_x0_is_recovered_from_delta(tmp_path, groups):
  options = {"groups": groups}
  state = ours(options | {"relative_s_init": 0.01})
  scales = np.broadcast_to(np.sum(state.opt_state.s, -1), 3)
  scales = jax.tree.unflatten(jax.tree.structure(state.params), scales)
  saved = with_delta_alone(state, scales)
  save_standard(tmp_path / "run", saved)
  found, notes = ours(options, steps=1).init_from(tmp_path / "run")
  assert "restarts" not in notes[-1]
  close(found.opt_state.x0, network.params())
  for field in ("count", "r", "m", "v", "s", "mean_norm"):
    assert_same(getattr(found.opt_state, field), saved["opt_state"][field])
  for field, former in FORMER.items():
    if field in found.opt_state._fields:
      assert_same(getattr(found.opt_state, field), saved["opt_state"][former])


@pytest.mark.parametrize("groups", ["", ".*"])
def test_delta_is_recovered_from_x0(tmp_path, groups):
  saved = ours({"groups": groups, "relative_s_init": 0.01})
  save_standard(tmp_path / "run", saved)
  # Low-precision parameters have both.
  half = TrainState.create(
    apply_fn=None,
    params=jax.tree.map(lambda x: x.astype("bfloat16"), network.params()),
    tx=mechanize(BASES["adamw"](), groups=groups),
  )
  found, notes = half.init_from(tmp_path / "run")
  assert "restarts" not in notes[-1]
  scales = np.broadcast_to(np.sum(saved.opt_state.s, -1), 3)
  for S, x, x0, delta in zip(
    scales,
    *map(
      jax.tree.leaves,
      (found.params, saved.opt_state.x0, found.opt_state.delta),
    ),
    strict=True,
  ):
    assert delta.dtype == "float32"
    np.testing.assert_allclose(
      x.astype("float32"), x0 + S * delta, rtol=1e-5, atol=1e-6
    )


def test_the_scale_of_a_group_of_several_leaves_is_not_guessed(tmp_path):
  groups = {"groups": "^hidden"}
  saved = ours(groups)
  scales = jax.tree.map(lambda _: 1.0, saved.params)
  save_standard(tmp_path / "run", with_delta_alone(saved, scales))
  state, (_, note) = ours(groups, steps=0).init_from(tmp_path / "run")
  assert "x0" in note.split("restarts: ")[1]
  assert_same(state.opt_state.x0, state.params)


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
  assert_same(state.opt_state.x0, saved.params)
  assert "scale" in notes[-1].split("restarts: ")[1]
  mu = lambda state: state.opt_state.base_optimizer_state[0].mu
  if moments:
    assert_same(mu(state), mu(saved))
  else:
    assert optax.global_norm(mu(state)) == 0.0


@pytest.mark.parametrize(
  ("field", "value", "restarts"),
  [
    ("opt.mechanic.groups", "kernel", True),
    ("opt.mechanic.base", "yogi", True),
    ("opt.mechanic.variant", "pytorch", True),
    ("opt.mechanic.eps", 1e-9, False),
    ("accumulate_steps", 2, False),
    ("optimizer", "schedule_free", False),
  ],
)
def test_a_tuner_that_learned_something_else_restarts(
  tmp_path, field, value, restarts
):
  # By names and shapes it fits: there are two groups, and yogi has mu and nu.
  config = add_optimizer_config(ConfigDict(), "mechanic")
  config.opt.mechanic.groups = "hidden/"
  config.opt.schedule_free.base = "mechanic"
  create = lambda: TrainState.create(
    apply_fn=None, params=network.params(), tx=make_optimizer(config)
  )
  with Checkpointer(tmp_path) as checkpointer:
    saved = create().opt_state._replace(r=jnp.ones((2, 6)))
    state = {"params": network.params(), "opt_state": saved}
    checkpointer.save(1, state, config=config)
  config.update_from_flattened_dict({field: value})
  _, notes = create().init_from(tmp_path, config=config)
  taken, *rest = notes[1].split("; restarts: ")
  assert "mu, nu" in taken
  assert ("scale" in " ".join(rest)) == restarts


def test_parameters_only(run):
  folder, saved = run
  state = TrainState.create(
    apply_fn=None, params=network.params(), tx=mechanize(BASES["adamw"]())
  )
  state, notes = state.init_from(folder, params_only=True)
  assert len(notes) == 1
  assert_same(state.params, saved.params)
  assert optax.global_norm(state.opt_state.base_optimizer_state[0].mu) == 0.0


def test_the_placement_and_dtype_are_the_target_s(run):
  folder, saved = run
  mesh = jax.make_mesh((8,), ("data",))
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("data")
  )
  kernel = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=sharding)
  loaded = load_params(folder, {"hidden": {"kernel": kernel}})["hidden"]
  assert loaded["kernel"].sharding.is_equivalent_to(sharding, 2)
  assert_same(
    loaded["kernel"], saved.params["hidden"]["kernel"].astype(jnp.bfloat16)
  )


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
  # Nothing tells where the parameters are.
  kernel = {"head": {"kernel": jnp.ones((16, 1))}}
  for params, new in (({}, ()), (kernel, ["head/kernel"])):
    with pytest.raises(UsageError, match="no parameter is asked for"):
      adopt(folder, params, optax.sgd(0.1).init, new=new)


def test_lora_starts_from_a_model_with_or_without_it(tmp_path):
  base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  save_standard(tmp_path / "base", nnx.state(base))
  model = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(1))
  optimizer = Optimizer(model, optax.sgd(0.1))
  notes = optimizer.init_from(model, tmp_path / "base")
  assert "not in it, and new: 2 parameters" in notes
  x = jnp.ones((2, 3))
  assert_same(model(x), base(x))
  assert model.lora.lora_a[...].any()
  model.lora.lora_b[...] += 1.0
  save_standard(tmp_path / "tuned", nnx.state(model))
  again = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(2))
  notes = Optimizer(again, optax.sgd(0.1)).init_from(again, tmp_path / "tuned")
  assert not any("new" in note for note in notes)
  assert_same(again(x), model(x))
  # Nothing else may be missing.
  del base.kernel
  save_standard(tmp_path / "less", nnx.state(base))
  with pytest.raises(UsageError, match="holds no kernel"):
    optimizer.init_from(model, tmp_path / "less")


def test_the_newest_of_steps_of_one_item_each(tmp_path):
  w = {"w": jnp.ones(2)}
  for step in (7, 30):
    tree = {"params": {"w": jnp.full(2, step)}}
    checkpoints.save_checkpoint(tmp_path / "flax", tree, step, keep=2)
    save_standard(tmp_path / "orbax" / f"step_{step}", tree)
  for folder in ("flax", "orbax"):
    assert_same(load_params(tmp_path / folder, w), {"w": jnp.full(2, 30.0)})


def test_items_may_have_numbers(tmp_path):
  w, zero = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
  with ocp.CheckpointManager(tmp_path) as manager:
    items = {"params": w, "ema_99": zero, "opt_1": {"mu": zero}}
    items = {k: ocp.args.StandardSave(item) for k, item in items.items()}
    manager.save(1, args=ocp.args.Composite(**items))
  assert_same(load_params(tmp_path, zero), w)


def test_two_copies_are_one_too_many(tmp_path):
  w = {"w": jnp.ones(2)}
  save_standard(
    tmp_path / "two", {"ema": w, "params": w, "opt_state": [{"mu": w}]}
  )
  assert_same(load_params(tmp_path / "two", w), w)  # By the usual name.
  save_standard(tmp_path / "odd", {"ema": w, "raw": w})
  with pytest.raises(UsageError, match=r"ema/, raw/; .*, {'ema': params}\)"):
    load_params(tmp_path / "odd", w)
  assert_same(load_params(tmp_path / "odd", {"ema": w})["ema"], w)


@pytest.mark.parametrize(
  "tx", [optax.sgd(0.1, momentum=0.9), mechanize(optax.sgd(0.1))]
)
def test_an_optimizer_s_tree_is_not_taken(tmp_path, tx):
  w = {"w": jnp.ones(2)}
  save_standard(tmp_path / "both", {"params": w, "opt_state": tx.init(w)})
  assert_same(load_params(tmp_path / "both", w), w)
  save_standard(tmp_path / "state", tx.init(w))
  with pytest.raises(UsageError, match="no parameters, only an optimizer's"):
    load_params(tmp_path / "state", w)
  # A container may be called like a field of a state.
  save_standard(tmp_path / "gan", {"m": w, "d": {"v": jnp.ones(2)}})
  assert_same(load_params(tmp_path / "gan", w), w)


@pytest.mark.parametrize("boxed", [True, False])
def test_parameters_in_their_variables(tmp_path, boxed):
  # Each array is then in an attribute `value`, beside others that are not.
  model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  params = nnx.state(model)
  tree = params if boxed else nnx.to_pure_dict(params)
  save_standard(tmp_path / "run", {"params": tree, "count": jnp.int32(3)})
  for wanted in (params, nnx.to_pure_dict(params)):
    zeros = jax.tree.map(jnp.zeros_like, wanted)
    loaded = load_params(tmp_path / "run", zeros)
    assert_same(loaded, wanted)
  nnx.update(model, load_params(tmp_path / "run", params))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("inner", [[], ["params"]])
def test_an_average_beside_the_state_is_not_taken(tmp_path, momentum, inner):
  def nested(value):
    tree = {"w": jnp.full(2, value)}
    return dict.fromkeys(inner, tree) or tree

  state = {"params": nested(1.0), "opt_state": [{"count": jnp.int32(0)}]}
  if momentum:
    state["opt_state"] += [{"trace": nested(2.0)}]
  tree = {"state": state, "ema_params": nested(3.0)}
  save_standard(tmp_path / "one", tree)
  with ocp.CheckpointManager(tmp_path / "items") as manager:
    items = {k: ocp.args.StandardSave(item) for k, item in tree.items()}
    manager.save(1, args=ocp.args.Composite(**items))
  w = {"w": jnp.zeros(2)}
  for folder in ("one", "items"):
    if momentum:
      assert_same(load_params(tmp_path / folder, w), {"w": jnp.ones(2)})
      continue
    # Without an optimizer's trees, nothing tells which of them it trained.
    with pytest.raises(UsageError, match=r"under each of ema_params/.*state/"):
      load_params(tmp_path / folder, w)


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


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("spec", [P("x"), P()])
def test_parameters_that_are_not_finite_are_named(tmp_path, value, spec):
  sharding = NamedSharding(Mesh(jax.devices(), "x"), spec)
  params = {
    "hidden": jnp.ones(8, jnp.bfloat16),
    "head": jnp.arange(8.0).at[5].set(value),
    "index": jnp.arange(8),
  }
  save_standard(tmp_path / "run", params)
  wanted = jax.tree.map(
    lambda x: jax.device_put(jnp.zeros_like(x), sharding), params
  )
  sentence = f"array head of {tmp_path}/run is not finite, .* of another step"
  set_mesh = functools.partial(jax.set_mesh, sharding.mesh)
  for context in (contextlib.nullcontext, set_mesh):
    with context(), pytest.raises(UsageError, match=sentence):
      adopt(tmp_path / "run", wanted, optax.sgd(1.0).init)
  assert_same(load_params(tmp_path / "run", wanted), params)


def test_a_step_under_another_name(tmp_path):
  w = {"w": jnp.arange(3.0)}
  with Checkpointer(tmp_path / "run") as checkpointer:
    checkpointer.save(7, w)
  shutil.move(tmp_path / "run" / "7", tmp_path / "run" / "damaged_7")
  with pytest.raises(
    UsageError, match=r"name one of its folders, such as .*_7"
  ):
    load_params(tmp_path / "run", w)
  assert_same(load_params(tmp_path / "run" / "damaged_7", w), w)
  shutil.copytree(tmp_path / "run" / "damaged_7", tmp_path / "run" / "9")
  for folder in ("run", "run/9"):
    with pytest.raises(UsageError, match="9 was saved as step 7; rename the"):
      load_params(tmp_path / folder, w)


def test_a_folder_of_runs_is_refused(tmp_path):
  w = {"w": jnp.arange(3.0)}
  for name in ("sgd", "adamw_1", "adamw_2", "lion"):
    with Checkpointer(tmp_path / name / "checkpoints") as checkpointer:
      checkpointer.save(7, w)
  # A folder beside them, such as what was exported of one.
  save_standard(tmp_path / "model", w)
  sentence = (
    f"{tmp_path} is a folder of runs, adamw_1, adamw_2, lion and 1 more; name "
    f"one of them, such as {tmp_path}/adamw_1, or another folder in it"
  )
  with pytest.raises(UsageError, match=f"^{re.escape(sentence)}$"):
    load_params(tmp_path, w)


def test_the_folder_that_is_taken_is_named(tmp_path):
  models = {"one": {"v": jnp.ones(2)}, "other": {"w": jnp.arange(3.0)}}
  for name, params in models.items():
    save_standard(tmp_path / "models" / name, params)
  with ocp.CheckpointManager(tmp_path / "steps") as manager:
    items = {k: ocp.args.StandardSave(item) for k, item in models.items()}
    manager.save(1, args=ocp.args.Composite(**items))
  for folder, taken in (("models", "models/other"), ("steps", "steps/1")):
    adopted = adopt(tmp_path / folder, models["other"], optax.sgd(1.0).init)
    assert adopted.notes[0] == f"starting from {tmp_path / taken}"


def test_a_text_among_the_arrays(tmp_path):
  w = {"w": jnp.arange(3.0)}
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "plain", {"params": w, "name": "a run"})
  assert_same(load_params(tmp_path / "plain", w), w)
  with pytest.raises(UsageError, match="cannot be read"):
    load_params(tmp_path / "plain", {"name": jnp.zeros(())})
