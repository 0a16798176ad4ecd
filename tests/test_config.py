"""The flag: its config fields, what they build, and what typos say."""

import dataclasses
from typing import Any

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict, config_flags

import flax_mechanic
from flax_mechanic.errors import UsageError
from tests import network, optimizers


def make_config(**fields):
  config = ConfigDict({"learning_rate": 0.01})
  flax_mechanic.add_optimizer_config(config)
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in fields.items()}
  )
  return config


def test_every_option_is_the_method_s_own_default():
  config = make_config()
  assert config.optimizer == "adamw"
  assert config.opt.adamw.b2 == 0.999
  assert config.opt.adamw.mu_dtype is None
  assert config.opt.mechanic.to_dict() == {
    "base": "adamw",
    "learning_rate": 1.0,
    "weight_decay": 1e-4,
    "eps": 1e-20,
    "s_init": 1e-6,
    "num_betas": 6,
    "variant": "optax",
    "betas": None,
    "spike_factor": 4.0,
    "x0_dtype": None,
    "relative_s_init": 0.01,
    "groups": ".*",
    "mean_decay": True,
    "follow_schedule": True,
  }
  config.opt.adamw.mu_dtype = "bfloat16"
  state = flax_mechanic.make_optimizer(config).init(network.params())
  mu = optax.tree.get(state, "mu")
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(mu))


def test_an_option_of_the_wrong_type_or_name_is_refused():
  config = make_config()
  with pytest.raises(TypeError):
    config.opt.mechanic.num_betas = "six"
  config = make_config(optimizer="mechanic")
  config.opt.mechanic.s_int = 1.0
  with pytest.raises(UsageError, match=r"s_int is not .* mean 's_init'"):
    flax_mechanic.make_optimizer(config)


@pytest.mark.parametrize(
  ("name", "reference"),
  [
    ("adamw", lambda lr: optax.adamw(lr)),
    ("sgd", lambda lr: optax.sgd(lr, momentum=0.9)),
    ("lion", lambda lr: optax.lion(lr)),
  ],
)
def test_tuned_methods_are_optax_s(name, reference):
  shape = optax.linear_schedule(1.0, 0.0, 30)
  config = make_config(optimizer=name)
  ours = network.train(flax_mechanic.make_optimizer(config, shape), 30)
  theirs = network.train(reference(lambda count: 0.01 * shape(count)), 30)
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)


def test_options_reach_the_method():
  config = make_config(optimizer="sgd", opt__sgd__momentum=0.5)
  ours = network.train(flax_mechanic.make_optimizer(config), 10)
  theirs = network.train(optax.sgd(0.01, momentum=0.5), 10)
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)


@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
def test_mechanize_wraps_its_base_and_reads_no_learning_rate(base):
  shape = optax.linear_schedule(1.0, 0.0, 30)
  config = make_config(
    optimizer="mechanize",
    opt__mechanize__base=base,
    learning_rate=100.0,
  )
  ours = network.train(flax_mechanic.make_optimizer(config, shape), 30)
  by_hand = {
    "adamw": optax.adamw(shape),
    "sgd": optax.sgd(shape, momentum=0.9),
    "lion": optax.lion(shape),
  }[base]
  theirs = network.train(optax.contrib.mechanize(by_hand), 30)
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4)
  del config.learning_rate
  flax_mechanic.make_optimizer(config, shape)


