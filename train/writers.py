"""Where metrics go: a JSON line per call, and TensorBoard's event files.

The interface is that of clu.metric_writers, so that any of clu's writers can
replace these. It is repeated here because clu 0.0.12's module imports
TensorFlow.
"""
# ruff: noqa: D102 - MetricWriter documents every method.

import importlib.util
import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError
from train import files


class MetricWriter:
  """The interface of clu.metric_writers.MetricWriter.

  A subclass overrides what it can write; the rest does nothing. Arrays may be
  jax's or NumPy's.
  """

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers, or arrays of one number."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts; TensorBoard reads them as Markdown."""

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Writes images [N, H, W, C] or [H, W, C], uint8 or floats in [0, 1]."""

  def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
    """Writes videos [N, T, H, W, C] or [T, H, W, C]."""

  def write_audios(
    self, step: int, audios: Mapping[str, Any], *, sample_rate: int
  ) -> None:
    """Writes audio [N, T, C] in [-1, 1], `sample_rate` in hertz."""

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Any],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    """Writes histograms of arrays of any shape."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the hyperparameters, once, as a flat mapping."""

  def write_summaries(
    self,
    step: int,
    values: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes tensors for a custom TensorBoard plugin."""

  def flush(self) -> None:
    """Writes what is buffered to the disk."""

  def close(self) -> None:
    """Flushes, and closes the files."""


class JsonlWriter(MetricWriter):
  """Scalars as JSON, a line per call: {"step": 10, "train/loss": 0.5}.

  NaN and infinities, which JSON cannot express, are null. A line is in the file
  when write_scalars returns, and in a bucket `files.INTERVAL` seconds later, or
  after a flush. Other kinds of summaries are ignored.
  """

  def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
    """Opens the file, and creates its directory.

    Args:
      path: the file.
      resume_step: the step of the restored checkpoint. Later lines, and a line
        that a kill cut short, are dropped atomically, so that the file
        continues as if the run had never stopped. None or 0 restarts the file.
    """
    file = storage.path(path)
    self._file = files.log(file)
    lines = (self._file.read() if resume_step else None) or b""
    kept = [
      line
      for line in lines.splitlines(keepends=True)
      if _step(line) <= (resume_step or 0)
    ]
    self._file.start(b"".join(kept))

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    numbers = {name: float(value) for name, value in scalars.items()}
    line = {"step": int(step)} | {
      name: number if math.isfinite(number) else None
      for name, number in numbers.items()
    }
    self._file.write(json.dumps(line).encode() + b"\n")

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class TensorBoardWriter(MetricWriter):
  """TensorBoard's event files, in tensorboardX's format.

  What is written is in the file when a call returns, and in a bucket as it is
  for `JsonlWriter`. tensorboardX's own writer has a thread instead, whose end,
  on a full disk, would block the run for ever. Images also need Pillow, and
  audio needs soundfile. Videos, which tensorboardX turns into GIFs with
  moviepy, and write_summaries are ignored. For a resumed run, TensorBoard 2.21
  keeps showing the first hyperparameters.
  """

  def __init__(self, logdir: str | os.PathLike, resume_step: int | None = None):
    """Opens a new event file.

    Args:
      logdir: TensorBoard's --logdir.
      resume_step: the step of the restored checkpoint. TensorBoard then hides
        the later steps of earlier files; with None or 0, all their steps.

    Raises:
      UsageError: an earlier event file is a link.
    """
    from tensorboardX import summary

    self._summary: Any = summary
    folder = storage.path(logdir)
    is_bucket = storage.is_bucket(folder)
    for file in () if is_bucket else folder.glob("events.out.tfevents.*"):
      if file.is_symlink():
        raise UsageError(
          f"{file} is a link, which no run of this job makes; delete it, or "
          "take another --workdir"
        )
    # TensorBoard reads the files of a directory in the order of their names.
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
    self._file = files.log(folder / name)
    self._file.start(b"")
    self._write(file_version="brain.Event:2")
    # The first step to hide.
    step = resume_step + 1 if resume_step else 0
    self._write(step=step, session_log={"status": "START"})

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for name, value in scalars.items():
      self._write(step=step, summary=self._summary.scalar(name, float(value)))

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._write(step=step, summary=self._summary.text(name, text))

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    for name, image in images.items():
      batch = np.asarray(image)
      batch = batch if batch.ndim == 4 else batch[None]
      value = self._summary.image(name, batch, dataformats="NHWC")
      self._write(step=step, summary=value)

  def write_audios(
    self, step: int, audios: Mapping[str, Any], *, sample_rate: int
  ) -> None:
    for name, batch in audios.items():
      for i, audio in enumerate(np.asarray(batch)):
        value = self._summary.audio(f"{name}/{i}", audio, sample_rate)
        self._write(step=step, summary=value)

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Any],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    for name, array in arrays.items():
      bins = (num_buckets or {}).get(name, 30)
      self._write(step=step, summary=self._summary.histogram(name, array, bins))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    kinds = (str, bool, int, float)
    known = {
      name: value if isinstance(value, kinds) else str(value)
      for name, value in hparams.items()
    }
    # An experiment's summary would have to list the metrics, which are not yet
    # known. Without one TensorBoard shows every scalar, and first of all the
    # hyperparameters that differ between runs.
    _, start, _ = self._summary.hparams(known, {})
    self._write(summary=start)

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, **fields: Any) -> None:
    """Writes an event as a record: its length and its bytes, with their CRC."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    make_event: Any = vars(event_pb2)["Event"]  # protobuf has no static types
    data = make_event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    self._file.write(
      b"".join(
        part + struct.pack("<I", masked_crc32c(part)) for part in (length, data)
      )
    )


class MultiWriter(MetricWriter):
  """Passes every call to each of several writers, in order."""

  def __init__(self, writers: Sequence[MetricWriter]):
    def to_each(method: str) -> Callable[..., None]:
      def call(*args: Any, **kwargs: Any) -> None:
        for writer in writers:
          getattr(writer, method)(*args, **kwargs)

      return call

    for method in vars(MetricWriter):
      if not method.startswith("_"):
        setattr(self, method, to_each(method))


def make_writer(
  workdir: str | os.PathLike, resume_step: int | None = None
) -> MetricWriter:
  """Returns the job's writer: DIR/metrics.jsonl, and event files in DIR.

  Without tensorboardX there are no event files. Of several processes only the
  first one writes.

  Args:
    workdir: DIR.
    resume_step: the step of the restored checkpoint; what was written for later
      steps is dropped. None or 0 for a new run.
  """
  if jax.process_index() != 0:
    return MultiWriter([])
  writers: list[MetricWriter] = [
    JsonlWriter(storage.path(workdir) / "metrics.jsonl", resume_step)
  ]
  if importlib.util.find_spec("tensorboardX"):
    writers.append(TensorBoardWriter(workdir, resume_step))
  return MultiWriter(writers)


def _step(line: bytes) -> float:
  """Returns a line's step, or infinity for a line that no run has written."""
  try:
    step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
  except (ValueError, TypeError, KeyError, RecursionError):
    return math.inf
  return step if isinstance(step, int) else math.inf
