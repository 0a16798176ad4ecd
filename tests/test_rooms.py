"""The folders are the architecture: a room imports from rooms above it only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The top first.
ROOMS = (
  "flax_mechanic.errors",
  "flax_mechanic.paths",
  "flax_mechanic.placement",
  "flax_mechanic.extra_args",
  "flax_mechanic.mechanic.boxes",
  "flax_mechanic.mechanic.groups",
  "flax_mechanic.mechanic.tuner",
  "flax_mechanic.mechanic.initial_scale",
  "flax_mechanic.mechanic.offset",
  "flax_mechanic.mechanic.sums",
  "flax_mechanic.mechanic.sizes",
  "flax_mechanic.mechanic.held",
  "flax_mechanic.mechanic.gain",
  "flax_mechanic.mechanic.last",
  "flax_mechanic.mechanic.transform",
  "flax_mechanic.mechanic",
  "flax_mechanic.methods.guard",
  "flax_mechanic.methods.registry",
  "flax_mechanic.methods.schedule",
  "flax_mechanic.methods.repairs",
  "flax_mechanic.methods.features",
  "flax_mechanic.methods.muon",
  "flax_mechanic.methods.readers",
  "flax_mechanic.methods.table",
  "flax_mechanic.methods.stack",
  "flax_mechanic.methods.config",
  "flax_mechanic.methods",
  "flax_mechanic.checkpoints.checksum",
  "flax_mechanic.checkpoints.renamed",
  "flax_mechanic.checkpoints.lock",
  "flax_mechanic.checkpoints.savable",
  "flax_mechanic.checkpoints.storage",
  "flax_mechanic.checkpoints.replicas",
  "flax_mechanic.checkpoints.arrays",
  "flax_mechanic.checkpoints.record",
  "flax_mechanic.checkpoints.retention",
  "flax_mechanic.checkpoints.checkpointer",
  "flax_mechanic.checkpoints.adoption",
  "flax_mechanic.checkpoints",
  "flax_mechanic.step",
  "flax_mechanic.optimizer",
  "flax_mechanic.train_state",
  "flax_mechanic",
)
# What the package needs only when it is called.
LATE = {
  ("flax_mechanic.optimizer", "flax_mechanic.checkpoints.adoption"),
  ("flax_mechanic.train_state", "flax_mechanic.checkpoints.adoption"),
}


def modules(folder):
  for file in sorted((ROOT / folder).rglob("*.py")):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    yield name.removesuffix(".__init__"), file


def imports(file, folder):
  """Yields the modules of a folder that a file imports."""
  known = {name for name, _ in modules(folder)}
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        yield name if name in known else node.module
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
  ("name", "file"),
  [pytest.param(*m, id=m[0]) for m in modules("flax_mechanic")],
)
def test_a_room_imports_from_above_only(name, file):
  assert name in ROOMS, "say where the new room is"
  for other in imports(file, "flax_mechanic"):
    if other.split(".")[0] == "train":
      pytest.fail(f"{name} imports {other}")
    if other in ROOMS and (name, other) not in LATE:
      assert ROOMS.index(other) < ROOMS.index(name), other


def test_the_job_s_modules_make_no_circle():
  graph = {
    name: {o for o in imports(file, "train") if o != name}
    for name, file in modules("train")
  }
  graph = {name: others & graph.keys() for name, others in graph.items()}
  while leaves := [name for name, others in graph.items() if not others]:
    graph = {
      name: others - {*leaves}
      for name, others in graph.items()
      if name not in leaves
    }
  assert not graph


def test_importing_the_package_needs_jax_flax_and_optax_alone():
  blocked = ("fcntl", "orbax", "ml_collections", "tensorstore")
  code = f"""
import sys
for name in {blocked}:
  sys.modules[name] = None
import flax_mechanic, jax.numpy as jnp, optax
tx = flax_mechanic.mechanize(optax.adamw(1.0))
params = {{"w": jnp.ones(3)}}
tx.update(params, tx.init(params), params)
assert callable(flax_mechanic.methods)
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
