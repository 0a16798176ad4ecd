"""`Checkpointer`: what is saved comes back, and what does not fit is named."""

import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from flax_mechanic import (
  Checkpointer,
  Optimizer,
  UsageError,
  add_optimizer_config,
  make_optimizer,
  mechanize,
)
from flax_mechanic.checkpoints import checkpointer as checkpointer_lib
from flax_mechanic.mechanic.sizes import YOUNG, Sizes
from tests import network


class Model(nnx.Module):
  def __init__(self, rngs, width=8):
    self.linear = nnx.Linear(4, width, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.linear(x))


def create(tx=None, width=8):
  model = Model(nnx.Rngs(0), width)
  tx = tx or mechanize(optax.adamw(1.0))
  return {"model": model, "optimizer": Optimizer(model, tx)}


def make_step(graphdef):
  def step(state, x):
    objects = nnx.merge(graphdef, state)
    loss = objects["optimizer"].minimize(
      objects["model"], lambda model, x: jnp.mean((model(x) - 1) ** 2), x
    )
    return nnx.state(objects), loss

  return jax.jit(step, donate_argnums=0)


def abstract(*args, **kwargs):
  return nnx.state(nnx.eval_shape(lambda: create(*args, **kwargs)))


def test_a_restored_run_continues_bit_for_bit(tmp_path):
  graphdef, state = nnx.split(create())
  step = make_step(graphdef)
  x = jnp.ones((2, 4))
  losses = []
  config = ConfigDict({"num_steps": 10, "opt": {"b1": 0.9}})
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.latest() is None
    for i in range(1, 11):
      # Saved while the arrays are donated right after.
      state, loss = step(state, x)
      losses.append(loss)
      if i % 2 == 0:
        checkpointer.save(i, state, config=config, data={"step": i})
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.latest() == 10
    config.num_steps = 20
    restored = checkpointer.restore(abstract(), step=6, config=config)
  assert restored.step == 6
  assert restored.data == {"step": 6}
  assert restored.changed == {"num_steps": (10, 20)}
  state = restored.state
  resumed = []
  for _ in range(4):
    state, loss = step(state, x)
    resumed.append(loss)
  np.testing.assert_array_equal(resumed, losses[6:])


@dataclasses.dataclass
class Options:
  lr: float
  shape: tuple[int, ...] = (2, 3)


@dataclasses.dataclass
class Config:
  num_steps: int
  opt: Any


@pytest.mark.parametrize(
  "make",
  [
    lambda num_steps: Config(num_steps, {"sgd": Options(0.1)}),
    lambda num_steps: ConfigDict(
      {"num_steps": num_steps, "opt": {"sgd": vars(Options(0.1))}}
    ),
    lambda num_steps: types.SimpleNamespace(
      num_steps=num_steps, opt={"sgd": Options(0.1)}
    ),
    lambda num_steps: {"num_steps": num_steps, "opt": {"sgd": Options(0.1)}},
  ],
  ids=["dataclass", "ConfigDict", "namespace", "dict"],
)
def test_a_config_of_any_kind_is_compared(tmp_path, make):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"w": jnp.ones(2)}, config=make(10))
    checkpointer.wait()
    restored = checkpointer.restore({"w": jnp.ones(2)}, config=make(20))
    saved = checkpointer.read(1)["config"]
  assert restored.changed == {"num_steps": (10, 20)}
  assert saved == {
    "num_steps": 10,
    "opt.sgd.lr": 0.1,
    "opt.sgd.shape": [2, 3],
  }


