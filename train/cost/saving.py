r"""What saving in the background costs the loop.

  python -m train.cost.saving [PAIRS]

trains the text job, on all devices, in turns of ten steps. One turn begins with
a save, which goes on in the background and has ended when the turn has; the
next one has none. It prints medians, of 20 pairs of turns by default.

step     ms, without a save
waiting  ms until save returns
save     ms by which the turn with a save is longer
cost     the same, as a part of the steps between two checkpoints of the job
"""

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

import flax_mechanic
from configs import text
from train import prefetch
from train.job import make_job
from train.tables import format_table

_PAIRS = 20
_STEPS = 10


def main(arguments: list[str]) -> None:
  """Measures and prints the table."""
  pairs = int(arguments[0]) if arguments else _PAIRS
  # The first pair compiles.
  _, *turns = itertools.islice(_turns(), 1 + pairs)
  with_save, without, waiting = 1000 * np.array(turns).T
  step = np.median(without) / _STEPS
  save = np.median(with_save - without)
  cost = save / (step * text.get_config().checkpoint_every)
  row = [f"{step:.1f}", f"{np.median(waiting):.0f}", f"{save:.0f}"]
  head = ["step", "waiting", "save", "cost"]
  print(format_table([head, [*row, f"{cost:.1%}"]]))


def _turns() -> Iterator[tuple[float, float, float]]:
  """Yields the seconds of a turn with a save, of one without, and waiting."""
  config = text.get_config()
  config.optimizer = "mechanic"
  job = make_job(config)
  with (
    jax.set_mesh(job.mesh),
    tempfile.TemporaryDirectory() as folder,
    flax_mechanic.Checkpointer(folder) as checkpointer,
    contextlib.closing(
      prefetch.ahead(job.train_batch, itertools.count())
    ) as batches,
  ):
    state = job.create()
    for pair in itertools.count(1):
      seconds, waiting = {}, 0.0
      for saves in (True, False):
        jax.block_until_ready(state)
        begun = time.perf_counter()
        if saves:
          checkpointer.save(pair, state, config=config)
          waiting = time.perf_counter() - begun
        for batch in itertools.islice(batches, _STEPS):
          state, _ = job.train_step(state, batch)
        jax.block_until_ready(state)
        checkpointer.wait()
        seconds[saves] = time.perf_counter() - begun
      yield seconds[True], seconds[False], waiting


if __name__ == "__main__":
  main(sys.argv[1:])
