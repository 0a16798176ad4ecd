r"""What bad gradients cost: the loss with them over the one without.

  python -m train.faults.gradients [--config=configs/digits.py:mlp] [--seeds=3]
      [--num_steps=400] [--method="LABEL: FIELD=VALUE ..."] ... [--chance]

--config=FILE    the job
--seeds=N        runs of each kind, of which the median and the worst count
--num_steps=N    of a run
--method=METHOD  in place of those in configs/faults.py: NAME of an optimizer,
                 or LABEL and fields of the job; may be given several times
--chance         no bad gradients: in each row one of another step is 1.01 times
                 as large

prints two tables, with --config.guard=False and with the guard: a row for each
kind of bad gradients, a column for each method, median/worst (gradients that
were skipped), and how many medians are above 1.5, those of the last rows aside,
whose gradients change for good. The first row is one of --chance.
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

import flax_mechanic
from configs import faults
from train import flags
from train import job as job_lib
from train import mesh as mesh_lib
from train.sweep.runs import make_tasks, stacked
from train.tables import format_table

# Factors of the gradient, [steps, leaves].
Factors = np.ndarray

# What kinds that are no fault but another size are called.
_LASTING = "from half way on"


def main(argv: Sequence[str] | None = None) -> None:
  """Runs and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="configs/digits.py:mlp")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--num_steps", type=int, default=400)
  parser.add_argument("--method", action="append")
  parser.add_argument("--chance", action="store_true")
  arguments = parser.parse_args(argv)
  config = flags.load_config(arguments.config)
  config.num_steps = arguments.num_steps
  for guard in (False, True):
    columns = {}
    for method in arguments.method or faults.get_config().methods:
      label, colon, text = method.partition(":")
      fields = shlex.split(text) if colon else [f"optimizer={label}"]
      job = config.copy_and_resolve_references()
      named = [each.partition("=")[::2] for each in fields]
      flags.override(job, [(f"config.{name}", value) for name, value in named])
      job.guard = guard
      columns[label] = measure(job, arguments.seeds, arguments.chance)
    print(f"{'with' if guard else 'without'} the guard:\n")
    print(format_table(list(_rows(columns))), end="\n\n")
    medians = [
      np.median(cost.ratios)
      for costs in columns.values()
      for kind, cost in costs.items()
      if _LASTING not in kind
    ]
    above = sum(median > 1.5 for median in medians)
    print(f"{above} of {len(medians)} medians above 1.5\n", flush=True)


class Cost(NamedTuple):
  """What a kind of bad gradients costs.

  Attributes:
    ratios: final training loss over that without them, by seed; infinite where
      it is not finite.
    skipped: gradients that were skipped, at most.
  """

  ratios: np.ndarray
  skipped: int


