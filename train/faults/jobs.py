"""The jobs that are disturbed, and their numbers when nothing disturbs them."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax_mechanic.checkpoints import record
from train.faults.bucket import NAME
from train.faults.runs import Ended, Run
from train.processes import free_port

STEPS = 40
EVERY = 5
KEPT = 4

_ROOT = Path(__file__).parents[2]


class Numbers(NamedTuple):
  """What two runs have in common if one computed the same as the other.

  Attributes:
    metrics: every line of metrics.jsonl, without times.
    checksums: path -> checksum of the arrays of the last checkpoint.
  """

  metrics: Sequence[Mapping[str, Any]]
  checksums: Mapping[str, str]


class Job(NamedTuple):
  """A job, and where it runs.

  Attributes:
    text: a config file and fields.
    processes: how many run it.
    workdir: its directory.
    bucket: the folder of an emulated bucket that the directory is in, if any.
    steps: how many it takes.
  """

  text: str
  processes: int
  workdir: Path
  bucket: Path | None = None
  steps: int = STEPS

  @property
  def address(self) -> str:
    """What names its directory on a command line."""
    if self.bucket is None:
      return str(self.workdir)
    return f"gs://{NAME}/{self.workdir.relative_to(self.bucket)}"

  @property
  def checkpoints(self) -> Path:
    """The folder of its steps."""
    return self.workdir / "checkpoints"

  def arguments(self) -> Sequence[str]:
    """Returns the command line of a lone process."""
    file, *fields = shlex.split(self.text)
    common = [
      f"num_steps={self.steps}",
      f"checkpoint_every={EVERY}",
      "log_every=1",
      "eval_every=20",
      f"checkpoint_keep={KEPT}",
      "schedule.warmup_steps=4",
    ]
    return [
      f"--config={_ROOT / file}",
      f"--workdir={self.address}",
      *(f"--config.{field}" for field in [*common, *fields]),
    ]

  def start(self, **options: Any) -> Sequence[Run]:
    """Starts its processes; the options are those of `Run`."""
    if self.processes == 1:
      return [Run(self.arguments(), **options)]
    port = free_port()
    return [
      Run(
        [
          *self.arguments(),
          f"--coordinator=localhost:{port}",
          f"--num_processes={self.processes}",
          f"--process_id={i}",
        ],
        **options,
      )
      for i in range(self.processes)
    ]

  def run(self, **options: Any) -> Sequence[Ended]:
    """Runs its processes until they end."""
    return [each.end() for each in self.start(**options)]

  def is_saving(self, step: int) -> bool:
    """Whether a step is being saved, as a command of `train` would find it."""
    if self.bucket is None:
      return any(self.checkpoints.glob(f"{step}.orbax-checkpoint-tmp*"))
    return (self.checkpoints / str(step)).exists()

  def metrics(self) -> str:
    """Returns its metrics.jsonl; raises FileNotFoundError if there is none."""
    if self.bucket is None:
      return (self.workdir / "metrics.jsonl").read_text()
    names = sorted(self.workdir.glob("metrics.jsonl.*"))
    newest = names[-1].name.partition("-")[0] if names else ""
    return "".join(
      each.read_text() for each in names if each.name.startswith(newest)
    )

  def numbers(self) -> Numbers:
    """Returns what it has computed; raises OSError or ValueError if nothing."""
    lines = self.metrics().splitlines()
    file = self.checkpoints / str(self.steps) / "record" / "metadata"
    arrays = record.unseal(json.loads(file.read_text()))["arrays"]
    return Numbers(
      [
        {k: v for k, v in json.loads(line).items() if k != "steps_per_second"}
        for line in lines
      ],
      {path: each["checksum"] for path, each in arrays.items()},
    )