def test_gradient_clipping_and_accumulation():
  config = make_config(optimizer="sgd", grad_clip=0.1, accumulate_steps=2)
  tx = flax_mechanic.make_optimizer(config)
  x = network.params()
  state = tx.init(x)
  update = jax.jit(tx.update)
  ones = jax.tree.map(jnp.ones_like, x)
  updates, state = update(ones, state, x)
  assert optax.tree.norm(updates) == 0
  updates, state = update(jax.tree.map(lambda g: 3 * g, ones), state, x)
  np.testing.assert_allclose(optax.tree.norm(updates), 0.1 * 0.01, rtol=1e-5)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"optimizer": "mechanik"}, "did you mean 'mechanic'"),
    (
      {"optimizer": "mechanic", "opt__mechanic__base": "adamww"},
      "config.opt.mechanic.base='adamww' .*did you mean 'adamw'",
    ),
    (
      {"optimizer": "mechanic", "opt__mechanic__base": "mechanic"},
      "wraps itself",
    ),
    ({"learning_rate": float("nan")}, r"config\.learning_rate=nan must be"),
    ({"learning_rate": -1.0}, "learning rate .* is -1.0"),
    ({"grad_clip": -1.0}, "config.grad_clip=-1.0"),
    ({"accumulate_steps": 0}, "config.accumulate_steps=0"),
    ({"opt__adamw__mu_dtype": "bf17"}, "mu_dtype='bf17' is not one of 'bf"),
    ({"opt__sgd__accumulator_dtype": "int8"}, "_dtype='int8' is not one of"),
    (
      {"opt__schedule_free__state_dtype": "int8"},
      "config.opt.schedule_free.state_dtype='int8' is not one of 'bfloat16'",
    ),
    (
      {"opt__muon__preconditioning": "none"},
      "preconditioning='none' is not one of 'frobenius', 'spectral'",
    ),
    (
      {"opt__polyak_sgd__variant": "sps-"},
      r"config.opt.polyak_sgd.variant='sps-' is not one of 'sps', 'sps\+'",
    ),
    (
      {"opt__dog__init_step_kind": "foo"},
      "init_step_kind='foo' is not one of 'heuristic'",
    ),
    (
      {"optimizer": "dadapt_adamw", "opt__dadapt_adamw__betas": (0.9,)},
      r"config.opt.dadapt_adamw: betas=\(0.9,\) must be two numbers",
    ),
    (
      {"optimizer": "mechanic", "opt__mechanic__variant": "torch"},
      "config.opt.mechanic: variant='torch' is not one of 'optax'",
    ),
  ],
)
def test_bad_values_are_one_sentence(fields, words):
  with pytest.raises(UsageError, match=words) as error:
    flax_mechanic.make_optimizer(make_config(**fields))
  assert "\n" not in str(error.value)


def test_a_tuned_method_asks_for_the_learning_rate():
  config = flax_mechanic.add_optimizer_config(ConfigDict())
  with pytest.raises(UsageError, match=r"needs config\.learning_rate"):
    flax_mechanic.make_optimizer(config)


def test_a_job_s_own_fields_stay_and_its_optimizer_is_the_default():
  given = {"optimizer": "sgd", "learning_rate": 0.1, "model": {"width": 4}}
  config = flax_mechanic.add_optimizer_config(ConfigDict(given))
  assert {name: config.to_dict()[name] for name in given} == given
  assert "momentum" in config.opt.sgd
  config = flax_mechanic.add_optimizer_config(ConfigDict(given), "lion")
  assert config.optimizer == "lion"


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"optimizer": "lionn"}, "config.optimizer='lionn' is not .*'lion'"),
    (
      {"optimizer": {"name": "adamw"}},
      r"config\.optimizer is there already, a ConfigDict, .*; rename it",
    ),
    (
      {"opt": {"lr": 0.1}},
      r"config\.opt is there already; rename it .*_config$",
    ),
    (
      {"grad_clip": 1.0},
      r"config\.grad_clip is there already; rename .* old_flags=\[\"grad_clip",
    ),
  ],
)
def test_fields_that_clash_are_named(fields, words):
  with pytest.raises(UsageError, match=words) as error:
    flax_mechanic.add_optimizer_config(ConfigDict(fields))
  assert "\n" not in str(error.value)