def test_only_the_newest_are_kept(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in (1, 2, 3, 4):
      checkpointer.save(step, {"w": jnp.full(2, step)})
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["3", "4"]
  with Checkpointer(tmp_path) as checkpointer:
    target = {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}
    np.testing.assert_array_equal(checkpointer.restore(target).state["w"], 4)


@pytest.mark.parametrize(
  "options", [{"keep": -1}, {"keep": 0}, {"keep_every": -1}], ids=str
)
def test_what_keeps_less_than_the_newest_step_is_refused(tmp_path, options):
  with pytest.raises(UsageError, match="keep all steps, type keep_every=1"):
    Checkpointer(tmp_path / "run", **options)
  assert not list(tmp_path.iterdir())


def test_home_is_where_other_commands_look_for_it(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with Checkpointer("~/run") as checkpointer:
    assert checkpointer.directory == str(tmp_path / "run")


@pytest.mark.parametrize("name", ["lr=[0.1]", "a\\b", "a**b"])
def test_a_folder_that_is_a_pattern_is_refused(tmp_path, name):
  with pytest.raises(UsageError, match="for a part of a pattern; take a folde"):
    Checkpointer(tmp_path / name / "checkpoints")
  assert not list(tmp_path.iterdir())


def test_etils_takes_a_folder_for_a_pattern(tmp_path):
  folder = tmp_path / "[a]"
  folder.mkdir()
  (folder / "file").touch()
  # Once this fails, and Orbax saves there, `storage.check_name` can go.
  assert not list(epath.Path(folder).glob("*"))


def test_a_step_that_is_not_newer_is_refused(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(2, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="step 2 was not saved"):
      checkpointer.save(2, {"w": jnp.ones(2)})


ONES = {"w": jnp.ones(2)}


@pytest.mark.parametrize(
  ("given", "problem"),
  [
    ({"step": 2_200_000_000}, "step 2200000000 cannot be saved: .* not tokens"),
    ({"step": 1000 / 2}, "step 500.0 cannot be saved"),
    ({"step": -5}, "step -5 cannot be saved"),
    (
      {"metrics": {"a": None}},
      "the metric 'a' .* is None, and no number; leav",
    ),
    ({"metrics": {"a": "0.5"}}, "the metric 'a' .* is '0.5', and no number"),
    (
      {"data": {"seen": {1, 2}}},
      "data cannot be saved: JSON has no more than numbers",
    ),
    ({"state": {"a.b": ONES, "a": {"b": ONES}}}, "calls both a.b.w; rename th"),
    (
      {"state": ONES | {"a": jnp.ones((0, 3))}},
      "a cannot .* no elements; leav",
    ),
    ({"state": ONES | {"a": jnp.ones(4, "uint4")}}, "no dtype uint4; cast it"),
    ({"state": ONES | {"a": 2**70}}, "more than 64 bits; save it in data"),
    ({"state": ONES | {"a": "text"}}, "of the type str, and neither an array"),
    ({"state": {}}, "an empty state cannot be saved; give a dict of arrays"),
    ({"state": np.ones(2)}, "one array cannot be saved; give a dict of arrays"),
  ],
)
def test_what_could_not_be_found_or_read_again_is_refused(
  tmp_path, given, problem
):
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(UsageError, match=problem):
      checkpointer.save(**{"step": 1, "state": ONES} | given)
    assert checkpointer.latest() is None
  assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_jax_are_numbers(tmp_path):
  with Checkpointer(tmp_path, best="a") as checkpointer:
    for step in (np.int64(5), jnp.int32(6)):
      checkpointer.save(
        step,
        ONES,
        metrics={"a": np.float32(0.5), "b": jnp.bfloat16(0.5)},
        data={"seen": [np.int64(5)], "order": np.arange(2)},
      )
    assert checkpointer.steps() == [5, 6]
    record = checkpointer.read(6)
  assert record["metrics"] == {"a": 0.5, "b": 0.5}
  assert record["data"] == {"seen": [5], "order": [0, 1]}


def test_what_does_not_fit_is_named_with_the_option_that_changed(tmp_path):
  # Three of its options change too, of which an error names as many fields.
  opt = lambda value: {"adamw": dict.fromkeys(("b1", "b2", "eps"), value)}
  saved = ConfigDict({"optimizer": "mechanic", "opt": opt(0.9)})
  present = ConfigDict({"optimizer": "sgd", "opt": opt(0.8)})
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, nnx.state(create()), config=saved)
    with pytest.raises(
      UsageError, match=r"config\.optimizer was 'mechanic' and is 'sgd'"
    ):
      checkpointer.restore(abstract(optax.sgd(0.1)), config=present)
    with pytest.raises(
      UsageError, match=r"model/linear/bias has another shape"
    ):
      checkpointer.restore(abstract(width=9), config=saved)
    # Placement and the seed change no shape, and are not what is wrong.
    elsewhere = ConfigDict(
      {
        "optimizer": "mechanic",
        "opt": opt(0.9),
        "seed": 1,
        "mesh": {"data": 2},
        "shard_optimizer_state": True,
      }
    )
    with pytest.raises(
      UsageError, match=r"config is the same, .* --config\.in"
    ):
      checkpointer.restore(abstract(width=9), config=elsewhere)


@pytest.mark.parametrize(
  ("optimizer", "field", "value"),
  [
    ("adam", "optimizer", "yogi"),
    ("mechanic", "opt.mechanic.base", "yogi"),
    ("mechanic", "opt.mechanic.groups", "kernel$"),
    ("mechanic", "opt.mechanic.variant", "pytorch"),
    ("adamw", "accumulate_steps", 4),
  ],
)
def test_arrays_that_mean_something_else_do_not_fit(
  tmp_path, optimizer, field, value
):
  config = add_optimizer_config(ConfigDict(), optimizer)
  config.accumulate_steps = 2
  state = {"mu": jnp.ones(2)}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, config=config)
    # An option that changes no meaning, and one of a method not in use.
    config.update_from_flattened_dict({"guard": False, "opt.sam.base": "lion"})
    checkpointer.restore(state, config=config)
    config.update_from_flattened_dict({field: value})
    sentence = f"means something else): config.{field} was "
    with pytest.raises(UsageError, match=re.escape(sentence)):
      checkpointer.restore(state, config=config)
    checkpointer.restore(state, config=config, part=True)


def test_a_config_without_accumulate_steps_has_one_batch_per_update(tmp_path):
  make = lambda **fields: ConfigDict({"optimizer": "adamw", **fields})
  with Checkpointer(tmp_path) as checkpointer:
    for step, saved in enumerate(({}, {"accumulate_steps": 1})):
      checkpointer.save(step, ONES, config=make(**saved))
      for present in ({}, {"accumulate_steps": 1}, {"accumulate_steps": None}):
        checkpointer.restore(ONES, config=make(**present))


def test_a_step_that_is_not_there_is_named(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"w": jnp.ones(2)})
    checkpointer.wait()
    with pytest.raises(UsageError, match=r"holds no step 3; it holds \[1\]"):
      checkpointer.restore({"w": jnp.ones(2)}, step=3)


