"""Names of leaves and parameters."""

import jax
import jax.numpy as jnp

from flax_mechanic.paths import parameter_of


def test_a_leaf_of_a_state_belongs_to_the_longest_path_in_its_own():
  state = {"mu": {"head": {"kernel": jnp.ones(2)}}, "nu": jnp.ones(3)}
  parameters = {
    name: jax.ShapeDtypeStruct((2,), jnp.float32)
    for name in ("kernel", "head", "head/kernel")
  }
  found = {
    jax.tree_util.keystr(path): parameter_of(path, leaf.shape, parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  assert found["['mu']['head']['kernel']"] is parameters["head/kernel"]
  assert found["['nu']"] is None