def test_old_flags_go_on_acting():
  config = ConfigDict({"lr": 0.01, "weight_decay": 0.1, "grad_clip": 1.0})
  flax_mechanic.add_optimizer_config(
    config,
    old_flags={
      "lr": "learning_rate",
      "weight_decay": "weight_decay",
      "grad_clip": "grad_clip",
    },
  )
  # Mechanic's is another thing, and prodigy is not tuned.
  assert config.opt.mechanic.weight_decay == 1e-4
  assert config.opt.prodigy.weight_decay == 0.0
  config.lock()
  parser = absl.flags.FlagValues()
  arguments = ["", "--config.weight_decay=0.2", "--config.lr=0.02"]
  arguments.append("--config.opt.lamb.weight_decay=0.3")
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=parser, sys_argv=arguments
  )
  parser(arguments)
  assert config.opt.adamw.weight_decay == config.opt.lion.weight_decay == 0.2
  assert config.opt.lamb.weight_decay == 0.3
  ours = network.train(flax_mechanic.make_optimizer(config), 10)
  theirs = network.train(
    optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(0.02, weight_decay=0.2)
    ),
    10,
  )
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)


def test_old_flags_are_not_a_wrapper_s_options():
  config = ConfigDict({"b1": 0.8})
  flax_mechanic.add_optimizer_config(config, old_flags=["b1"])
  assert config.opt.adamw.b1 == config.opt.lion.b1 == 0.8
  assert config.opt.schedule_free.b1 == 0.9


@pytest.mark.parametrize(
  ("old_flags", "words"),
  [
    (["weight_decai"], "'weight_decai', which config does not have; .*_decay'"),
    ({"lr": "grad_clip"}, "'lr', which config does not have"),
    (["warmup_steps"], "'warmup_steps', which no .*; leave it out, or put it"),
  ],
)
def test_old_flags_that_mean_nothing_are_named(old_flags, words):
  config = ConfigDict({"weight_decay": 0, "warmup_steps": 9, "grad_clip": 1.0})
  with pytest.raises(UsageError, match=words) as error:
    flax_mechanic.add_optimizer_config(config, old_flags=old_flags)
  assert "\n" not in str(error.value)


def with_own(own):
  """Configs of three kinds, of jobs whose own optimizer is `own`."""
  by_field = ConfigDict({"optimizer": own, "learning_rate": 0.01})
  by_name = ConfigDict({"learning_rate": 0.01})
  job = dataclasses.make_dataclass(
    "Job", [("optimizer", str, own), ("learning_rate", float, 0.01)]
  )
  return [
    flax_mechanic.add_optimizer_config(by_field),
    flax_mechanic.add_optimizer_config(by_name, own),
    job(),
  ]


@pytest.mark.parametrize(
  ("own", "wrapper", "base"),
  [
    ("sgd", "schedule_free", "sgd"),
    ("lion", "schedule_free", "lion"),
    ("lion", "sam", "lion"),
    ("lars", "schedule_free", "adamw"),  # Refused there.
    ("prodigy", "schedule_free", "adamw"),  # Learns its rate.
    ("schedule_free", "sam", "sgd"),  # Has a base itself.
    ("dpsgd", "split_real_and_imaginary", "adamw"),
    ("sgd", "mechanic", "adamw"),  # Reads no rate.
  ],
)
def test_a_wrapper_s_base_is_the_job_s_own_optimizer(own, wrapper, base):
  reference = make_config(optimizer=wrapper, **{f"opt__{wrapper}__base": base})
  expected = flax_mechanic.make_optimizer(reference).init(network.params())
  for config in with_own(own):
    config.optimizer = wrapper
    state = flax_mechanic.make_optimizer(config).init(network.params())
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    if isinstance(config, ConfigDict):
      assert config.opt[wrapper].base == base


@dataclasses.dataclass(slots=True)
class Config:
  optimizer: str = "adamw"
  learning_rate: float = 0.01
  opt: Any = None
  grad_clip: float | None = None
  freeze: Any = ()


@dataclasses.dataclass(slots=True)
class Lion:
  b1: float = 0.8


@dataclasses.dataclass(slots=True)
class Opt:
  lion: Lion
  mechanic: dict