def test_a_new_folder_holds_no_checkpoint(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  with pytest.raises(UsageError, match="no checkpoint; name"), checkpointer:
    checkpointer.restore(ONES)


def test_a_reader_saves_nothing(tmp_path):
  reader = Checkpointer(tmp_path, read_only=True)
  with pytest.raises(UsageError, match="with read_only=True; open"), reader:
    reader.save(1, ONES)
  assert not list(tmp_path.iterdir())


def test_arrays_on_several_sets_of_devices(tmp_path):
  devices = jax.devices()
  halves = [
    jax.NamedSharding(jax.make_mesh((4,), ("data",), devices=each), jax.P(axis))
    for each, axis in ((devices[:4], "data"), (devices[4:], None))
  ]
  places = {"a": halves[0], "b": halves[1], "c": devices[7], "d": None}
  state = {
    name: jax.device_put(jnp.arange(8.0), place)
    for name, place in places.items()
  }
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    checkpointer.wait()
    checkpointer.verify(1)
    target = jax.tree.map(jnp.zeros_like, state)
    restored = checkpointer.restore(target).state
  for name, array in state.items():
    np.testing.assert_array_equal(restored[name], array)
    assert restored[name].sharding == target[name].sharding


def test_python_scalars_come_back(tmp_path):
  state = {"step": 3, "w": jnp.ones(2)}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(7, state)
    checkpointer.wait()
    restored = checkpointer.restore({"step": 0, "w": jnp.zeros(2)}).state
  assert restored["step"] == 3
  np.testing.assert_array_equal(restored["w"], 1)


FLOAT = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.mark.parametrize(
  ("saved", "target"),
  [
    (2, jnp.int32(0)),
    (-2, jax.ShapeDtypeStruct((), jnp.int32)),
    (jnp.int32(2), 0),
    (2**40, 0),
    (2**40, np.int64(0)),
    (0.5, FLOAT),
    (jnp.bfloat16(0.5), 0.0),
    (1e300, 0.0),
    (True, jnp.bool_(False)),
    (np.int64(2), jnp.int32(0)),
    (np.arange(3.0), jnp.zeros(3)),
    (np.arange(3) - 2**40, np.zeros(3, np.int64)),
  ],
)
def test_numbers_of_python_numpy_and_jax_are_cast(tmp_path, saved, target):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"n": saved, "w": jnp.ones(2)})
    checkpointer.verify(1)
    restored = checkpointer.restore({"n": target, "w": jnp.ones(2)}).state["n"]
  np.testing.assert_array_equal(restored, saved)
  kinds = jax.Array if isinstance(target, jax.ShapeDtypeStruct) else object
  assert isinstance(restored, kinds)
  assert getattr(restored, "dtype", type(restored)) == getattr(
    target, "dtype", type(target)
  )


