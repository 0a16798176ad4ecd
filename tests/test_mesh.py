"""The job on a mesh: sizes, placement, batches, the same loss everywhere."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from configs import default, digits, text
from flax_mechanic import Checkpointer, UsageError, make_optimizer
from flax_mechanic.checkpoints.checksum import checksums
from tests import optimizers
from tests.compilations import compilations
from train import mesh
from train.job import make_job

JOBS = {
  "digits": lambda: digits.get_config(),
  "cnn": lambda: digits.get_config("cnn"),
  "text": lambda: text.get_config("tiny"),
}
MESHES = [
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 8},
  {"fsdp": 8, "data": 1},
  {"data": 1, "fsdp": 4, "tensor": 2},
]


def make_config(job="text", devices=8, **fields):
  config = JOBS[job]()
  config.optimizer = "mechanic"
  config.opt.mechanic.s_init = 1e-3
  for field, value in fields.items():
    target = config.mesh if field in config.mesh else config
    target[field] = value
  return config


def run(job):
  """Returns the losses of some steps, and the state after them."""
  with jax.set_mesh(job.mesh):
    state, losses, compiled = job.create(), [], []
    for i in range(3):
      old, batch, before = state, job.train_batch(i), compilations()
      state, metrics = job.train_step(state, batch)
      compiled.append(compilations() - before)
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old["model"]))
      losses.append(float(metrics["train/loss"]))
    evaluations = [job.eval_step(state, batch) for batch in job.eval_batches()]
    losses += [float(each["eval/loss"]) for each in evaluations[:2]]
  assert compiled == [1, 0, 0]
  return losses, state


@functools.cache
def run_on_one(job):
  """Returns the losses on one device."""
  return run(make_job(make_config(job, data=1), jax.devices()[:1]))[0]


@dataclasses.dataclass(frozen=True)
class Chip:
  """What jax asks of a device to arrange it."""

  id: int
  slice_index: int
  platform: str = "cpu"
  device_kind: str = "chip"
  process_index: int = 0


@pytest.mark.parametrize(
  ("sizes", "slices", "across"),
  [
    ({"data": 2, "fsdp": 4}, 2, "data"),
    ({"data": 1, "fsdp": -1}, 2, "fsdp"),
    ({"data": 1, "fsdp": 1, "tensor": -1}, 2, "tensor"),
    ({"data": 4, "fsdp": 2}, 2, "data"),
  ],
)
def test_the_first_axes_go_from_slice_to_slice(sizes, slices, across):
  config = make_config(**sizes).mesh
  chips = [Chip(i, i % slices) for i in range(8)]
  found = mesh.make_mesh(config, chips)
  indices = np.vectorize(lambda chip: chip.slice_index)(found.devices)
  axis = mesh.AXES.index(across)
  parts = np.split(indices, slices, axis)
  assert [set(part.flat) for part in parts] == [{0}, {1}]


def test_more_slices_than_the_first_axis_has_parts():
  config = make_config(data=2, fsdp=6).mesh
  chips = [Chip(i, i // 2) for i in range(12)]
  found = mesh.make_mesh(config, chips)
  indices = np.vectorize(lambda chip: chip.slice_index)(found.devices)[..., 0]
  assert indices.tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]


@pytest.mark.parametrize(
  ("sizes", "wanted"),
  [
    ({}, (8, 1, 1)),
    ({"fsdp": 2}, (4, 2, 1)),
    ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
  ],
)
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_sizes(sizes, wanted, axis_type):
  config = default.get_config().mesh
  config.update(sizes, axis_type=axis_type)
  made = mesh.make_mesh(config)
  assert tuple(made.shape.values()) == wanted
  assert made.axis_names == mesh.AXES
  assert {each.name.lower() for each in made.axis_types} == {axis_type}


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"data": 3}, r"config\.mesh is data 3, fsdp 1.*8 devices; type --config"),
    ({"data": 4}, r"data 4, fsdp 1, tensor 1, and there are 8 devices"),
    ({"fsdp": 3}, r"data -1, fsdp 3, .*; type --config\.mesh\.data=-1"),
    ({"fsdp": -1}, "one may be -1"),
    ({"tensor": 0}, "each must be 1 or more"),
    ({"tensor": -2}, "each must be 1 or more"),
    ({"axis_type": "Auto"}, r"config\.mesh\.axis_type='Auto'.*'auto'"),
    ({"batch_size": 12}, r"config\.batch_size=12 must be a multiple of 8"),
    ({"batch_size": 6, "data": 2, "fsdp": 4}, "must be a multiple of 8"),
  ],
)
def test_bad_sizes(fields, words):
  with pytest.raises(UsageError, match=words) as error:
    make_job(make_config(**fields))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("axes", "shape", "wanted"),
  [
    (("embed", "mlp"), (8, 6), P("fsdp", "tensor")),
    (("vocab", "embed"), (4, 8), P("tensor", "fsdp")),
    (("batch", None, None), (8, 3, 3), P(("data", "fsdp"), None, None)),
    (("embed", "mlp"), (3, 6), P(None, "tensor")),  # 3 is not divided by 2.
    (("batch",), (6,), P(None)),
    ((None,), (8,), P(None)),
    ((), (), P()),
  ],
)
def test_rules(axes, shape, wanted):
  on = jax.make_mesh((2, 2, 2), mesh.AXES, axis_types=(AxisType.Auto,) * 3)
  assert mesh.spec(axes, shape, on) == wanted


def test_a_mesh_without_an_axis_splits_nothing_over_it():
  on = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  assert mesh.spec(("embed", "mlp"), (8, 8), on) == P(None, None)
  assert mesh.spec(("batch",), (8,), on) == P("data")


def test_spread_loads_what_the_devices_hold():
  on = jax.make_mesh((2, 2, 2), mesh.AXES, axis_types=(AxisType.Auto,) * 3)
  whole = {"x": np.arange(24).reshape(12, 2), "y": np.arange(12)}
  asked = []

  def load(rows):
    asked.append(rows)
    return {name: array[rows] for name, array in whole.items()}

  batch = mesh.spread(load, 12, on)
  assert asked == [slice(0, 12)]
  for name, array in batch.items():
    np.testing.assert_array_equal(array, whole[name])
    assert array.sharding.spec == P(("data", "fsdp"))
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[name][shard.index])
  replicated = mesh.spread(lambda rows: {"y": np.arange(6)[rows]}, 6, on)
  assert replicated["y"].sharding.is_fully_replicated


@pytest.mark.parametrize("job", ["digits", "text"])
def test_rows_of_a_batch_are_those_of_the_whole(job):
  task = make_job(make_config(job)).task
  for step in (0, 7, 30):
    whole = task.train_batch(step)
    part = task.train_batch(step, slice(3, 6))
    for name, array in part.items():
      np.testing.assert_array_equal(array, whole[name][3:6])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "sizes", "axis_type"),
  [
    # One job on every mesh, another on those with a tensor axis, which so have
    # axes of either type, and a third on the one with all axes.
    (job, sizes, ("auto", "explicit")[(i + (job != "digits")) % 2])
    for job in JOBS
    for i, sizes in enumerate(MESHES)
    if job == "digits" or ("tensor" in sizes and (job == "text" or i == 0))
  ],
)
def test_the_loss_of_one_device_on_every_mesh(job, sizes, axis_type):
  losses, state = run(make_job(make_config(job, axis_type=axis_type, **sizes)))
  assert losses == pytest.approx(run_on_one(job), rel=2e-5)
  shardings = {leaf.sharding.mesh for leaf in jax.tree.leaves(state)}
  assert {each.axis_types[0].name.lower() for each in shardings} == {axis_type}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("shard", "offload", "axis_type"),
  [
    (True, True, "auto"),
    (False, False, "explicit"),
  ],
)
def test_where_the_optimizer_s_state_lies(shard, offload, axis_type):
  config = make_config(
    axis_type=axis_type,
    data=4,
    tensor=2,
    shard_optimizer_state=shard,
    offload_optimizer_state=offload,
  )
  job = make_job(config)
  losses, state = run(job)
  assert losses == pytest.approx(run_on_one("text"), rel=2e-5)
  name = "blocks/0/mlp/gate/kernel"
  model = nnx.to_pure_dict(state["model"])
  kernel = model["blocks"][0]["mlp"]["gate"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (32, 32)
  found = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"])
    if name in jax.tree_util.keystr(path, simple=True, separator="/")
  ]
  assert len(found) == 3  # Two moments and x0.
  for leaf in found:
    shape = (8, 32) if shard else (32, 32)
    assert leaf.sharding.shard_shape(leaf.shape) == shape
    kind = "pinned_host" if offload else "device"
    assert leaf.sharding.memory_kind == kind
  for leaf, target in zip(
    jax.tree.leaves(state), jax.tree.leaves(job.target), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


def test_the_state_is_split_over_all_that_splits_the_batch():
  config = make_config(data=2, fsdp=4, shard_optimizer_state=True)
  target = make_job(config).target
  # A scale is whole on each device, as no rule splits it.
  scale = nnx.to_pure_dict(target["model"])["norm"]["scale"]
  assert scale.sharding.shard_shape(scale.shape) == scale.shape == (32,)
  found = [
    leaf.sharding.shard_shape(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(target["optimizer"])
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith(
      "/norm/scale/value"
    )
  ]
  assert found == [(4,)] * 3  # Two moments and x0.


def test_nothing_is_whole_on_one_device_when_it_is_made():
  config = make_config(fsdp=8, data=1)
  config.model.update(embed_dim=512, mlp_dim=2048)
  job = make_job(config)
  with jax.set_mesh(job.mesh):
    memory = job.create.lower().compile().memory_analysis()
  sizes = [leaf.size * 4 for leaf in jax.tree.leaves(job.target["model"])]
  copies = 4  # The parameters, two moments and x0.
  assert memory.output_size_in_bytes < 1.05 * copies * sum(sizes) / 8
  assert memory.temp_size_in_bytes < max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["scan_layers", "remat"])
def test_stacked_and_recomputed_layers(field):
  config = make_config(fsdp=2, tensor=2)
  config.model.update(num_layers=2, dropout=0.2)
  plain = make_job(config)
  config = config.copy_and_resolve_references()
  config.model[field] = True
  other = make_job(config)
  size = lambda job: sum(x.size for x in jax.tree.leaves(job.target["model"]))
  losses, state = run(other)
  if field == "scan_layers":
    # Dropout's keys are stacked too.
    assert size(other) == size(plain)
    kernel = nnx.to_pure_dict(state["model"])["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 32, 64)
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert np.isfinite(losses).all()
  else:
    assert losses == pytest.approx(run(plain)[0], rel=1e-5)


@pytest.mark.slow
def test_stacked_layers_compute_what_separate_ones_do():
  config = make_config(data=1)
  config.model.num_layers = 2
  task = make_job(config, jax.devices()[:1]).task
  separate = task.create_model(nnx.Rngs(0))
  config.model.scan_layers = True
  stacked = make_job(config, jax.devices()[:1]).task.create_model(nnx.Rngs(0))
  state = nnx.to_pure_dict(nnx.state(separate, nnx.Param))
  blocks = [state["blocks"][i] for i in range(2)]
  state["blocks"] = jax.tree.map(lambda *x: np.stack(x), *blocks)
  nnx.update(stacked, state)
  tokens = np.arange(64).reshape(2, 32)
  np.testing.assert_allclose(stacked(tokens), separate(tokens), atol=1e-5)


@pytest.mark.slow
def test_muon_takes_each_stacked_layer_as_it_takes_a_separate_one():
  def updates(grads, **model):
    config = make_config(data=1, optimizer="muon")
    config.model.update(num_layers=2, **model)
    wanted = nnx.to_pure_dict(
      make_job(config, jax.devices()[:1]).target["model"]
    )
    grads = grads or jax.tree.map(lambda x: rng.normal(size=x.shape), wanted)
    grads = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), grads, wanted)
    tx = make_optimizer(config)
    return jax.jit(tx.update)(grads, tx.init(grads), grads)[0], grads

  def stack(tree):
    layers = [tree["blocks"][i] for i in range(2)]
    return tree | {"blocks": jax.tree.map(lambda *x: np.stack(x), *layers)}

  rng = np.random.default_rng(0)
  separate, grads = updates(None)
  stacked, _ = updates(stack(grads), scan_layers=True)
  for found, wanted in zip(
    *map(jax.tree.leaves, (stacked, stack(separate))), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


# Devices, and how a checkpoint of the mesh of 2x2x2 is placed on them.
ELSEWHERE = {
  "same": (8, {"fsdp": 2, "tensor": 2, "shard_optimizer_state": True}),
  "explicit": (
    8,
    {"data": 1, "fsdp": 4, "tensor": 2, "axis_type": "explicit"},
  ),
  "host": (8, {"offload_optimizer_state": True}),
  "half": (4, {"tensor": 2, "shard_optimizer_state": True}),
  "one": (1, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "places"),
  [
    ("mechanic", [*ELSEWHERE]),
    ("dpsgd", ["same", "one"]),  # It has random keys.
  ],
)
def test_a_checkpoint_goes_on_elsewhere(tmp_path, name, places):
  def make(devices, **fields):
    config = optimizers.configure(make_config("digits", **fields), name)
    config.checkpoint_every = 1
    return make_job(config, jax.devices()[:devices])

  def train(job, state, steps):
    losses = []
    for i in steps:
      state, metrics = job.train_step(state, job.train_batch(i))
      losses.append(float(metrics["train/loss"]))
    return state, losses

  devices, fields = ELSEWHERE["same"]
  job = make(devices, **fields)
  with jax.set_mesh(job.mesh), Checkpointer(tmp_path) as checkpointer:
    state, _ = train(job, job.create(), range(2))
    checkpointer.save(2, state)
    sums = checksums(state)
    _, wanted = train(job, state, range(2, 5))
  for devices, fields in map(ELSEWHERE.get, places):
    other = make(devices, **fields)
    with jax.set_mesh(other.mesh), Checkpointer(tmp_path) as checkpointer:
      state = checkpointer.restore(other.target).state
      for leaf, target in zip(
        jax.tree.leaves(state), jax.tree.leaves(other.target), strict=True
      ):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
        assert leaf.sharding.memory_kind == target.sharding.memory_kind
      assert checksums(state) == sums
      _, losses = train(other, state, range(2, 5))
    if other.mesh == job.mesh:
      assert losses == wanted  # Bit for bit.
    assert losses == pytest.approx(wanted, rel=1e-4)


# Those that need more than a gradient; of the others tests/test_placement.py
# has every kind. On explicit axes a step is partitioned as on automatic ones,
# and typed too.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "dpsgd", "sophia"])
def test_kinds_of_optimizers_on_a_mesh(name):
  def losses(devices, **sizes):
    config = optimizers.configure(make_config("text", **sizes), name)
    config.shard_optimizer_state = True
    return run(make_job(config, devices))[0]

  found = losses(None, data=2, fsdp=2, tensor=2, axis_type="explicit")
  assert found == pytest.approx(losses(jax.devices()[:1]), rel=1e-4)
