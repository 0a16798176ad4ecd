r"""What saving in the background costs the loop.

  python -m train.cost.saving [TURNS]

trains the text job in turns of as many steps as its checkpoint_every, on all
devices. Every second turn begins with a save, which goes on in the background;
the others have none. It prints a row for each kind, of 6 turns by default.

waiting  ms until save returns
step     ms of a step, all of its turn's time counted
cost     how much longer a step takes than without
"""

import contextlib
import itertools
import sys
import tempfile
import time

import jax

import flax_mechanic
from configs import text
from train import prefetch
from train.job import make_job
from train.tables import format_table

_TURNS = 6


def main(arguments: list[str]) -> None:
  """Measures and prints the table."""
  turns = 2 * int(arguments[0] if arguments else _TURNS)
  config = text.get_config()
  config.optimizer = "mechanic"
  every = config.checkpoint_every
  job = make_job(config)
  waiting, seconds = 0.0, [0.0, 0.0]
  with (
    jax.set_mesh(job.mesh),
    tempfile.TemporaryDirectory() as folder,
    flax_mechanic.Checkpointer(folder) as checkpointer,
    contextlib.closing(
      prefetch.ahead(job.train_batch, range((2 + turns) * every))
    ) as batches,
  ):
    state = job.create()
    for turn in range(-2, turns):  # The first two compile.
      saves = turn % 2 == 0
      begun = time.perf_counter()
      if saves:
        checkpointer.save(turn + 3, state, config=config)
      saved = time.perf_counter()
      for batch in itertools.islice(batches, every):
        state, _ = job.train_step(state, batch)
      jax.block_until_ready(state)
      if turn >= 0:
        seconds[saves] += time.perf_counter() - begun
        waiting += saved - begun
      checkpointer.wait()
  without, with_saves = (1000 * 2 * each / turns / every for each in seconds)
  print(
    format_table(
      [
        ["", "waiting", "step", "cost"],
        ["no save", "", f"{without:.1f}", ""],
        [
          f"a save every {every} steps",
          f"{2000 * waiting / turns:.0f}",
          f"{with_saves:.1f}",
          f"{with_saves / without - 1:.1%}",
        ],
      ]
    )
  )


if __name__ == "__main__":
  main(sys.argv[1:])
