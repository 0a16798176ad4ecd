"""variant="pytorch" against the package mechanic-pytorch itself.

Run with `pip install torch mechanic-pytorch`; skipped where they are not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_mechanic import mechanize
from tests import network

torch = pytest.importorskip("torch", reason="pip install torch")
mechanic_pytorch = pytest.importorskip(
  "mechanic_pytorch", reason="pip install mechanic-pytorch"
)

BASES = {
  "sgd": (
    lambda: optax.sgd(0.5, momentum=0.9),
    (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
  ),
  "adamw": (
    lambda: optax.adamw(1.0, weight_decay=1e-2),
    (torch.optim.AdamW, {"lr": 1.0, "weight_decay": 1e-2}),
  ),
}


@pytest.mark.parametrize("base", BASES)
def test_equals_the_pytorch_package(base):
  steps, options = 100, {"s_init": 1e-5}
  ours, (theirs, arguments) = BASES[base]
  with jax.enable_x64(True):
    tx = mechanize(ours(), variant="pytorch", **options)
    x, state, _ = network.train(tx, steps, jnp.float64)

    torch.set_default_dtype(torch.float64)
    leaves, treedef = jax.tree.flatten(network.params(jnp.float64))
    tensors = [
      torch.tensor(np.array(leaf), requires_grad=True) for leaf in leaves
    ]
    optimizer = mechanic_pytorch.mechanize(theirs, **options)(
      tensors, **arguments
    )
    gradient = jax.jit(jax.grad(network.loss))
    for step in range(steps):
      params = treedef.unflatten([jnp.asarray(t.detach()) for t in tensors])
      grads = gradient(params, *network.batch(step, jnp.float64))
      for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
        tensor.grad = torch.tensor(np.array(grad))
      optimizer.step()
    torch.set_default_dtype(torch.float32)

  for leaf, tensor in zip(jax.tree.leaves(x), tensors, strict=True):
    np.testing.assert_allclose(leaf, tensor.detach().numpy(), rtol=1e-7)
  scale = optimizer.state["_mechanic"]["s"].numpy()
  np.testing.assert_allclose(state.s, scale, rtol=1e-7)
  assert scale.sum() > 1e-4
