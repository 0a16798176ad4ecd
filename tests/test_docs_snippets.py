"""The Python that README.md and docs/ show runs."""

import importlib.util

import jax
import jax.numpy as jnp
import network
import optax
import pages
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import flax_mechanic
from tests.test_adoption import save_standard


class Model(nnx.Module):
  def __init__(self):
    self.hidden = nnx.Linear(8, 256, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(256, 1, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.head(jnp.tanh(self.hidden(x)))


def given(code, folder):
  """Returns the names that a snippet may use from the job around it.

  The model is Linen's if the snippet has a TrainState, otherwise NNX's.
  """
  found = {
    "flax_mechanic": flax_mechanic,
    "jax": jax,
    "jnp": jnp,
    "nnx": nnx,
    "optax": optax,
    "ConfigDict": ConfigDict,
    "NamedSharding": NamedSharding,
    "P": P,
    "config": ConfigDict({"learning_rate": 1e-3}),
    "schedule": flax_mechanic.make_schedule("warmup_cosine", 100, 10),
    "mesh": jax.make_mesh(
      (4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    ),
    "tx": flax_mechanic.mechanize(optax.adamw(1.0)),
    "batch": network.batch(0),
  }
  if "TrainState" in code:
    found["model"] = linen.Dense(1)
    found["params"] = found["model"].init(jax.random.key(0), jnp.ones((1, 8)))
    found["loss_fn"] = lambda params, batch: jnp.mean(
      (found["model"].apply(params, batch[0]) - batch[1]) ** 2
    )
    return found
  model = found["model"] = Model()
  found["params"] = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  found["loss_fn"] = lambda model, batch: jnp.mean(
    (model(batch[0]) - batch[1]) ** 2
  )
  found["optimizer"] = flax_mechanic.Optimizer(model, found["tx"])
  if "FOLDER" in code:
    plain = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    save_standard(folder / "plain", nnx.state((model, plain)))
    found["FOLDER"] = folder / "plain"
  if "OUT" in code:
    save_standard(folder / "out", nnx.state(model))
    found["OUT"] = folder / "out"
  if "import torch" in code:
    torch = pytest.importorskip("torch")
    found["torch_model"] = torch.nn.Linear(8, 1)
    found["torch_loss"] = lambda model: model(torch.ones(4, 8)).sum()
  return found


def executed(page):
  """Returns a page's blocks to run; without torch, those that do not use it."""
  has_torch = importlib.util.find_spec("mechanic_pytorch") is not None
  return [
    (line, code)
    for line, code in pages.blocks(page, "python")
    if has_torch or "import torch" not in code
  ]


@pytest.mark.parametrize(
  "page", [p for p in pages.PAGES if pages.blocks(p, "python")]
)
def test_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written = {}
  for line, code in executed(page):
    around = given(code, tmp_path)
    names = around | written
    # A traceback shows the page and its line.
    exec(compile("\n" * line + code, str(pages.ROOT / page), "exec"), names)
    written |= {
      name: value
      for name, value in names.items()
      if name not in around or value is not around[name]
    }
