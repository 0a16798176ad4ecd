"""Which steps a run keeps; of the others it deletes only its own."""

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_mechanic.checkpoints import record as record_lib
from flax_mechanic.checkpoints.storage import Bucket, Folder


class Retention(preservation_policy.PreservationPolicy):
  """Tells Orbax which steps to keep.

  Orbax's own policies forget the metrics of steps that an earlier process
  saved (0.12.8), and with them which one is the best.

  Orbax deletes file by file, so a kill can leave a part of a step. What is to
  be deleted is noted in a file, and the next run finishes it.
  """

  def __init__(
    self, place: Folder | Bucket, keep: int, keep_every: int, best: str
  ):
    """Prepares to decide.

    Args:
      place: step N is saved in its subfolder N.
      keep: as in `Checkpointer`, and so are the other arguments.
      keep_every: as there.
      best: as there.
    """
    self._place, self._directory = place, place.path
    self._note = self._directory / ".deleting"
    self._keep, self._keep_every = keep, keep_every
    self._best = best.removeprefix("-")
    self._sign = 1 if best.startswith("-") else -1
    self._metrics: dict[int, Mapping[str, float]] = {}

  def saving(self, step: int, metrics: Mapping[str, float]) -> None:
    """Notes that a step is being saved."""
    self._metrics[step] = metrics

  def is_best(self, metrics: Mapping[str, float], steps: Iterable[int]) -> bool:
    """Whether metrics are better than those of every step saved so far.

    Args:
      metrics: of a step that is not saved.
      steps: those that are there.
    """
    value = self._value(metrics)
    if math.isnan(value):
      return False
    for step in steps:
      self._is_own(step)  # Reads its metrics, if an earlier run saved it.
    known = [*self._metrics.values()]  # Orbax's threads may add to them.
    return not any(value <= self._value(each) for each in known)

  def should_preserve(
    self,
    checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo],
    *,
    context: preservation_policy.PreservationContext,
  ) -> Sequence[bool]:
    """Returns, for each step, whether to keep it."""
    steps = [each.step for each in checkpoints]
    own = [step for step in sorted(steps) if self._is_own(step)]
    kept = self._kept(own)
    deleted = [step for step in own if step not in kept]
    if deleted and jax.process_index() == 0:
      note = {"saved": own[-1], "deleted": deleted}
      self._note.write_text(json.dumps(note))
    return [step not in own or step in kept for step in steps]

  def deleted(self) -> None:
    """Notes that what was to be deleted has been."""
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self._note.unlink()

  def finish(self) -> None:
    """Deletes what a run that was killed has left of steps it was deleting."""
    with contextlib.suppress(OSError):
      for step in self.deleting():
        self._place.delete(step)
    self.deleted()

  def deleting(self) -> Sequence[int]:
    """Returns the steps that a run is deleting, or was when it was killed."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
      match json.loads(self._note.read_text()):
        case {"saved": int(saved), "deleted": [*deleted]}:
          # Nothing is deleted before the new step is whole.
          if (self._directory / str(saved)).is_dir():
            return [step for step in deleted if isinstance(step, int)]
    return []

  def _kept(self, own: Sequence[int]) -> Collection[int]:
    kept = {*own[-self._keep :]}
    if self._keep_every:
      kept |= {step for step in own if step % self._keep_every == 0}
    values = {step: self._value(self._metrics[step]) for step in own}
    values = {step: v for step, v in values.items() if not math.isnan(v)}
    if values:
      kept.add(max(values, key=lambda step: (values[step], step)))
    return kept

  def _value(self, metrics: Mapping[str, float]) -> float:
    """Returns what is to be large, NaN if it was not measured."""
    return self._sign * metrics.get(self._best, math.nan)

  def _is_own(self, step: int) -> bool:
    """Whether a folder is what a Checkpointer saved as that step."""
    if step not in self._metrics:
      file = self._directory / str(step) / "record" / "metadata"
      try:
        record = record_lib.unseal(json.loads(file.read_text()))
      except (OSError, ValueError, RecursionError):
        return False
      if record["step"] != step:
        return False
      self._metrics[step] = record["metrics"]
    return True
