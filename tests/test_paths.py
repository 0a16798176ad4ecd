"""Names of leaves and parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest

from flax_mechanic.paths import by_path, map_with_parameters


def belongs_to(state, parameters):
  """Returns the leaves of a state with what they belong to."""
  pairs = []
  map_with_parameters(lambda *pair: pairs.append(pair), state, parameters)
  return pairs


def test_a_leaf_of_a_state_belongs_to_the_longest_path_in_its_own():
  state = {"mu": {"head": {"kernel": jnp.ones(2)}}, "nu": jnp.ones(3)}
  parameters = {
    name: jax.ShapeDtypeStruct((2,), jnp.float32)
    for name in ("kernel", "head", "head/kernel")
  }
  (_, kernel), (_, none) = belongs_to(state, parameters)
  assert kernel is parameters["head/kernel"]
  assert none is None


@pytest.mark.parametrize(
  "params",
  [
    [2.0, 3.0],
    {"mu": 2.0, "rho": 3.0, "count": 4.0},
    [(2.0, 3.0), (4.0, 5.0)],
    {"kernel": 2.0, "mu": {"kernel": 3.0}},
    2.0,
  ],
  ids=["a list", "optax's own names", "pairs", "a layer mu", "one array"],
)
def test_what_optax_calls_its_own_is_no_parameter(params):
  params = jax.tree.map(lambda value: jnp.full((4, 4), value), params)
  tx = optax.chain(optax.trace(0.9), optax.adam(1.0))
  parameters = by_path(params)
  # A state that holds the parameters in place of their moments.
  state = optax.tree.map_params(tx, lambda _, x: x, tx.init(params), params)
  for leaf, found in belongs_to(state, parameters):
    assert found is (leaf if leaf.shape else None)
