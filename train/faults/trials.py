"""One trial: a job, a fault, and whether the job comes through it."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs import faults
from train.faults import damage as damage_lib
from train.faults import interruptions, judge
from train.faults.damage import Damage
from train.faults.interruptions import Interruption, Size
from train.faults.jobs import STEPS, Job, Numbers
from train.faults.judge import Verdict
from train.faults.runs import verify

INTERRUPTIONS: Mapping[str, Interruption] = {
  "kill": interruptions.kill,
  "kill_in_save": interruptions.kill_in_save,
  "kill_at_a_write": interruptions.kill_at_a_write,
  "sigterm": interruptions.terminate,
  "ctrl_c": interruptions.interrupt,
  "file_limit": interruptions.limit_files,
  "full_disk": interruptions.fill_disk,
  "lost_process": interruptions.lose_a_process,
}
DAMAGE: Mapping[str, Damage] = {
  "flip": damage_lib.flip,
  "cut": damage_lib.cut,
  "swap": damage_lib.swap,
  "renumber": damage_lib.renumber,
  "tamper": damage_lib.tamper,
  "tamper_json": damage_lib.tamper_json,
  "damage_all": damage_lib.damage_all,
  "add": damage_lib.add,
  "spoil_files": damage_lib.spoil_files,
}
KINDS = (*INTERRUPTIONS, *DAMAGE)
_OF_TWO = "lost_process"


class Trial(NamedTuple):
  """A trial.

  Attributes:
    seed: of the campaign.
    number: of the trial; with the seed it decides everything but the timing.
    kind: of fault.
  """

  seed: int
  number: int
  kind: str

  def draw(self) -> tuple[np.random.Generator, str]:
    """Returns a generator of random numbers, and the job."""
    rng = np.random.default_rng([self.seed, self.number])
    config = faults.get_config()
    jobs = config.jobs_of_two if self.kind == _OF_TWO else config.jobs
    return rng, jobs[rng.integers(len(jobs))]

  @property
  def processes(self) -> int:
    """How many run the job."""
    return 2 if self.kind == _OF_TWO else 1


class Reference(NamedTuple):
  """An undisturbed run."""

  job: Job
  size: Size
  numbers: Numbers


def plan(
  kinds: Sequence[str], seed: int, numbers: Sequence[int]
) -> list[Trial]:
  """Returns trials, few of those with several processes, which are slow."""
  cycle = [kind for kind in kinds if kind != _OF_TWO] * 3
  cycle += [_OF_TWO] * (_OF_TWO in kinds)
  cycle = np.random.default_rng(seed).permutation(cycle).tolist()
  return [Trial(seed, number, cycle[number % len(cycle)]) for number in numbers]


def make_reference(
  folder: Path, text: str, processes: int, bucket: Path | None = None
) -> Reference:
  """Runs a job undisturbed, in a folder or a bucket."""
  # The second run has its programs in the compilation cache.
  for _ in range(2):
    parent = Path(tempfile.mkdtemp(dir=bucket or folder))
    job = Job(text, processes, parent / "run", bucket)
    size, ends = interruptions.measure(job)
    if problem := judge.of_ends(ends, {0}):
      raise RuntimeError(f"{text}, undisturbed: {problem}")
  return Reference(job, size, job.numbers())


def run_trial(trial: Trial, reference: Reference) -> tuple[str, Verdict]:
  """Returns what was done, and what came of it."""
  rng, _ = trial.draw()
  with tempfile.TemporaryDirectory(dir=reference.job.bucket) as folder:
    job = reference.job._replace(workdir=Path(folder) / "run")
    if trial.kind in INTERRUPTIONS:
      return _interrupted(INTERRUPTIONS[trial.kind], job, reference, rng)
    return _damaged(DAMAGE[trial.kind], job, reference, rng)


def _interrupted(
  interruption: Interruption,
  job: Job,
  reference: Reference,
  rng: np.random.Generator,
) -> tuple[str, Verdict]:
  what, ends, statuses = interruption(job, reference.size, rng)
  if problem := judge.of_ends(ends, statuses):
    return what, problem
  again = job.run()
  if problem := judge.of_ends(again, {0}):
    return what, problem._replace(why=f"again: {problem.why}")
  said = "".join(f"{each.output}{each.error}" for each in again)
  if "damage" in said:
    return what, Verdict("other", f"no step was damaged: {said}")
  intact = verify(job.address)
  if intact.status != 0:
    return what, Verdict("other", f"{intact.output}{intact.error}")
  return what, judge.of_numbers(job, reference.numbers)


def _damaged(
  damage: Damage,
  job: Job,
  reference: Reference,
  rng: np.random.Generator,
) -> tuple[str, Verdict]:
  shutil.copytree(reference.job.workdir, job.workdir)
  # As if it had been killed before the last save.
  shutil.rmtree(job.checkpoints / str(STEPS))
  what = damage(job.checkpoints, rng)
  before = judge.files(job.checkpoints)
  (ended,) = job.run()
  if problem := judge.of_damage(job, before, ended):
    return what, problem
  first = judge.resumed_at(ended) if damage is damage_lib.spoil_files else 0
  return what, judge.of_numbers(job, reference.numbers, first)