@pytest.mark.parametrize(
  "opt",
  [
    {"mechanic": {"base": "lion"}, "lion": {"b1": 0.8}},
    {"mechanic": {"base": "lion"}, "lion": Lion()},
    Opt(Lion(), {"base": "lion"}),
  ],
)
def test_a_dataclass_is_a_config_too(opt):
  ours = flax_mechanic.make_optimizer(Config("mechanic", opt=opt))
  config = make_config(
    optimizer="mechanic", opt__mechanic__base="lion", opt__lion__b1=0.8
  )
  theirs = flax_mechanic.make_optimizer(config)
  np.testing.assert_array_equal(
    network.train(ours, 3)[2], network.train(theirs, 3)[2]
  )


@pytest.mark.parametrize(
  ("name", "option", "default"),
  [
    ("adamw", "b1", 0.9),
    ("mechanic", "weight_decay", 1e-4),
    ("mechanic", "learning_rate", 1.0),
    ("mechanic", "base", "adamw"),
    ("mechanic", "betas", None),
  ],
)
def test_an_option_that_is_none_has_its_default(name, option, default):
  trained = lambda value: network.train(
    flax_mechanic.make_optimizer(Config(name, opt={name: {option: value}})), 3
  )
  np.testing.assert_array_equal(trained(None)[2], trained(default)[2])


def test_sgd_without_momentum_says_none():
  tx = flax_mechanic.make_optimizer(
    Config("sgd", opt={"sgd": {"momentum": None}})
  )
  assert not optax.tree.get_all_with_path(tx.init(network.params()), "trace")


ALONE = dataclasses.make_dataclass("Alone", [("optimizer", str)], slots=True)


@pytest.mark.parametrize("kind", [ALONE, dict])
def test_a_config_of_another_kind_needs_but_the_optimizer(kind):
  configs = kind(optimizer="mechanic"), make_config(optimizer="mechanic")
  ours, theirs = map(flax_mechanic.make_optimizer, configs)
  np.testing.assert_array_equal(
    network.train(ours, 3)[2], network.train(theirs, 3)[2]
  )
  assert flax_mechanic.own_schedule(kind(optimizer="dog")) == "constant"


@dataclasses.dataclass
class Job:
  optimizer: str = "adamw"
  lr: float = 0.02
  wd: float = 0.2
  clip: float = 1.0
  b1: float = 0.8
  opt: Any = dataclasses.field(
    default_factory=lambda: flax_mechanic.add_optimizer_config(ConfigDict()).opt
  )


@pytest.mark.parametrize(
  ("opt", "b1"),
  [
    (None, 0.8),
    ({}, 0.8),
    ("all", 0.8),
    ({"adamw": {"b1": 0.7}}, 0.7),  # What is set there comes first.
  ],
)
def test_old_flags_of_a_dataclass_go_on_acting(opt, b1):
  config = Job() if opt == "all" else Job(opt=opt)
  make = lambda: flax_mechanic.make_optimizer(
    config,
    old_flags={
      "lr": "learning_rate",
      "wd": "weight_decay",
      "clip": "grad_clip",
      "b1": "b1",
    },
  )
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(0.02, b1, weight_decay=0.2)
  )
  ours, expected = (network.train(tx, 10)[2] for tx in (make(), theirs))
  np.testing.assert_allclose(ours, expected, rtol=1e-5)

  # Mechanic's is another thing.
  config.optimizer = "mechanic"
  reference = make_config(
    optimizer="mechanic",
    grad_clip=1.0,
    opt__adamw__weight_decay=0.2,
    opt__adamw__b1=b1,
  )
  both = make(), flax_mechanic.make_optimizer(reference)
  ours, expected = (network.train(tx, 5)[2] for tx in both)
  np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
  ("old_flags", "words"),
  [
    (["wdd"], "'wdd', which config does not have; did you mean 'wd'"),
    (["lr"], "'lr', which no optimizer tuned by hand has"),
    ({"wd": "grad_clipp"}, "'grad_clipp', which no optimizer tuned"),
  ],
)
def test_old_flags_of_a_dataclass_that_mean_nothing_are_named(old_flags, words):
  with pytest.raises(UsageError, match=words):
    flax_mechanic.make_optimizer(Job(), old_flags=old_flags)


