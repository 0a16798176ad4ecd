"""The four inner products, against NumPy in float64, on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mechanic.mechanic import sums as lib
from flax_mechanic.mechanic.groups import Groups
from flax_mechanic.placement import Shardings

# On a mesh of 4x2; with sizes below, at and above a row, and in between.
SPECS = {
  "both": ((64, 520), P("data", "model")),
  "one": ((16, 4096), P("data", None)),
  "other": ((6, 50), P(None, "model")),
  "joint": ((8, 3, 5), P(("data", "model"))),
  "whole": ((3, 7), P()),
  "scalar": ((), P()),
  "empty": ((0, 4), P()),
}

PRODUCTS = lib._Products(lib.PAIRS, jnp.dtype("float32"))


def trees(dtype=np.float32):
  rng = np.random.default_rng(0)

  def draw(shape):
    value = rng.normal(1.0, 1.0, shape)
    if np.issubdtype(dtype, np.complexfloating):
      value = value + 1j * rng.normal(1.0, 1.0, shape)
    return value.astype(dtype)

  return [
    {name: draw(shape) for name, (shape, _) in SPECS.items()} for _ in "gxd"
  ]


def expected(g, x, delta):
  flat = lambda tree: np.concatenate(
    [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]
  ).astype(np.complex128)
  g, x, delta = flat(g), flat(x), flat(delta)
  pairs = (g, g), (x, x), (g, delta), (x, delta)
  return [np.vdot(b, a).real for a, b in pairs]


def place(tree, mesh):
  return {
    name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name][1]))
    for name, leaf in tree.items()
  }


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_on_one_device(dtype):
  g, x, delta = trees(dtype)
  sums = jax.jit(lib.inner_products, static_argnums=3)(
    g, x, delta, jnp.dtype("float32")
  )
  np.testing.assert_allclose(sums, expected(g, x, delta), rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("known", ["all", "some", "none"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type, known, jit):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  placed = [place(tree, mesh) for tree in trees()]
  if known == "some":
    shardings = Shardings.of({"one": placed[1]["one"]})
  else:
    shardings = Shardings.of(placed[1]) if known == "all" else None
  f = lambda *trees: lib.inner_products(*trees, jnp.dtype("float32"), shardings)
  with jax.set_mesh(mesh):
    sums = (jax.jit(f) if jit else f)(*placed)
  np.testing.assert_allclose(sums, expected(*trees()), rtol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_trees_without_entries_sum_to_zero(axis_type):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  empty = {"empty": jax.device_put(jnp.ones((0, 4)), NamedSharding(mesh, P()))}
  for tree in (empty, {}):
    sums = lib.inner_products(
      tree, tree, tree, jnp.dtype("float32"), Shardings.of(tree)
    )
    assert list(map(float, sums)) == [0.0] * 4


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("f", [lib._sum_rows, lib._sum_one_by_one])
def test_both_ways_to_sum_weigh_and_group_the_leaves(f, grouped):
  leaves = list(zip(*(tree.values() for tree in trees()), strict=True))[:-1]
  weights = [0.5, 1.0, 2.0, 0.25, 1.0, 3.0]
  groups = [0, 1, 0, 2, 2, 1] if grouped else [0] * 6
  wanted = np.zeros([max(groups) + 1, 4])
  for leaf, w, group in zip(leaves, weights, groups, strict=True):
    wanted[group] += w * np.array(expected(*leaf))
  of = Groups(tuple(groups), (3,) if grouped else ())
  sums = jax.jit(lambda leaves: f(lib._Part(leaves, weights, of), PRODUCTS))(
    leaves
  )
  np.testing.assert_allclose(
    sums, wanted.T if grouped else wanted[0], rtol=1e-5
  )


def test_a_long_sum_is_accurate():
  # A flat sum in float32 ends at 2^24.
  n = 3 * 2**24
  part = lib._Part((), [1.0], Groups((0,), ()))
  sums = jax.jit(
    lambda leaves: lib._sum_rows(part._replace(leaves=leaves), PRODUCTS)
  )([(jnp.ones(n),) * 3])
  np.testing.assert_allclose(sums, [n] * 4, rtol=1e-6)


def test_float64_is_summed_in_float64():
  with jax.enable_x64(True):
    tree = {"a": jnp.full(5000, 1 / 3, jnp.float64), "b": jnp.ones(3)}
    sums = lib.inner_products(tree, tree, tree, jnp.dtype("float64"))
    np.testing.assert_allclose(sums, [5000 / 9 + 3] * 4, rtol=1e-14)
    assert all(total.dtype == jnp.float64 for total in sums)