@pytest.mark.parametrize(
  ("saved", "target", "problem"),
  [
    (0.5, 0, "n is float64 there and int here"),
    (jnp.ones(3), jnp.zeros(3, int), "n is float32 there and int32 here"),
    (2, True, "n is int64 there and bool here"),
    (2**40, jnp.int32(0), "array n of step 1 .* is too large for int32; rest"),
  ],
)
def test_a_cast_that_loses_something_is_refused(
  tmp_path, saved, target, problem
):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"n": saved})
    with pytest.raises(UsageError, match=problem):
      checkpointer.restore({"n": target})
  assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("is_set", [False, True])
def test_integers_that_a_cast_would_change_are_refused(tmp_path, is_set):
  mesh = jax.make_mesh((8,), ("data",))
  place = lambda array: jax.device_put(
    array, jax.NamedSharding(mesh, jax.P("data"))
  )
  saved = place(jnp.full(8, 300).at[5].set(-1))
  with (
    jax.set_mesh(mesh) if is_set else contextlib.nullcontext(),
    Checkpointer(tmp_path) as checkpointer,
  ):
    checkpointer.save(1, {"n": saved})
    restore = lambda target: checkpointer.restore({"n": target}).state["n"]
    for dtype in ("int8", "uint8", "uint32"):
      for target in (place(jnp.zeros(8, dtype)), np.zeros(8, dtype)):
        with pytest.raises(
          UsageError, match=f"array n of .* large for {dtype}; re"
        ):
          restore(target)
    for target in (place(jnp.zeros(8, "int16")), np.zeros(8, "int16")):
      np.testing.assert_array_equal(restore(target), saved)


def test_what_cannot_be_opened_is_not_locked(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:

    def fail(*unused, **options):
      raise OSError("as a test")

    patch.setattr(checkpointer_lib.ocp, "CheckpointManager", fail)
    with pytest.raises(OSError, match="as a test"):
      Checkpointer(tmp_path)
  Checkpointer(tmp_path).close()


def test_what_does_not_fit_without_a_config_says_how_to_find_out(tmp_path):
  words = (
    r"restore\(\.\.\., config=config\) names the option; set it back, or carry "
    "over what fits with the init_from of Optimizer or TrainState$"
  )
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"n": jnp.ones(2)}, config=ConfigDict({"size": 2}))
    with pytest.raises(UsageError, match=words):
      checkpointer.restore({"n": jnp.ones(3)})


THREEFRY, RBG, UNSAFE = (
  jax.random.key(1, impl=name) for name in ("threefry2x32", "rbg", "unsafe_rbg")
)


