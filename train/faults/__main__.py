r"""What a run survives: kills, signals, full disks, damaged checkpoints.

  python -m train.faults [--trials=500] [--seed=0] [--kinds=KIND,...]
      [--trial=N ...] [--jobs=2] [--bucket]

--trials=N       how many
--seed=N         of what is drawn at random
--kinds=KIND,... the kinds of faults, by default all
--trial=N        this one alone; may be given several times, and with the same
                 --kinds as before
--jobs=N         trials at a time
--bucket         the jobs run in an emulated bucket; for kill and kill_in_save

A trial takes a small job of some task and method, does something to it, and
then gives the same command again. It prints a table of what came of them:

same numbers  the run ended, or was resumed, with the metrics and checkpoint of
              an undisturbed run, bit for bit; what was damaged was said
one sentence  the run would not start, said why, and has changed nothing
hang, traceback, silent (other numbers, or damage without a word), other
              failures, which are listed; the exit status is then 1

Kinds: {kinds}.
full_disk needs the right to mount a tmpfs, and is left out without it.
"""

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jax

from configs import default  # noqa: F401  # Forked runs have it then.
from flax_mechanic.checkpoints import lock
from train import loop  # noqa: F401
from train.faults import interruptions, judge, trials
from train.faults.bucket import emulator
from train.faults.judge import Verdict
from train.faults.runs import FORK
from train.faults.trials import KINDS, Trial
from train.tables import format_table

_IN_BUCKET = {"kill", "kill_in_save"}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the trials, prints the table and returns the exit status."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or "").format(kinds=", ".join(KINDS)),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--trials", type=int, default=500)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kinds", type=_kinds, default=KINDS)
  parser.add_argument("--trial", type=int, action="append")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--bucket", action="store_true")
  arguments = parser.parse_args(argv)
  if arguments.bucket and not {*arguments.kinds} <= _IN_BUCKET:
    parser.error(f"--bucket needs --kinds of {', '.join(sorted(_IN_BUCKET))}")
  kinds = list(arguments.kinds)
  if "full_disk" in kinds and not interruptions.can_mount():
    print("full_disk is left out: no tmpfs can be mounted here")
    kinds.remove("full_disk")
  numbers = arguments.trial or range(arguments.trials)
  counts: Counter[tuple[str, str]] = Counter()
  failures = []
  start = time.monotonic()
  for trial, what, verdict in _run(
    trials.plan(kinds, arguments.seed, numbers),
    arguments.jobs,
    arguments.bucket,
  ):
    counts[trial.kind, verdict.outcome] += 1
    if verdict.outcome not in judge.GOOD:
      failures.append((trial, what, verdict))
    done = counts.total()
    if verdict.outcome not in judge.GOOD or arguments.trial:
      print(_line(trial, what, verdict, arguments.kinds), flush=True)
    elif done % 50 == 0:
      seconds = time.monotonic() - start
      print(f"{done} trials in {seconds:.0f} s", flush=True)
  print(f"\n{format_table(list(_rows(kinds, counts)))}\n")
  for failure in failures:
    print(_line(*failure, arguments.kinds))
  return 1 if failures else 0


def _run(
  planned: Sequence[Trial], jobs: int, in_bucket: bool
) -> Iterator[tuple[Trial, str, Verdict]]:
  """Yields trials as they end, with what was done and what came of it."""
  with (
    tempfile.TemporaryDirectory() as folder,
    _bucket(Path(folder), in_bucket) as bucket,
    ProcessPoolExecutor(
      jobs, FORK, initializer=_configure, initargs=(folder,)
    ) as pool,
  ):
    references = {
      (text, processes): pool.submit(
        trials.make_reference, Path(folder), text, processes, bucket
      )
      for text, processes in dict.fromkeys(
        (trial.draw()[1], trial.processes) for trial in planned
      )
    }
    found = {
      pool.submit(
        trials.run_trial,
        trial,
        references[trial.draw()[1], trial.processes].result(),
      ): trial
      for trial in planned
    }
    for future in as_completed(found):
      yield found[future], *future.result()


@contextlib.contextmanager
def _bucket(folder: Path, wished: bool) -> Iterator[Path | None]:
  """Emulates a bucket for the runs to come; yields the folder of its objects.

  The lock of a run that was killed lapses sooner there.
  """
  if not wished:
    yield None
    return
  with emulator(folder / "bucket") as bucket:
    os.environ.update(bucket.environment)
    lock.LEASE = 4.0
    yield bucket.folder


def _configure(folder: str) -> None:
  """Imports what runs will need, and has them share a compilation cache."""
  with contextlib.suppress(ImportError):
    importlib.import_module("tensorboardX.summary")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 1)
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  jax.config.update(
    "jax_compilation_cache_dir", cache or os.path.join(folder, "jax")
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _kinds(text: str) -> Sequence[str]:
  kinds = text.split(",")
  for kind in kinds:
    if kind not in KINDS:
      raise argparse.ArgumentTypeError(
        f"{kind!r} is none of {', '.join(KINDS)}"
      )
  return kinds


def _line(
  trial: Trial, what: str, verdict: Verdict, kinds: Sequence[str]
) -> str:
  _, job = trial.draw()
  some = "" if kinds == KINDS else f" --kinds={','.join(kinds)}"
  return (
    f"python -m train.faults --seed={trial.seed}{some} --trial={trial.number}\n"
    f"  {trial.kind} of {job}: {what}\n"
    f"  {verdict.outcome}: {verdict.why.strip()}"
  )


def _rows(
  kinds: Sequence[str], counts: Counter[tuple[str, str]]
) -> Iterator[list[str]]:
  """Yields the head and the rows of the table."""
  yield ["kind", "trials", *judge.OUTCOMES]
  for kind in kinds:
    row = [counts[kind, outcome] for outcome in judge.OUTCOMES]
    yield [kind, *map(str, [sum(row), *row])]
  row = [
    sum(counts[kind, outcome] for kind in kinds) for outcome in judge.OUTCOMES
  ]
  yield ["all", *map(str, [sum(row), *row])]


if __name__ == "__main__":
  sys.exit(main())