def test_a_dataclass_s_options_are_flags():
  parser = absl.flags.FlagValues()
  arguments = ["", "--config.opt.mechanic.base=lion", "--config.opt.lion.b1=.7"]
  config_flags.DEFINE_config_dataclass(
    "config", Job("mechanic"), flag_values=parser, sys_argv=arguments
  )
  parser(arguments)
  ours = flax_mechanic.make_optimizer(parser.config)
  theirs = flax_mechanic.make_optimizer(
    make_config(
      optimizer="mechanic", opt__mechanic__base="lion", opt__lion__b1=0.7
    )
  )
  np.testing.assert_array_equal(
    network.train(ours, 3)[2], network.train(theirs, 3)[2]
  )


@pytest.mark.parametrize(
  ("config", "words"),
  [
    (Config("mechanik"), "'mechanik' is not .* mean 'mechanic'"),
    (Config(opt={"adamww": {}}), r"config\.opt\.adamww is not .* mean 'adamw'"),
    (
      Config(opt={"adamw": {"wait_decay": 1.0}}),
      r"config\.opt\.adamw\.wait_decay is not .* mean 'weight_decay'",
    ),
    (Config(opt={"adamw": 1.0}), r"config\.opt\.adamw=1\.0 must be a group"),
    (
      Config("sam", opt={"sam": {"base": ""}}),
      r"config\.opt\.sam\.base='' is not an optimizer; it is one of",
    ),
    (Config(opt="adamw"), r"config\.opt='adamw' must be a group"),
    (
      Config(opt={"adamw": {"b1": "0.9"}}),
      r"config\.opt\.adamw\.b1='0\.9' is of type str; .* of type float",
    ),
    (Config(freeze="bias"), r"config\.freeze='bias' is .*; .* of type tuple"),
    (Config(learning_rate="1"), r"config\.learning_rate='1' is of type str"),
    (Config(learning_rate=None), r"needs config\.learning_rate"),
    (Config(grad_clip=-1.0), r"config\.grad_clip=-1\.0 must be"),
    (
      Config(opt={"adamw": {"b1": float("nan")}}),
      r"config\.opt\.adamw\.b1=nan must be a finite number",
    ),
    (
      Config(opt={"mechanic": {"s_init": float("inf")}}),
      r"config\.opt\.mechanic\.s_init=inf must be a finite number",
    ),
    (object(), r"config\.optimizer is missing; call add_optimizer_config"),
  ],
)
def test_bad_dataclasses_are_one_sentence(config, words):
  with pytest.raises(UsageError, match=words) as error:
    flax_mechanic.make_optimizer(config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("arguments", "options", "words"),
  [
    (
      (1e-3,),
      {},
      "schedule=0.001 must be a function of the update count, such",
    ),
    ((), {"peak": "0.1"}, "peak='0.1' must be the largest value of the sched"),
    ((), {"peak": np.ones(2)}, "peak=array.* must be the largest value"),
  ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments, options, words):
  config = make_config(optimizer="mechanic")
  with pytest.raises(UsageError, match=words) as error:
    flax_mechanic.make_optimizer(config, *arguments, **options)
  assert "\n" not in str(error.value)


def test_fields_are_added_to_a_config_dict_alone():
  words = r"an ml_collections\.ConfigDict, not a dict; .* ConfigDict\(config\)"
  with pytest.raises(UsageError, match=words):
    flax_mechanic.add_optimizer_config({"learning_rate": 0.1})


@pytest.mark.parametrize(
  ("name", "peak"),
  [
    *(("sgd", peak) for peak in (0.01, 0.16, 1.0, 0.1 * 32 / 256)),
    ("adamw", 0.16),
  ],
)
def test_an_unflipped_run_is_the_untouched_one_whatever_the_peak(name, peak):
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 3, 10)
  theirs = lambda count: peak * shape(count)
  tx = {"sgd": optax.sgd(theirs, momentum=0.9), "adamw": optax.adamw(theirs)}
  config = make_config(optimizer=name)
  ours = flax_mechanic.make_optimizer(config, theirs, peak=peak)
  for mine, other in zip(
    *(network.train(each, 10)[::2] for each in (ours, tx[name])), strict=True
  ):
    jax.tree.map(np.testing.assert_array_equal, mine, other)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
  "schedule",
  [
    optax.warmup_cosine_decay_schedule(0.0, 3e-3, 2, 5),
    lambda count: 3e-3 / jnp.sqrt(1.0 + count),
    None,
  ],
)
def test_an_unflipped_run_is_the_untouched_one_in_every_dtype(dtype, schedule):
  with jax.enable_x64(dtype == "float64"):
    for name in ("adamw", "lars"):
      theirs = getattr(optax, name)(schedule or 3e-3)
      config = make_config(optimizer=name, learning_rate=3e-3)
      ours = flax_mechanic.make_optimizer(config, schedule, peak=3e-3)
      ends = [network.train(tx, 4, dtype)[0] for tx in (ours, theirs)]
      jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_rate_that_is_set_is_used_in_every_dtype(x64):
  tx = flax_mechanic.make_optimizer(
    make_config(optimizer="sgd", learning_rate=3e-3, guard=False)
  )
  x = {"w": jnp.ones(2)}
  state = optax.tree.set(tx.init(x), learning_rate=0.25)
  updates, state = tx.update(x, state, x)
  np.testing.assert_array_equal(updates["w"], -0.25 * x["w"])
  rate = optax.tree.get(state, "learning_rate")
  assert (rate, rate.dtype) == (0.25, jnp.float32)