@pytest.mark.parametrize(
  ("saved", "target", "problem"),
  [
    (
      THREEFRY,
      RBG,
      "of threefry2x32 and this run's of rbg, which JAX_DEFAULT_P",
    ),
    (
      RBG,
      UNSAFE,
      "of rbg and this run's of unsafe_rbg, which JAX_DEFAULT_PRNG",
    ),
    (jnp.uint32(1), RBG, "n is uint32 there and key<rbg> here"),
    (RBG, jnp.uint32(1), "n is key<rbg> there and uint32 here"),
  ],
)
def test_random_keys_are_of_the_generator_that_was_saved(
  tmp_path, saved, target, problem
):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"n": saved})
    checkpointer.verify(1)
    with pytest.raises(UsageError, match=f"does not fit this run .*{problem}"):
      checkpointer.restore({"n": target})
    restored = checkpointer.restore({"n": jnp.copy(saved)}).state["n"]
  assert restored.dtype == saved.dtype
  assert jnp.all(restored == saved)
  assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_python_numbers_as_they_were_described_once(tmp_path, monkeypatch):
  state = {"n": 3, "f": 0.1, "b": True}
  with Checkpointer(tmp_path) as checkpointer:
    with monkeypatch.context() as patch:
      patch.setattr(checkpointer_lib, "_array", lambda leaf: leaf)
      checkpointer.save(1, state)
    arrays = checkpointer.read(1)["arrays"]
    assert arrays["n"] == {
      "shape": [],
      "dtype": "<class 'int'>",
      "checksum": "00000003" * 2,
    }
    checkpointer.verify(1)
    assert checkpointer.restore({"n": 0, "f": 0.0, "b": False}).state == state
    with pytest.raises(
      UsageError, match="f is <class 'float'> there and int h"
    ):
      checkpointer.restore({"n": 0, "f": 0, "b": False})


def test_a_part_of_what_was_saved(tmp_path):
  ones = jnp.ones(2)
  state = {"params": {"w": ones, "b": jnp.ones(3)}, "mu": ones, "nu": ones}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    checkpointer.wait()
    part = {"params": {"w": jnp.zeros(2)}}
    restored = checkpointer.restore(part, part=True).state
    assert jax.tree.structure(restored) == jax.tree.structure(part)
    np.testing.assert_array_equal(restored["params"]["w"], 1)
    with pytest.raises(
      UsageError, match=r"\(mu .*, nu .*, params/b is not wanted\)"
    ):
      checkpointer.restore(part)
    with pytest.raises(UsageError, match="params/v is not in it"):
      checkpointer.restore({"params": {"v": jnp.zeros(2)}}, part=True)


def test_an_array_without_a_sharding_keeps_the_saved_one(tmp_path):
  mesh = jax.make_mesh((8,), ("data",))
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  w = jax.device_put(jnp.arange(8.0), sharding)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"w": w})
    checkpointer.wait()
    target = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype)}
    restored = checkpointer.restore(target).state["w"]
    assert restored.sharding.is_equivalent_to(sharding, 1)
  # The run that saved it had devices that are not here.
  code = f"""
import jax
from flax_mechanic import Checkpointer
with Checkpointer({str(tmp_path)!r}) as checkpointer:
  target = {{"w": jax.ShapeDtypeStruct((8,), "float32")}}
  print(checkpointer.restore(target).state["w"].sum())
"""
  assert run(code, JAX_NUM_CPU_DEVICES="2") == "28.0\n"


class Old(NamedTuple):
  """A Mechanic state as the development versions of 0.1.0 saved it."""

  base_optimizer_state: Any
  count: Any
  r: Any
  m: Any
  v: Any
  s: Any
  x0: Any
  grad_norm: Any
  scale: Any
  s_init: Any
  skipped: Any


class New(NamedTuple):
  """The same, with its present fields."""

  base_optimizer_state: Any
  count: Any
  r: Any
  m: Any
  v: Any
  s: Any
  x0: Any
  scale: Any
  initial_scale: Any
  sizes: Any


def mechanic(kind, start=0.0):
  """Returns a state of the fields' places in `Old`, from `start` on."""
  values = {
    field: jnp.full(3, start + i) for i, field in enumerate(Old._fields)
  }
  if kind is New:
    values["initial_scale"] = values["s_init"]
    # What is known of gradients' sizes starts without any.
    values["sizes"] = {"peak": jnp.zeros(2), "skipped": values["skipped"]}
  # A base with fields of those names, which are its own.
  names = ("grad_norm", "s_init")
  values["base_optimizer_state"] = dict.fromkeys(names, jnp.ones(1))
  return kind(**{field: values[field] for field in kind._fields})


