"""What `train.benchmark` measures of updates, as rows of its tables."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic.checkpoints.checksum import checksums
from train.cost import facts
from train.cost.updates import UPDATES, base_copies
from train.job import Job, make_job

# Update -> column -> cell.
Rows = Mapping[str, Mapping[str, str]]

# The leaves of a transformer's block, repeated.
_BLOCK = [(256, 256), (512, 128), (128,), (64, 512), (1024, 64), (256,)]
# Calls before the clock counts: compilation, and the first steps.
_WARM_UP = 3


def update_times(base: str, leaves: int, rounds: int) -> Rows:
  """Times an update of so many leaves by each of `UPDATES`."""
  params = {
    f"p{i:03}": jnp.ones(shape) for i, shape in enumerate(_shapes(leaves))
  }
  grads = jax.tree.map(lambda x: 0.01 * x, params)
  steps = {}
  for name, update in UPDATES.items():
    tx = update.make(base)
    create = jax.jit(lambda x, tx=tx: jax.tree.map(jnp.copy, (tx.init(x), x)))
    step = jax.jit(facts.update_step(tx), donate_argnums=(1, 2))
    steps[name] = (
      lambda carry, step=step: step(grads, *carry),
      create(params),
    )
  return _take_turns(steps, rounds)


def step_times(
  get_config: Callable[[], ConfigDict], base: str, rounds: int
) -> Rows:
  """Times a training step of a job, on one device, by each of `UPDATES`."""
  steps = {}
  for name, update in UPDATES.items():
    config = get_config()
    update.configure(config, base)
    config.mesh.data = 1
    job = make_job(config, jax.devices()[:1])
    with jax.set_mesh(job.mesh):
      steps[name] = (functools.partial(_run, job), job.create())
  return _take_turns(steps, rounds)


def compile_times(base: str, leaves: int) -> Rows:
  """Times tracing, lowering and compiling an update of so many leaves.

  Every cache of jax's is empty, as in a new process.
  """
  params = {
    f"p{i:03}": jax.ShapeDtypeStruct(shape, jnp.float32)
    for i, shape in enumerate(_shapes(leaves))
  }
  seconds = {}
  with _without_persistent_cache():
    for name, update in UPDATES.items():
      if update.options:
        continue
      tx = update.make(base)
      state = jax.eval_shape(tx.init, params)
      jax.jit(lambda x: x + 1).lower(1.0).compile()  # Loads the compiler.
      jax.clear_caches()
      start = time.perf_counter()
      step = jax.jit(facts.update_step(tx), donate_argnums=(1, 2))
      step.lower(params, state, params).compile()
      seconds[name] = time.perf_counter() - start
  first = next(iter(seconds.values()))
  return {
    name: {"s": f"{each:.2f}", "ratio": f"{each / first:.1f}"}
    for name, each in seconds.items()
  }


def compiled_here(base: str, leaves: int) -> Rows:
  """Compiles an update of so many leaves for this process's device."""
  rows = {}
  for name, update in UPDATES.items():
    found = facts.compile_update(update.make(base), _shapes(leaves))
    rows[name] = {
      "bytes": f"{found.accessed:.1f}",
      "temporaries": f"{found.temporary:.2f}",
      "held": f"{found.aliased:.1f}",
    }
  return rows


def compiled_elsewhere(base: str, arrays: Sequence[str]) -> Rows:
  """Compiles updates for eight CPU devices and, with libtpu, for a v5e.

  Args:
    base: of the updates.
    arrays: of "one" and "six", what is updated on a v5e.
  """
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
  }
  output = subprocess.run(
    [sys.executable, "-m", "train.cost.facts", base, *arrays],
    env=environment,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  rows = {}
  for name, found in json.loads(output.splitlines()[-1]).items():
    unavoidable = base_copies(base) + UPDATES[name].unavoidable
    eight = found["eight devices"]
    rows[name] = {
      "all-reduces": str(eight["collectives"]["all-reduce"]),
      "all-gathers": str(eight["collectives"]["all-gather"]),
      "temporaries": f"{eight['temporary']:.2f}",
      "unavoidable bytes": f"{unavoidable:.1f}",
    }
    for shapes in arrays:
      if shapes in found:
        bytes_, hbm = (
          found[shapes + kind]["accessed"] for kind in ("", " HBM")
        )
        rows[name][f"v5e {shapes}"] = f"{bytes_:.1f}"
        rows[name][f"v5e {shapes} HBM"] = f"{hbm:.1f}"
        rows[name][f"v5e {shapes} ratio"] = f"{hbm / unavoidable:.2f}"
  return rows


def checkpoint_times(megabytes: int) -> Rows:
  """Times saves and restores, and the share of them that checksums take."""
  draw = lambda i: jax.random.normal(jax.random.key(i), (1024, 1024))
  state = {str(i): draw(i) for i in range(megabytes // 4)}
  seconds: dict[str, list[float]] = {"save": [], "restore": [], "sums": []}

  def timed(name: str, function: Callable[[], Any]) -> None:
    start = time.perf_counter()
    function()
    seconds[name].append(time.perf_counter() - start)

  for _ in range(4):
    with (
      tempfile.TemporaryDirectory() as folder,
      flax_mechanic.Checkpointer(folder) as checkpointer,
    ):
      timed("save", lambda c=checkpointer: c.save(1, state) or c.wait())
      timed("restore", lambda c=checkpointer: c.restore(state))
    timed("sums", lambda: checksums(state))
  median = {name: np.median(each[1:]) for name, each in seconds.items()}
  return {
    name: {
      "seconds": f"{median[name]:.2f}",
      "of which checksums": f"{median['sums'] / median[name]:.1%}",
    }
    for name in ("save", "restore")
  }


def _shapes(leaves: int) -> Sequence[tuple[int, ...]]:
  return [_BLOCK[i % len(_BLOCK)] for i in range(leaves)]


def _run(job: Job, state: nnx.State) -> nnx.State:
  with jax.set_mesh(job.mesh):
    return job.train_step(state, job.train_batch(0))[0]


def _take_turns(
  steps: Mapping[str, tuple[Callable[[Any], Any], Any]], rounds: int
) -> Rows:
  """Times functions of a carried state; each is called once a round."""
  carried = {name: carry for name, (_, carry) in steps.items()}
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for i in range(_WARM_UP + rounds):
    for name, (step, _) in steps.items():
      start = time.perf_counter()
      carried[name] = jax.block_until_ready(step(carried[name]))
      if i >= _WARM_UP:
        seconds[name].append(time.perf_counter() - start)
  median = {name: np.median(each) for name, each in seconds.items()}
  alone, first = next(iter(median.items()))
  ratios = {name: {"": f"{each / first:.2f}"} for name, each in median.items()}
  return ratios | {alone: {"": f"1 ({first * 1e3:.3g} ms)"}}


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
  before = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