@pytest.mark.parametrize(
  ("name", "rate"), [("prodigy", 1.0), ("mechanic", 1.0), ("momo", 0.5)]
)
def test_what_learns_its_rate_sees_a_peak_of_its_own(name, rate):
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 3, 10)
  config = make_config(optimizer=name, opt__momo__learning_rate=0.5)
  tx = flax_mechanic.make_optimizer(
    config, lambda count: 0.16 * shape(count), peak=0.16
  )
  _, state, _ = network.train(with_value(tx), 4)
  seen = optax.tree.get(state, "learning_rate", filtering=in_hyperparams)
  assert seen == rate


def with_value(tx):
  return optax.GradientTransformation(
    tx.init, lambda *args: tx.update(*args, value=jnp.float32(1.0))
  )


def in_hyperparams(path, value):
  return "hyperparams[" in jax.tree_util.keystr(path)


def test_a_peak_replaces_the_learning_rate_of_the_config():
  config = flax_mechanic.add_optimizer_config(ConfigDict(), "sgd")
  half = lambda count: 0.005
  tx = flax_mechanic.make_optimizer(config, half, peak=0.01)
  found = flax_mechanic.scalars(tx.init(network.params()))
  np.testing.assert_allclose(found["learning_rate/effective"], 0.005)
  for peak in (0.0, float("inf")):
    with pytest.raises(UsageError, match=f"peak={peak} must be"):
      flax_mechanic.make_optimizer(config, half, peak=peak)


@pytest.mark.parametrize("name", optimizers.KINDS)
def test_a_state_has_one_learning_rate(name):
  tx = flax_mechanic.make_optimizer(make_config(optimizer=name))
  found = optax.tree.get_all_with_path(
    tx.init(network.params()), "learning_rate"
  )
  assert len(found) == 1


