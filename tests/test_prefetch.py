"""Batches are loaded ahead of their use, in their order."""

import contextlib
import signal
import subprocess
import sys
import threading

import pytest
from test_train import Writer, make_config

from flax_mechanic.errors import UsageError
from train import loop
from train.prefetch import ahead
from train.tasks.digits import Digits


def test_two_are_loaded_while_one_is_used():
  loaded, started = [], threading.Semaphore(0)

  def load(item):
    loaded.append(item)
    started.release()
    return item * item

  results = ahead(load, range(10))
  assert next(results) == 0
  for _ in range(3):
    assert started.acquire(timeout=10)
  assert loaded == [0, 1, 2]
  assert [next(results), next(results)] == [1, 4]
  results.close()
  assert list(ahead(load, range(5))) == [0, 1, 4, 9, 16]
  assert list(ahead(load, [])) == []


def test_an_error_comes_where_its_result_would():
  results = ahead(lambda item: 1 // (3 - item), range(9))
  assert [next(results) for _ in range(3)] == [0, 0, 1]
  with pytest.raises(ZeroDivisionError):
    next(results)


def test_closing_ends_the_thread():
  before = threading.active_count()
  results = ahead(lambda item: item, range(100))
  next(results)
  results.close()
  assert threading.active_count() == before


def test_a_load_that_never_returns_does_not_keep_the_process():
  code = """
import signal
import threading
from train import prefetch
# What a shell starts with & ignores it, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
results = prefetch.ahead(lambda _: threading.Event().wait(), range(3))
print(flush=True)
next(results)
"""
  process = subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    process.stdout.readline()
    # One that comes in the callback of a weak reference is lost.
    for _ in range(20):
      process.send_signal(signal.SIGINT)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
        break
    assert process.poll() is not None
    assert "KeyboardInterrupt" in process.stderr.read()


def test_a_run_ends_with_the_sentence_of_its_data(tmp_path, monkeypatch):
  def refuse(task, step, rows=slice(None)):
    if step == 7:
      raise UsageError("the data is gone")
    return batch(task, step, rows)

  batch = Digits.train_batch
  monkeypatch.setattr(Digits, "train_batch", refuse)
  config = make_config(log_every=1)
  writer = Writer()
  with pytest.raises(UsageError, match="the data is gone"):
    loop.train(config, tmp_path, writer)
  assert [step for step, _ in writer.scalars] == [1, 2, 3, 4, 5, 6, 7]
