"""Metric files read back, also after a kill and a resume."""

import inspect
import json
import os
import struct
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import text
from flax_mechanic import UsageError
from train import loop, writers


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines(tmp_path):
  path = tmp_path / "new" / "metrics.jsonl"
  writer = writers.JsonlWriter(path)
  writer.write_scalars(
    np.int64(10), {"train/loss": jnp.bfloat16(0.5), "lr": np.float32(2)}
  )
  writer.write_scalars(
    20, {"nan": float("nan"), "inf": -jnp.inf, "one": jnp.ones(())}
  )
  writer.write_texts(20, {"config": "x"})
  # Read before flush: a line is on the disk when the call returns.
  assert _lines(path) == [
    {"step": 10, "train/loss": 0.5, "lr": 2.0},
    {"step": 20, "nan": None, "inf": None, "one": 1.0},
  ]
  writer.close()


@pytest.mark.parametrize(
  "torn",
  [
    *("", '{"step": 3', '{"step": 3}', "\0\0\n"),
    *('{"step": "3"}\n', "[" * 10**5 + "\n"),
  ],
  ids=range(6),
)
def test_jsonl_resume(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  whole = '{"step": 1, "a": 1.0}\n{"step": 3, "a": 2.0}\n'
  path.write_text(whole + '{"step": 4, "a": 9.0}\n' + torn)
  writer = writers.JsonlWriter(path, resume_step=3)
  assert path.read_text() == whole
  writer.write_scalars(4, {"a": 4})
  writer.close()
  assert path.read_text() == whole + '{"step": 4, "a": 4.0}\n'
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_step", [None, 0])
def test_jsonl_fresh(tmp_path, resume_step):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n{"step": 1}\n')
  writers.JsonlWriter(path, resume_step).close()
  assert path.read_text() == ""


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.new"])
def test_a_folder_in_place_of_a_file(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(
    UsageError, match=r"metrics\.jsonl cannot be written \(Is a directory\)"
  ):
    writers.JsonlWriter(tmp_path / "metrics.jsonl")


def test_an_event_file_that_is_a_link(tmp_path):
  pytest.importorskip("tensorboardX")
  (tmp_path / "events.out.tfevents.1.host").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UsageError, match="is a link"):
    writers.TensorBoardWriter(tmp_path)
  assert not (tmp_path / "elsewhere").exists()


def test_jsonl_resume_without_a_file(tmp_path):
  writers.JsonlWriter(tmp_path / "metrics.jsonl", resume_step=3).close()
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_jsonl_drops_atomically(tmp_path, monkeypatch):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n')

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr("pathlib.Path.replace", killed)
  with pytest.raises(KeyboardInterrupt):
    writers.JsonlWriter(path, resume_step=1)
  assert len(_lines(path)) == 2


def _events(logdir):
  """Reads the events of a directory, file after file, as TensorBoard does."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  for file in sorted(logdir.glob("*.tfevents.*")):
    data = file.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def _values(logdir):
  return {
    value.tag: (event.step, value)
    for event in _events(logdir)
    for value in event.summary.value
  }


def test_tensorboard_kinds(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = writers.TensorBoardWriter(tmp_path)
  writer.write_scalars(3, {"train/loss": jnp.float32(0.5)})
  writer.write_texts(3, {"note": "hello"})
  writer.write_histograms(3, {"w": jnp.arange(4, dtype=jnp.bfloat16)})
  writer.write_histograms(3, {"v": jnp.arange(4)}, {"v": 2})
  writer.write_hparams({"lr": 0.1, "on": True, "sizes": (1, 2), "x": None})
  writer.write_videos(3, {"v": np.zeros((1, 2, 4, 4, 3))})
  writer.write_summaries(3, {"t": np.zeros(3)})
  writer.close()
  # One file: TensorBoard stops reading a file when a later one appears.
  assert len(list(tmp_path.iterdir())) == 1
  values = _values(tmp_path)
  step, loss = values["train/loss"]
  assert (step, loss.simple_value) == (3, 0.5)
  assert values["note/text_summary"][1].tensor.string_val == [b"hello"]
  assert values["w"][1].histo.sum == 6
  assert values["w"][1].histo.num == 4
  start = values["_hparams_/session_start_info"][1]
  content = start.metadata.plugin_data.content
  for part in (b"lr", b"on", b"sizes", b"(1, 2)"):
    assert part in content
  # It would be all that TensorBoard knows of metrics, and there are none yet.
  assert "_hparams_/experiment" not in values


@pytest.mark.slow
def test_tensorboard_shows_a_job(tmp_path):
  pytest.importorskip("tensorboardX")
  config = text.get_config("tiny")
  config.update(optimizer="sam", num_steps=6, sample_length=40)
  loop.train(config, tmp_path)
  values = _values(tmp_path)
  (report,) = values["report/text_summary"][1].tensor.string_val
  assert all(line.startswith(b"    ") for line in report.splitlines())
  start = values["_hparams_/session_start_info"][1]
  content = start.metadata.plugin_data.content
  # sam's base is sgd; the other methods' options say nothing of this run.
  for name in (b"optimizer", b"opt.sam.rho", b"opt.sgd.momentum"):
    assert name in content
  assert b"opt.lion" not in content


def test_tensorboard_images(tmp_path):
  pytest.importorskip("tensorboardX")
  pytest.importorskip("PIL")
  writer = writers.TensorBoardWriter(tmp_path)
  writer.write_images(
    1, {"one": np.zeros((4, 6, 3)), "two": jnp.zeros((2, 4, 6, 1))}
  )
  writer.close()
  values = _values(tmp_path)
  image = values["one"][1].image
  assert (image.height, image.width) == (4, 6)
  assert values["two"][1].image.width >= 12


def test_tensorboard_audios(tmp_path):
  pytest.importorskip("tensorboardX")
  pytest.importorskip("soundfile")
  writer = writers.TensorBoardWriter(tmp_path)
  writer.write_audios(1, {"a": np.zeros((2, 100, 1))}, sample_rate=8000)
  writer.close()
  values = _values(tmp_path)
  assert values["a/1"][1].audio.length_frames == 100


@pytest.mark.parametrize(
  ("resume_step", "hidden_from"), [(None, 0), (0, 0), (5, 6)]
)
def test_tensorboard_resume(tmp_path, resume_step, hidden_from):
  pytest.importorskip("tensorboardX")
  first = writers.TensorBoardWriter(tmp_path, 3)
  first.write_scalars(5, {"a": 1})
  first.close()
  second = writers.TensorBoardWriter(tmp_path, resume_step)
  second.write_scalars(6, {"a": 2})
  second.close()
  assert len(list(tmp_path.iterdir())) == 2
  starts = [
    event.step for event in _events(tmp_path) if event.session_log.status
  ]
  assert sorted(starts) == sorted([4, hidden_from])


def _methods(cls):
  return {
    name: method
    for name, method in inspect.getmembers(cls, inspect.isfunction)
    if not name.startswith("_")
  }


def test_interface_is_that_of_clu():
  pytest.importorskip("clu")
  # By its file: importing clu.metric_writers imports TensorFlow.
  spec = inspect.importlib.util.find_spec("clu")
  folder = spec.submodule_search_locations[0]
  loader = inspect.importlib.util.spec_from_file_location(
    "clu_interface", f"{folder}/metric_writers/interface.py"
  )
  module = inspect.importlib.util.module_from_spec(loader)
  loader.loader.exec_module(module)
  theirs = _methods(module.MetricWriter)
  ours = _methods(writers.MetricWriter)
  assert set(ours) == set(theirs)
  for name, method in theirs.items():
    expected = inspect.signature(method).parameters
    parameters = inspect.signature(ours[name]).parameters
    assert list(parameters) == list(expected)
    for key in expected:
      assert parameters[key].kind == expected[key].kind
      assert parameters[key].default == expected[key].default


def test_multi_writer():
  class Recorder(writers.MetricWriter):
    def __init__(self):
      self.calls = []
      for name in _methods(writers.MetricWriter):
        setattr(
          self, name, lambda *a, _n=name, **k: self.calls.append((_n, a, k))
        )

  recorders = [Recorder(), Recorder()]
  writer = writers.MultiWriter(recorders)
  for name in _methods(writers.MetricWriter):
    getattr(writer, name)(1, extra=2)
  for recorder in recorders:
    assert recorder.calls == [
      (name, (1,), {"extra": 2}) for name in _methods(writers.MetricWriter)
    ]


def test_make_writer(tmp_path, monkeypatch):
  writer = writers.make_writer(tmp_path)
  writer.write_scalars(1, {"a": 1})
  writer.write_hparams({"b": 1})
  writer.flush()
  writer.close()
  assert _lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
  monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
  writers.make_writer(tmp_path / "bare", resume_step=3).close()
  files = [file.name for file in (tmp_path / "bare").iterdir()]
  assert files == ["metrics.jsonl"]
  monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
  other = writers.make_writer(tmp_path / "other")
  other.write_scalars(1, {"a": 1})
  other.close()
  assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("name", ["metrics.jsonl", "events"])
def test_a_full_disk_is_told_when_it_is_met(tmp_path, monkeypatch, name):
  pytest.importorskip("tensorboardX")
  makers = {"metrics": writers.JsonlWriter, "events": writers.TensorBoardWriter}
  make = makers[name.partition(".")[0]]
  writer = make(tmp_path / name)
  with open("/dev/full", "ab", buffering=0) as full:
    monkeypatch.setattr(writer._file, "_file", full)
    with pytest.raises(OSError, match=f"No space left on device.*{name}"):
      writer.write_scalars(1, {"a": 1})
    writer.close()  # There is nothing left to write.


def test_a_write_that_the_disk_cuts_short(tmp_path, monkeypatch):
  writer = writers.JsonlWriter(tmp_path / "metrics.jsonl")
  file = writer._file._file
  cut = types.SimpleNamespace(write=lambda data: file.write(data[:3]))
  monkeypatch.setattr(writer._file, "_file", cut)
  writer.write_scalars(1, {"a": 1})
  assert _lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