def measure(
  config: ConfigDict, seeds: int, chance: bool = False
) -> Mapping[str, Cost]:
  """Trains with each kind of bad gradients, on one device.

  Args:
    config: the job.
    seeds: how many.
    chance: whether the kinds are those of --chance.

  Returns:
    Kind -> what it costs.
  """
  tasks = make_tasks(config, seeds)
  tx = flax_mechanic.make_optimizer(config, job_lib.make_schedule(config))
  functions = lambda factors: job_lib.Functions(
    tasks[0], config, _multiplied(tx, factors)
  )
  steps = range(config.num_steps)
  batches = [stacked(task.train_batch(i) for i in steps) for task in tasks]

  def run(factors: jax.Array, seed: jax.Array, batches: Any) -> Any:
    of_run = functions(factors)
    state, metrics = jax.lax.scan(
      of_run.train_step, of_run.create(seed), batches
    )
    losses = jax.lax.map(
      lambda batch: of_run.eval_step(state, batch)["eval/loss"],
      jax.tree.map(lambda leaf: leaf[:: len(steps) // 20 or 1], batches),
    )
    return jnp.mean(losses), metrics.get("skipped", jnp.zeros(1))[-1]

  with jax.set_mesh(mesh_lib.one_device()):
    abstract = job_lib.Functions(tasks[0], config, tx).abstract
    leaves = len(jax.tree.leaves(nnx.state(abstract["model"], nnx.Param)))
    kinds = dict(_kinds(config.num_steps, leaves, chance))
    compiled = jax.jit(jax.vmap(run, (0, None, None)))
    of_kinds = jnp.asarray(np.stack(list(kinds.values())))
    results = [
      compiled(of_kinds, seed, each) for seed, each in enumerate(batches)
    ]
  losses, skipped = (np.stack(each) for each in zip(*results, strict=True))
  ratios = losses / losses[:, :1]
  ratios = np.where(np.isfinite(ratios), ratios, np.inf)
  found = {
    kind: Cost(ratios[:, i], int(skipped[:, i].max()))
    for i, kind in enumerate(kinds)
  }
  return {kind: found[kind] for kind in list(kinds)[1:]}


def _kinds(
  steps: int, leaves: int, chance: bool
) -> Iterator[tuple[str, Factors]]:
  """Yields names and factors; the first is that of an undisturbed run."""
  good = np.ones((steps, leaves), np.float32)

  def with_bad(where: Any, value: float, leaf: Any = slice(None)) -> Factors:
    factors = good.copy()
    factors[where, leaf] = value
    return factors

  quarter, half = steps // 4, steps // 2
  every = lambda n: quarter + n * np.arange(min(10, (steps - quarter) // n))
  yield "none", good
  for step in range(5, steps - 40 if chance else 6, 10):
    yield f"1.01, at step {step}", with_bad(step - 1, 1.01)
  if chance:
    return
  for value in (1e2, 1e3, 1e4, 1e6, 1e9, 1e30, np.inf, np.nan):
    yield f"{value:g}, ten of them", with_bad(every(10), value)
  for value in (1e2, 1e6):
    for n in (2, 5, 50):
      yield f"{value:g}, every {n} steps", with_bad(every(n), value)
    for n in (3, 20):
      yield (
        f"{value:g}, {n} in a row",
        with_bad(np.arange(half, half + n), value),
      )
    for leaf in range(min(leaves, 4)):
      yield f"{value:g}, leaf {leaf} alone", with_bad(every(10), value, leaf)
    for step in (1, 2, 5):
      yield f"{value:g}, at step {step}", with_bad(step - 1, value)
  yield "nan, at step 1", with_bad(0, np.nan)
  yield "1e+09, at step 1", with_bad(0, 1e9)
  yield "0, the first 20", with_bad(np.arange(20), 0.0)
  for value in (1e4, 1e-4):
    yield (
      f"{value:g}, {_LASTING}",
      with_bad(np.arange(half, steps), value),
    )


class _MultipliedState(NamedTuple):
  """State of `_multiplied`: the wrapped one's, and the step."""

  inner_state: optax.OptState
  step: jax.Array


def _multiplied(
  tx: optax.GradientTransformation, factors: jax.Array
) -> optax.GradientTransformationExtraArgs:
  """Multiplies each step's gradients, leaf by leaf, on their way to `tx`."""
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return _MultipliedState(tx.init(params), jnp.zeros([], jnp.int32))

  def update(updates, state, params=None, **extra_args):
    leaves, treedef = jax.tree.flatten(updates)
    updates = treedef.unflatten(
      (g * factor).astype(g.dtype)
      for g, factor in zip(leaves, factors[state.step], strict=True)
    )
    updates, inner_state = tx.update(
      updates, state.inner_state, params, **extra_args
    )
    return updates, _MultipliedState(inner_state, state.step + 1)

  return optax.GradientTransformationExtraArgs(init, update)


def _rows(columns: Mapping[str, Mapping[str, Cost]]) -> Iterator[list[str]]:
  """Yields the head and the rows of a table."""
  yield ["the gradient times", *columns]
  for kind in next(iter(columns.values())):
    costs = [costs[kind] for costs in columns.values()]
    yield [
      kind,
      *(
        f"{np.median(cost.ratios):.3g}/{np.max(cost.ratios):.3g}"
        f" ({cost.skipped})"
        for cost in costs
      ),
    ]


if __name__ == "__main__":
  main()