@pytest.mark.parametrize(
  ("fields", "reference", "wrap"),
  [
    ({"optimizer": "adamw"}, optax.adamw, jax.jit),
    (
      {"optimizer": "adamw", "grad_clip": 1.0},
      optax.adamw,
      lambda update: update,
    ),
    (
      {"optimizer": "mechanize"},
      lambda lr: optax.contrib.mechanize(optax.adamw(lr)),
      jax.jit,
    ),
  ],
)
def test_a_constant_learning_rate_is_read_and_set_in_the_state(
  fields, reference, wrap
):
  config = make_config(**fields)
  before = config.learning_rate if fields["optimizer"] == "adamw" else 1.0
  tx = flax_mechanic.make_optimizer(config)
  step, x = network.make_step(tx), network.params()
  state = tx.init(x)
  assert optax.tree.get(state, "learning_rate") == np.float32(before)
  x, state, _ = step(x, state, *network.batch(0))
  state = optax.tree.set(state, learning_rate=before / 4)
  gradient = jax.jit(jax.grad(network.loss))(x, *network.batch(1))
  updates, state = wrap(tx.update)(gradient, state, x)
  x = optax.apply_updates(x, updates)
  assert optax.tree.get(state, "learning_rate") == np.float32(before / 4)

  rates = lambda count: jnp.where(count == 0, before, before / 4)
  theirs = reference(rates)
  if "grad_clip" in fields:
    theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs)
  expected = network.train(theirs, 2)[0]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    x,
    expected,
  )


def test_a_whole_number_that_is_set_is_kept_as_a_float():
  tx = flax_mechanic.make_optimizer(make_config(optimizer="sgd", guard=False))
  x = {"w": jnp.ones(2)}
  state = optax.tree.set(tx.init(x), learning_rate=1)
  _, state = tx.update(x, state, x)
  rate = optax.tree.get(state, "learning_rate")
  assert (rate, rate.dtype) == (1.0, jnp.float32)


