"""muon on a mesh: what optax's computes on one device, without gathering."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from optax import contrib

import flax_mechanic
from flax_mechanic import TrainState
from train.cost import program

# Among them matrices of one shape, more of them than devices; a kernel of three
# axes; sizes that no device divides; and what is no matrix.
SHAPES = {
  "stack": ((5, 8, 24), P(None, "fsdp")),
  "wide": ((8, 24), P(None, "fsdp")),
  "tall": ((24, 8), P("fsdp")),
  "query": ((16, 2, 6), P("fsdp", "data")),
  "odd": ((7, 3), P()),
  "square": ((8, 8), P(None, "fsdp")),
  # Whole matrices, where they are used.
  "experts": ((4, 6, 5), P("fsdp")),
  "bias": ((8,), P("fsdp")),
}
NUMBERS = {
  "stack": contrib.MuonDimensionNumbers((1,), (2,)),
  "query": contrib.MuonDimensionNumbers((0,), (1, 2)),
  "experts": contrib.MuonDimensionNumbers((1,), (2,)),
  "bias": None,
}


def draw(seed):
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, (shape, _) in SHAPES.items()
  }


def by_optax(**options):
  numbers = {name: contrib.MuonDimensionNumbers() for name in SHAPES} | NUMBERS
  return contrib.muon(0.1, muon_weight_dimension_numbers=numbers, **options)


def by_flag(**options):
  config = flax_mechanic.add_optimizer_config(
    ConfigDict({"learning_rate": 0.1}), "muon"
  )
  config.guard = False
  config.opt.muon.matrices = ("stack bio", "experts bio", "query ioo")
  config.opt.muon.update(options)
  return flax_mechanic.make_optimizer(config)


def on_mesh(tx, axis_type, **placement):
  """Returns a state over split parameters, its step, and split gradients."""
  mesh = jax.make_mesh(
    (2, 4), ("data", "fsdp"), axis_types=(axis_type, axis_type)
  )
  place = lambda tree: {
    name: jax.device_put(leaf, NamedSharding(mesh, SHAPES[name][1]))
    for name, leaf in tree.items()
  }
  state = TrainState.create(
    apply_fn=None, params=place(draw(0)), tx=tx, **placement
  )
  step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
  return state, step, [place(draw(seed)) for seed in (1, 2)]


@pytest.mark.parametrize(
  ("axis_type", "shard_over", "options"),
  [
    (AxisType.Auto, [], {"preconditioning": "schatten", "weight_decay": 0.1}),
    *(
      pytest.param(axis_type, ["data"], options, marks=pytest.mark.slow)
      for axis_type, options in (
        (AxisType.Explicit, {"adaptive": True, "nesterov": False}),
        (AxisType.Auto, {"ns_coeffs": ((3.0, -3.0, 1.0),) * 3}),
        (AxisType.Auto, {"preconditioning": "aol"}),
      )
    ),
  ],
)
def test_a_mesh_computes_what_one_device_does(axis_type, shard_over, options):
  state, step, grads = on_mesh(
    by_flag(**options), axis_type, shard_over=shard_over
  )
  alone = TrainState.create(
    apply_fn=None, params=draw(0), tx=by_optax(**options)
  )
  for each, seed in zip(grads, (1, 2), strict=True):
    state = step(state, each)
    alone = alone.apply_gradients(grads=draw(seed))
  for name, wanted in alone.params.items():
    found = state.params[name]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.sharding.is_equivalent_to(each[name].sharding, wanted.ndim)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_no_device_gathers_a_stack():
  def moves(tx):
    state, step, (grads, _) = on_mesh(tx, AxisType.Auto)
    compiled = step.lower(state, grads).compile()
    return program.collectives(compiled.as_text())

  found = moves(by_flag())
  assert found["all-gather"].count == 0
  assert found["all-to-all"].count > 0
  # Once this fails, `flax_mechanic.methods.muon` can go.
  assert moves(by_optax())["all-gather"].count > 0
