"""Whether a run has come through what was done to it."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from train.faults.jobs import Job, Numbers
from train.faults.runs import Ended

Outcome = Literal[
  "same numbers", "one sentence", "hang", "traceback", "silent", "other"
]
OUTCOMES: Sequence[Outcome] = get_args(Outcome)
GOOD: Sequence[Outcome] = ("same numbers", "one sentence")

# Of standard error, where damage is told too.
_LINES = 5


class Verdict(NamedTuple):
  """What a trial has shown, and why."""

  outcome: Outcome
  why: str = ""


# Relative path -> hash of the content.
Files = Mapping[str, str]


def files(folder: Path) -> Files:
  """Returns what a folder holds, but for what an unfinished save has left."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.rglob("*")
    if path.is_file() and ".orbax-checkpoint-tmp" not in str(path)
  }


def of_ends(
  ends: Iterable[Ended], statuses: AbstractSet[int]
) -> Verdict | None:
  """Returns what is wrong with how processes ended; None if nothing is."""
  for status, output, error in ends:
    if status is None:
      return Verdict("hang", f"after {error or output}")
    if "Traceback" in output + error:
      return Verdict("traceback", error)
    if status not in statuses:
      return Verdict("other", f"exit status {status}: {error}")
    if error.count("\n") > _LINES:
      return Verdict("other", f"{error.count(chr(10))} lines: {error}")
    if status in (2, 75) and error.count("error: ") != 1:
      return Verdict("silent", f"exit status {status}: {error}")
    # Of several processes only the first one prints anything of its own.
    own = re.sub(r"^\[Gloo\].*\n", "", output, flags=re.M)
    told = not own or re.search(r"^(done|stopped) at step", own, re.M)
    if status == 0 and not told:
      return Verdict("silent", f"exit status 0: {output}")
  return None


def of_numbers(job: Job, wanted: Numbers, first: int = 0) -> Verdict:
  """Compares what a run has computed, from a step on."""
  try:
    found = job.numbers()
  except (OSError, ValueError) as error:
    return Verdict("silent", str(error))
  later = lambda numbers: [
    line for line in numbers.metrics if line["step"] > first
  ]
  if later(found) != later(wanted):
    return Verdict("silent", "other metrics")
  if found.checksums != wanted.checksums:
    return Verdict("silent", "other arrays in the last checkpoint")
  return Verdict("same numbers")


def of_damage(job: Job, before: Files, ended: Ended) -> Verdict | None:
  """Judges how a run has met damaged checkpoints.

  Args:
    job: the job.
    before: the damaged checkpoints, before it started.
    ended: how it ended.

  Returns:
    What is wrong, or "one sentence" if it would not start; else None.
  """
  if problem := of_ends([ended], {0, 2}):
    return problem
  after = files(job.checkpoints)
  if ended.status == 2:
    if lost := before.items() - after.items():
      return Verdict("other", f"an error, and lost: {sorted(lost)[:3]}")
    return Verdict("one sentence", ended.error)
  resumed = resumed_at(ended)
  said = ended.output + ended.error
  for name in {path.partition("/")[0] for path in before}:
    inside = _inside(before, name)
    if not inside:
      continue
    if not name.isdecimal():
      if _inside(after, name) != inside:
        return Verdict("other", f"{name} was changed")
    elif resumed < int(name) < 2**31:
      if not re.search(rf"step {int(name)} in", said):
        return Verdict("silent", f"not a word about step {name}: {said}")
      folders = {path.partition("/")[0] for path in after}
      if not any(_inside(after, folder) == inside for folder in folders):
        return Verdict("other", f"{name} is lost")
  return None


def resumed_at(ended: Ended) -> int:
  """Returns the step at which a run says that it resumed."""
  found = re.search(r"^resuming .* at step (\d+)", ended.output, re.M)
  return int(found[1]) if found else 0


def _inside(everything: Files, folder: str) -> Files:
  return {
    path.removeprefix(f"{folder}/"): content
    for path, content in everything.items()
    if path.startswith(f"{folder}/")
  }