@pytest.mark.parametrize("name", ["adamw", "mechanic", "schedule_free"])
def test_a_scheduled_learning_rate_is_read_in_the_state(name):
  shape = optax.linear_schedule(1.0, 0.0, 4)
  config = make_config(optimizer=name, accumulate_steps=2)
  _, state, _ = network.train(flax_mechanic.make_optimizer(config, shape), 4)
  rate = optax.tree.get(state, "learning_rate")
  expected = 0.75 if name == "mechanic" else 0.0075
  np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_register_adds_a_transformation_to_the_flag():
  def signum(learning_rate, beta=0.9):
    return optax.chain(
      optax.trace(beta),
      optax.scale_by_sign(),
      optax.scale_by_learning_rate(learning_rate),
    )

  flax_mechanic.register("signed", signum)
  rated = flax_mechanic.register("rated", lambda learning_rate=1.0, b=2: None)
  assert rated.options == {"b": 2, "learning_rate": float}
  # A wrapper leaves it to its base.
  base = {"base": "signed"}
  same = flax_mechanic.register("same", lambda base, rate: base, options=base)
  assert same.options == base
  config = make_config(optimizer="signed", opt__signed__beta=0.8)
  ours = network.train(flax_mechanic.make_optimizer(config), 10)
  theirs = network.train(signum(0.01, beta=0.8), 10)
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)

  config = make_config(
    optimizer="mechanize",
    opt__mechanize__base="signed",
  )
  ours = network.train(flax_mechanic.make_optimizer(config), 10)
  theirs = network.train(optax.contrib.mechanize(signum(1.0)), 10)
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4)
  with pytest.raises(UsageError, match="registered already"):
    flax_mechanic.register("signed", signum)
  with pytest.raises(UsageError, match="identifier"):
    flax_mechanic.register("sig-num", signum)
  made: Any = signum(0.01)
  with pytest.raises(UsageError, match=r"register build\(learning_rate"):
    flax_mechanic.register("made", made)


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("constant", {0: 1.0, 10: 1.0, 99: 1.0}),
    ("warmup", {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
    (
      "warmup_cosine",
      {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0},
    ),
    ("warmup_linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
    (
      "warmup_stable_decay",
      {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 73: 0.6, 100: 0.0},
    ),
    ("rsqrt", {0: 0.0, 5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
  ],
)
def test_schedules_are_shapes_with_peak_one(name, values):
  schedule = flax_mechanic.make_schedule(name, 100, 10)
  compiled = jax.jit(schedule)
  for step, value in values.items():
    found = compiled(jnp.int32(step)), schedule(step)
    np.testing.assert_allclose(found, value, atol=1e-6)


def test_schedule_errors():
  with pytest.raises(UsageError, match="did you mean 'warmup_cosine'"):
    flax_mechanic.make_schedule("warmup_cosin", 100)
  with pytest.raises(UsageError, match=r"warmup_steps=100 .* 50 updates"):
    flax_mechanic.make_schedule("warmup", 50, 100)
  with pytest.raises(UsageError, match=r"warmup_steps=50 .* 50 updates"):
    flax_mechanic.make_schedule("warmup", 50, 50)


def test_scalars_read_what_was_learned():
  shape = optax.linear_schedule(1.0, 0.0, 40)
  config = make_config(
    optimizer="mechanic",
    grad_clip=1.0,
    accumulate_steps=2,
    # Else the scale is only on its way to the sum of s.
    opt__mechanic__follow_schedule=False,
  )
  _, state, _ = network.train(flax_mechanic.make_optimizer(config, shape), 20)
  found = flax_mechanic.scalars(state)
  # A scale a leaf, and their mean.
  scale = float(jnp.mean(jnp.sum(optax.tree.get(state, "s"), -1)))
  np.testing.assert_allclose(found["mechanic/scale"], scale, rtol=1e-6)
  # Ten updates of two batches; the tenth used the schedule's value at 9.
  np.testing.assert_allclose(
    found["learning_rate/effective"], scale * (1 - 9 / 40), rtol=1e-5
  )
  plain = flax_mechanic.make_optimizer(make_config(), shape)
  found = flax_mechanic.scalars(plain.init(network.params()))
  assert {k: round(float(v), 6) for k, v in found.items()} == {
    "learning_rate/effective": 0.01,
    "skipped": 0.0,
    "skipped_in_a_row": 0.0,
  }
  assert flax_mechanic.scalars(optax.sgd(0.1).init(network.params())) == {}
  theirs = optax.contrib.mechanize(optax.sgd(1.0)).init(network.params())
  found = flax_mechanic.scalars(theirs)
  np.testing.assert_allclose(found["mechanic/scale"], theirs.s.sum())
  assert found["learning_rate/effective"] == found["mechanic/scale"]


@pytest.mark.parametrize(
  "name",
  [
    "constant",
    "warmup",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
    "rsqrt",
  ],
)
def test_schedules_without_warm_up_start_at_the_peak(name):
  assert flax_mechanic.make_schedule(name, 100)(0) == 1.0


def test_schedules_ask_for_an_update_and_read_only_what_they_use():
  with pytest.raises(UsageError, match="must have at least 1"):
    flax_mechanic.make_schedule("warmup_cosine", 0)
  assert flax_mechanic.make_schedule("constant", 10, 100)(0) == 1.0


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("s_init", 0.0),
    ("eps", 0.0),
    ("weight_decay", -1.0),
    ("num_betas", 0),
    ("betas", (1.5,)),
    ("betas", ("a",)),
  ],
)
def test_mechanic_s_options_out_of_range_are_named(option, value):
  config = make_config(optimizer="mechanic")
  config.opt.mechanic[option] = value
  with pytest.raises(UsageError, match=r"config\.opt\.mechanic: .* must be"):
    flax_mechanic.make_optimizer(config)


def test_a_method_registered_late_has_its_defaults():
  config = make_config()
  flax_mechanic.register("late", optax.sgd)
  config.optimizer = "late"
  ours = network.train(flax_mechanic.make_optimizer(config), 10)
  theirs = network.train(optax.sgd(0.01), 10)
  np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5)
