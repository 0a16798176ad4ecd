r"""What the update costs, side by side: the base, optax's mechanize and ours.

  python -m train.benchmark [--base=adamw] [--rounds=30] [--quick]

prints one row an update. Times are medians of rounds that take turns in one
process, over the base's; bytes are what the compiled, donated program of a step
after the first reads and writes, in float32 copies of the parameters, and
temporaries likewise. --base=sgd or --base=lion measures over another base,
--quick smaller trees. With the extra `[tpu]` the same is compiled for a TPU
v5e that is not there.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax import contrib

import flax_mechanic
from configs import digits, text
from flax_mechanic.checkpoints.checksum import checksums
from train.cost import facts
from train.job import Job, make_job
from train.tables import format_table

# The leaves of a transformer's block, over and over.
_BLOCK = [(256, 256), (512, 128), (128,), (64, 512), (1024, 64), (256,)]
_JOBS = {"digits": digits, "text": text}

Rows = Mapping[str, Mapping[str, str]]


def main(argv: list[str] | None = None) -> None:
  """Measures and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--base", choices=facts.BASES, default="adamw")
  parser.add_argument("--rounds", type=int, default=30)
  parser.add_argument("--quick", action="store_true")
  arguments = parser.parse_args(argv)
  base, rounds = arguments.base, arguments.rounds
  leaves = (10,) if arguments.quick else (10, 148, 500)

  device = jax.devices()[0]
  print(f"over {base}, on {device.device_kind} ({device.platform})\n")
  _print_table(
    "update time over the base's, by number of leaves",
    {str(n): functools.partial(_time_updates, base, n, rounds) for n in leaves},
  )
  _print_table(
    "time of a whole training step over the base's",
    {
      name: functools.partial(_time_jobs, base, name, max(rounds // 2, 5))
      for name in _JOBS
    },
  )
  _print_table(
    f"compiled for {device.platform}, {leaves[-1]} leaves, in copies",
    {"": functools.partial(_compile_here, base, leaves[-1])},
  )
  _print_table(
    "on 8 devices of a CPU, leaves of four placements, by Optimizer",
    {"": functools.partial(_compile_elsewhere, base)},
  )
  megabytes = 50 if arguments.quick else 500
  print(f"verifying a checkpoint of {megabytes} MB:\n")
  print(format_table(_time_checkpoint(megabytes)), flush=True)


def _print_table(title: str, columns: Mapping[str, Callable[[], Rows]]) -> None:
  """Prints a table whose columns are measured one after the other."""
  cells: dict[str, list[str]] = {name: [name] for name in facts.UPDATES}
  head = ["update"]
  for label, measure in columns.items():
    rows = measure()
    names = list(next(iter(rows.values())))
    head += [f"{label} {name}".strip() for name in names]
    for name, row in rows.items():
      cells[name] += [row.get(column, "") for column in names]
  print(f"{title}:\n")
  print(format_table([head, *cells.values()]), end="\n\n", flush=True)


def _make_params(leaves: int) -> dict[str, jax.Array]:
  return {f"p{i:03}": jnp.ones(_BLOCK[i % len(_BLOCK)]) for i in range(leaves)}


def _time_updates(base: str, leaves: int, rounds: int) -> Rows:
  params = _make_params(leaves)
  grads = jax.tree.map(lambda x: 0.01 * x, params)
  steps = {}
  for name, update in facts.UPDATES.items():
    tx = update.make(facts.BASES[base](1e-3))
    create = jax.jit(lambda x, tx=tx: jax.tree.map(jnp.copy, (tx.init(x), x)))
    step = jax.jit(facts.update_step(tx), donate_argnums=(1, 2))
    steps[name] = (
      lambda carry, step=step: step(grads, *carry),
      create(params),
    )
  return _take_turns(steps, rounds)


def _time_jobs(base: str, job: str, rounds: int) -> Rows:
  steps = {}
  for name, update in facts.UPDATES.items():
    config = _JOBS[job].get_config()
    config.optimizer = config.opt.mechanic.base = base
    config.mesh.data = 1
    tx = None
    if name == "optax mechanize":
      tx = contrib.mechanize(flax_mechanic.make_optimizer(config))
    elif update.options is not None:
      config.optimizer = "mechanic"
      config.opt.mechanic.update(update.options)
    this = make_job(config, jax.devices()[:1], tx)
    with jax.set_mesh(this.mesh):
      steps[name] = (functools.partial(_run, this), this.create())
  return _take_turns(steps, rounds)


def _run(job: Job, state: nnx.State) -> nnx.State:
  with jax.set_mesh(job.mesh):
    return job.train_step(state, job.train_batch(0))[0]


def _take_turns(
  steps: Mapping[str, tuple[Callable[[Any], Any], Any]], rounds: int
) -> Rows:
  """Times functions of a carried state, one call each a round."""
  carried = {name: carry for name, (_, carry) in steps.items()}
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for i in range(rounds + 3):
    for name, (step, _) in steps.items():
      start = time.perf_counter()
      carried[name] = jax.block_until_ready(step(carried[name]))
      if i >= 3:  # Compiled, and past the first steps.
        seconds[name].append(time.perf_counter() - start)
  first = np.median(seconds["base alone"])
  return {
    name: {"": f"{np.median(values) / first:.2f}"}
    for name, values in seconds.items()
  } | {"base alone": {"": f"1 ({first * 1e3:.3g} ms)"}}


def _compile_here(base: str, leaves: int) -> Rows:
  shapes = [_BLOCK[i % len(_BLOCK)] for i in range(leaves)]
  rows = {}
  for name, update in facts.UPDATES.items():
    found = facts.compile_update(update.make(facts.BASES[base](1.0)), shapes)
    rows[name] = {
      "bytes": f"{found.accessed:.1f}",
      "temporaries": f"{found.temporary:.2f}",
      "held": f"{found.aliased:.1f}",
    }
  return rows


def _time_checkpoint(megabytes: int) -> list[list[str]]:
  """Times saves and restores, and of them what the checksums take."""
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
  return [["", "seconds", "of it checksums"]] + [
    [name, f"{median[name]:.2f}", f"{median['sums'] / median[name]:.1%}"]
    for name in ("save", "restore")
  ]


def _compile_elsewhere(base: str) -> Rows:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
  }
  output = subprocess.run(
    [sys.executable, "-m", "train.cost.facts", base],
    env=environment,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  rows = {}
  for name, found in json.loads(output.splitlines()[-1]).items():
    unavoidable = facts.BASE_COPIES[base] + facts.UPDATES[name].unavoidable
    auto = found["Auto"]
    rows[name] = {
      "all-reduces": str(auto["collectives"]["all-reduce"]),
      "all-gathers": str(auto["collectives"]["all-gather"]),
      "temporaries": f"{auto['temporary']:.2f}",
      "unavoidable bytes": f"{unavoidable:.1f}",
    }
    for shapes in ("one", "six"):
      if shapes in found:
        bytes_, hbm = (
          found[shapes + kind]["accessed"] for kind in ("", " HBM")
        )
        rows[name][f"v5e {shapes}"] = f"{bytes_:.1f}"
        rows[name][f"v5e {shapes} HBM"] = f"{hbm:.1f}"
        rows[name][f"v5e {shapes} ratio"] = f"{hbm / unavoidable:.2f}"
  return rows


if __name__ == "__main__":
  main()