@pytest.mark.parametrize("form", [tuple, dict], ids=["Linen", "NNX"])
def test_fields_that_were_renamed_since(tmp_path, form):
  as_saved = lambda state: state if form is tuple else state._asdict()
  params = {"norm": {"scale": jnp.ones(2)}}
  wanted = {"params": params, "opt": [as_saved(mechanic(New))]}
  with Checkpointer(tmp_path) as checkpointer:
    old = {"params": params, "opt": [as_saved(mechanic(Old))]}
    checkpointer.save(1, old)
    checkpointer.wait()
    target = {"params": params, "opt": [as_saved(mechanic(New, 100.0))]}
    restored = checkpointer.restore(target).state
    jax.tree.map(np.testing.assert_array_equal, restored, wanted)
    checkpointer.verify(1)
    # Only of Mechanic.
    base = {"initial_scale": jnp.ones(1)}
    target = {
      "params": params,
      "opt": [as_saved(mechanic(New)._replace(base_optimizer_state=base))],
    }
    with pytest.raises(
      UsageError,
      match="state/initial_scale is not in it",
    ):
      checkpointer.restore(target)


@pytest.mark.parametrize("integration", ["Linen", "NNX"])
def test_the_count_of_a_schedule_that_states_had(tmp_path, integration):
  model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
  config = add_optimizer_config(ConfigDict({"learning_rate": 1.0}), "sgd")
  config.guard = False
  schedule = lambda count: 0.5**count
  old = optax.inject_hyperparams(
    lambda learning_rate: optax.sgd(learning_rate, momentum=0.9)
  )(learning_rate=schedule)

  def init(tx):
    if integration == "NNX":
      return nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
    return tx.init(nnx.to_pure_dict(nnx.state(model)))

  saved = jax.tree.map(lambda x: x + 1, init(old))
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, saved)
    target = init(make_optimizer(config, schedule))
    restored = checkpointer.restore(target).state
  before, after = (
    {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    for leaves in map(jax.tree_util.tree_leaves_with_path, (saved, restored))
  )
  (gone,) = before.keys() - after.keys()
  assert "hyperparams_states" in gone
  assert after == {path: before[path] for path in before if path != gone}


def test_a_measured_factor_under_its_former_name(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, [{"scalars": {"learning_rate": jnp.float32(0.25)}}])
    target = [{"scalars": {"factor": jnp.float32(0.0)}}]
    restored = checkpointer.restore(target).state
  assert restored == [{"scalars": {"factor": 0.25}}]


def run(code, **environment):
  """Returns what a new Python prints."""
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=pathlib.Path(__file__).parent.parent,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def test_without_fcntl_runs_save_unlocked(tmp_path):
  # As on Windows.
  code = f"""
import sys
sys.modules["fcntl"] = None
import flax_mechanic
import jax.numpy as jnp
state = {{"w": jnp.ones(2)}}
with flax_mechanic.Checkpointer({str(tmp_path)!r}) as checkpointer:
  checkpointer.save(1, state)
  checkpointer.wait()
  print(checkpointer.restore(state).step)
"""
  assert run(code) == "1\n"


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize(
  "name", ["prodigy", pytest.param("cocob", marks=pytest.mark.slow)]
)
def test_the_guard_is_put_around_a_saved_state_or_off(tmp_path, name, guarded):
  def opt_state(guard, steps):
    config = add_optimizer_config(ConfigDict(), name)
    config.update({"guard": guard, "accumulate_steps": 2})
    return network.train(make_optimizer(config), steps)[1]

  saved, target = opt_state(guarded, 6), opt_state(not guarded, 1)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(6, saved)
    restored = checkpointer.restore(target).state
  leaves = lambda tree, of_sizes: [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if (".sizes" in jax.tree_util.keystr(path)) == of_sizes
  ]
  jax.tree.map(
    np.testing.assert_array_equal, leaves(restored, False), leaves(saved, False)
  )
  # Nothing is known, and there is no start to go back to.
  assert len(leaves(restored, True)) == (0 if guarded else len(Sizes._fields))
  for field, leaf in zip(Sizes._fields, leaves(restored, True), strict=False):
    np.testing.assert_array_equal(leaf, -YOUNG if field == "young" else 0)
