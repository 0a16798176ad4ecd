"""Checkpoints in a bucket, which an emulator has on this machine."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

import flax_mechanic
from configs import text as text_config
from flax_mechanic import Checkpointer, UsageError
from flax_mechanic.checkpoints import lock, storage
from tests.references import assert_same
from train import export, files, flags, inspect, main, plot
from train.tasks import corpus, make_task

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

TREE = {"params": {"w": jnp.arange(1000.0)}}


@pytest.fixture
def folder(bucket, request):
  """A folder of its own in the bucket."""
  return f"gs://test/{request.node.name}"


def save(folder, steps, **options):
  with Checkpointer(folder, **options) as checkpointer:
    for step in steps:
      checkpointer.save(step, TREE, metrics={"loss": float(step)})


def on_disk(bucket, folder):
  return bucket.folder / folder.removeprefix("gs://test/")


def damage(step):
  """Flips a byte in the largest of a step's files of arrays."""
  files = (each for each in step.glob("state/ocdbt.process_0/d/*"))
  file = max(files, key=lambda each: each.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 255
  file.write_bytes(data)


@pytest.mark.parametrize("given", ["gs://b/run", "gs:/b/run", "gs://b/run/"])
def test_an_address_is_one_also_as_a_path_of_pathlib(bucket, given):
  assert str(storage.path(given)) == "gs://b/run"
  assert str(storage.path(given) / "x") == "gs://b/run/x"


def test_what_is_neither_a_folder_nor_in_a_bucket_is_refused():
  with pytest.raises(UsageError, match="type a folder, or gs://"):
    storage.path("ftp://host/run")


def test_the_newest_steps_and_the_best_are_kept(bucket, folder):
  save(folder, (1, 2, 3, 4), keep=1, best="loss")
  with Checkpointer(folder, read_only=True) as checkpointer:
    assert checkpointer.steps() == [1, 4]
    restored = checkpointer.restore(TREE)
  np.testing.assert_array_equal(
    restored.state["params"]["w"], TREE["params"]["w"]
  )
  assert not storage.file_system(folder).exists(f"{folder}/2")


def test_a_damaged_step_is_marked_and_can_be_saved_again(bucket, folder):
  save(folder, (1, 2))
  damage(on_disk(bucket, folder) / "2")
  with Checkpointer(folder) as checkpointer:
    restored = checkpointer.restore(TREE)
    assert restored.step == 1
    assert "step 2" in restored.damaged[0]
    assert checkpointer.steps() == [1]
  # It is still there, for whoever wants to know what happened.
  with Checkpointer(folder) as checkpointer:
    assert checkpointer.steps() == [1]
    assert (on_disk(bucket, folder) / "2/state/_METADATA").exists()
    checkpointer.save(2, TREE)
    checkpointer.wait()
    checkpointer.verify(2)
    assert checkpointer.restore(TREE).step == 2


def test_a_step_that_a_kill_cut_short_is_deleted(bucket, folder):
  save(folder, (1, 2))
  file_system = storage.file_system(folder)
  file_system.rm_file(f"{folder}/2/commit_success.txt")
  file_system.pipe_file(f"{folder}/3/of_somebody_else", b"")
  with Checkpointer(folder) as checkpointer:
    assert checkpointer.latest() == 1
  assert not file_system.exists(f"{folder}/2")
  assert file_system.exists(f"{folder}/3")


def test_parameters_are_loaded_and_a_run_is_adopted(bucket, folder):
  save(f"{folder}/checkpoints", (1, 2))
  storage.file_system(folder).rm_file(
    f"{folder}/checkpoints/2/commit_success.txt"
  )
  zeros = {"w": jnp.zeros(1000)}
  loaded = flax_mechanic.load_params(folder, zeros)
  np.testing.assert_array_equal(loaded["w"], TREE["params"]["w"])
  adopted = flax_mechanic.adopt(folder, zeros, optax.sgd(1.0).init)
  assert adopted.notes[0] == f"starting from {folder}/checkpoints/1"
  save(f"{folder}/runs/adamw/checkpoints", (1,))
  with pytest.raises(UsageError, match=f"such as {folder}/runs/adamw, or"):
    flax_mechanic.load_params(f"{folder}/runs", zeros)


def test_a_bucket_that_cannot_be_used_is_no_damage(bucket, folder, monkeypatch):
  save(folder, (1, 2))
  with Checkpointer(folder) as checkpointer:
    for status, words in ((403, "permission"), (401, "credentials")):
      bucket.fail(status=status)
      with pytest.raises(UsageError, match=words):
        checkpointer.restore(TREE)
      bucket.fail(0)
    assert checkpointer.restore(TREE).step == 2


def test_what_is_between_two_chunks_is_not_read(bucket, folder, monkeypatch):
  rng = np.random.default_rng(0)
  arrays = {f"{i}": rng.random(2**13) for i in range(16)}
  with Checkpointer(folder) as checkpointer:
    checkpointer.save(1, arrays)
    checkpointer.wait()
    bucket.served()
    half = {name: arrays[name] for name in list(arrays)[::2]}
    checkpointer.restore(half, part=True)
  assert bucket.served() < 0.6 * 2**20
  gap = storage._GAP
  monkeypatch.setattr(storage, "_GAP", "")
  spec = tensorstore_utils._build_ocdbt_kvstore_tspec(folder)
  assert spec[gap] == 1_000_000  # If not, `storage._spec` can go.


def test_trouble_is_of_buckets_alone(monkeypatch):
  error = ConnectionError("503")
  assert storage.trouble("gs://b/run", error)
  # Also where another error was raised while it was handled.
  later = ValueError("no JSON")
  later.__context__ = error
  assert storage.trouble("gs://b/run", later)
  assert storage.trouble("runs/mine", error) is None
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  assert storage.trouble(None, error)
  for client in ("gcsfs", "s3fs"):
    monkeypatch.delitem(sys.modules, client, raising=False)
  assert storage.trouble(None, error) is None


def test_orbax_saves_in_s3(monkeypatch):
  def base(scheme):
    address = f"{scheme}://bucket/run/1"
    return tensorstore_utils.build_kvstore_tspec(address, "w")["base"]

  in_gs = base("gs")
  # Once this fails, `storage._teach_s3` can go.
  with pytest.raises(ValueError, match="should be absolute"):
    base("s3")
  for module, name in (
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
  ):
    monkeypatch.setattr(module, name, getattr(module, name))
  storage._teach_s3()
  assert base("gs") == in_gs
  assert base("s3") == in_gs | {"driver": "s3"}
  on_disk = tensorstore_utils.build_kvstore_tspec("/run/1", "w")["base"]
  assert on_disk["path"] == "/run/1/"


def test_there_is_no_such_bucket(bucket):
  with pytest.raises(UsageError, match="there is no such bucket"):
    Checkpointer("gs://gone/run")


def test_two_runs_do_not_write_one_folder(bucket, folder, monkeypatch):
  monkeypatch.setattr(lock, "LEASE", 1.2)
  words = "another run is writing"
  with Checkpointer(folder), pytest.raises(UsageError, match=words):
    Checkpointer(folder)
  waits = []
  monkeypatch.setattr(lock.logging, "warning", lambda *each: waits.append(each))
  with Checkpointer(folder):  # The lock of a run that has ended is gone.
    assert not waits


def test_the_lock_of_a_killed_run_lapses(bucket, folder, monkeypatch):
  monkeypatch.setattr(lock, "LEASE", 1.2)
  said = []
  monkeypatch.setattr(lock.logging, "warning", lambda *each: said.append(each))
  killed = Checkpointer(folder)
  held = killed._lock._held
  held._ended.set()  # It does not renew its lock any more.
  with Checkpointer(folder):
    assert "for its lock to lapse" in said[0][0]
    # If it was only asleep, it cannot go on.
    with pytest.raises(UsageError, match="another run has taken over"):
      killed.save(1, TREE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("here", [True, False])
def test_the_lock_of_a_process_that_has_ended_here_has_lapsed(
  bucket, folder, monkeypatch, here
):
  monkeypatch.setattr(lock, "LEASE", 0.5)
  waits = []
  monkeypatch.setattr(lock.logging, "warning", lambda *each: waits.append(each))
  process = subprocess.Popen(["true"])
  process.wait()
  machine = lock._machine() if here else "another"
  storage.file_system(folder).pipe_file(
    f"{folder}/.lock/{7:012d}", f"{machine} {process.pid} x".encode()
  )
  with Checkpointer(folder):
    assert bool(waits) != here


def test_of_many_runs_one_gets_the_lock(bucket, folder, monkeypatch):
  """Also where a lapsed one is taken over."""
  monkeypatch.setattr(lock, "LEASE", 0.8)
  file_system = storage.file_system(storage.path(folder))
  file_system.pipe_file(f"{folder}/.lock/{7:012d}", b"of a killed run")
  time.sleep(lock.LEASE)
  leases, errors = [], []

  def take():
    try:
      leases.append(lock.Lease(folder, file_system))
    except UsageError as error:
      errors.append(error)

  threads = [threading.Thread(target=take) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(leases), len(errors)) == (1, 5)
  leases[0].check()
  leases[0].release()


def test_a_run_that_looked_too_early_leaves_no_lock(
  bucket, folder, monkeypatch
):
  file_system = storage.file_system(storage.path(folder))
  held = lock.Lease(folder, file_system)
  held._renew()
  # As if another had found none, before the first one had begun.
  monkeypatch.setattr(lock.Lease, "_lapsed", lambda self: set())
  with pytest.raises(UsageError, match="another run is writing"):
    lock.Lease(folder, file_system)
  assert list(held._objects()) == [2]
  held.release()
  assert not held._objects()


def test_what_is_logged_reads_as_one_after_a_resume(bucket, folder):
  path = storage.path(folder) / "metrics.jsonl"
  first = files.log(path)
  first.start(b"")
  first.write(b"1\n2\n")
  first.flush()
  first.write(b"3\n")
  first.flush()
  first.write(b"what a kill loses")
  resumed = files.log(path)
  assert resumed.read() == b"1\n2\n3\n"
  resumed.start(b"1\n2\n")
  resumed.write(b"4\n")
  resumed.close()
  assert files.log(path).read() == b"1\n2\n4\n"
  names = sorted(each.name for each in on_disk(bucket, folder).iterdir())
  assert names == ["metrics.jsonl.0002-000000", "metrics.jsonl.0002-000001"]


def test_what_is_logged_is_appended_unless_something_else_is_started(
  bucket, folder
):
  path = storage.path(folder) / "runs.jsonl"
  for line in (b"1\n", b"2\n"):
    log = files.log(path)
    log.write(line)
    log.close()
  assert files.log(path).read() == b"1\n2\n"


def test_what_is_deleted_may_be_gone(bucket, folder, monkeypatch):
  """The answer to a first request was lost."""
  kind = type(storage.file_system(folder))
  call = kind._call

  async def twice(self, method, *arguments, **options):
    if method == "DELETE":
      await call(self, method, *arguments, **options)
    return await call(self, method, *arguments, **options)

  monkeypatch.setattr(kind, "_call", twice)
  flags.check_workdir(folder)
  for _ in range(2):
    log = files.log(storage.path(folder) / "metrics.jsonl")
    log.start(b"1\n")
  assert [each.name for each in on_disk(bucket, folder).iterdir()] == [
    "metrics.jsonl.0002-000000"
  ]


def test_what_is_logged_is_there_after_the_interval(
  bucket, folder, monkeypatch
):
  monkeypatch.setattr(files, "INTERVAL", 0.1)
  path = storage.path(folder) / "metrics.jsonl"
  log = files.log(path)
  log.start(b"")
  log.write(b"1\n")
  deadline = time.monotonic() + 5
  while not files.log(path).read() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert files.log(path).read() == b"1\n"
  log.close()


@pytest.fixture
def texts(bucket, folder, tmp_path):
  """The same text in a bucket and in a folder, of 20 files and an index."""
  rng = np.random.default_rng(0)
  file_system = storage.file_system(folder)
  for i in range(20):
    data = rng.integers(32, 127, size=500 + i, dtype=np.uint8).tobytes()
    for name in (f"{i % 3}/\N{SNOWMAN} {i}%23.txt", f".hidden/{i}"):
      file = tmp_path / name
      file.parent.mkdir(exist_ok=True)
      file.write_bytes(data)
      file_system.pipe_file(f"{folder}/{name}", data)
  file_system.pipe_file(f"{folder}/binary", b"\0")
  file_system.pipe_file(f"{folder}/empty/", b"")
  return folder, tmp_path


def make_text(path, **fields):
  config = text_config.get_config("tiny")
  config.data.path = str(path)
  config.data.update(fields)
  return make_task(config)


@pytest.mark.parametrize(
  "fields", [{}, {"tokenizer": "300", "separate_documents": True}]
)
def test_text_in_a_bucket_makes_the_batches_of_a_folder(texts, fields):
  there, here = (make_text(each, **fields) for each in texts)
  assert there.description == here.description
  for step in (0, 7):
    batches = (each.train_batch(step, slice(2, 6)) for each in (there, here))
    assert_same(*batches)
  for batches in zip(there.eval_batches(), here.eval_batches(), strict=True):
    assert_same(*batches)


def test_only_windows_are_read_of_text_in_a_bucket(bucket, texts):
  task = make_text(texts[0])
  bucket.served()
  task.train_batch(3)
  assert bucket.served() == 8 * 33


def test_what_is_text_is_remembered_in_its_bucket(bucket, texts, monkeypatch):
  monkeypatch.setattr(corpus, "_WORTH_AN_INDEX", 0)
  path = storage.path(texts[0])
  found = corpus.find_text(path)
  index = path / corpus._INDEX
  bucket.served()
  assert corpus.find_text(path) == found
  assert bucket.served() == index.stat().length
  # Only what has another version is read again.
  changed = min(found[0])
  (path / changed).write_bytes(b"\0" * found[0][changed])
  size = index.stat().length
  bucket.served()
  assert changed not in corpus.find_text(path)[0]
  assert bucket.served() == size + found[0][changed]


def test_text_that_changes_in_a_bucket_is_named(bucket, texts):
  path = storage.path(texts[0])
  name = min(corpus.find_text(path)[0])
  text = corpus.Corpus(path, {name: range(500)})
  (path / name).write_bytes(b"short")
  with pytest.raises(UsageError, match=r"%23.txt has become shorter"):
    text.read(np.array([100]), 9)
  (path / name).unlink()
  with pytest.raises(UsageError, match=r"%23.txt cannot be read any more \(No"):
    text.read(np.array([100]), 9)
  bucket.fail(status=403)
  with pytest.raises(
    UsageError, match=r"%23.txt cannot be read: there is no p"
  ):
    text.read(np.array([100]), 9)
  bucket.fail(0)


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("gs://gone/text", "config.data.path=gs://gone/text cannot be read: there"),
    ("gs://test/no/text", "'gs://test/no/text' is not a folder; type"),
    ("gs://test/text.txt", "'gs://test/text.txt' is not a folder; type"),
  ],
)
def test_there_is_no_such_text(bucket, path, words):
  storage.path("gs://test/text.txt").write_bytes(b"text " * 99)
  with pytest.raises(UsageError, match=words):
    make_text(path)


@pytest.mark.parametrize(
  ("workdir", "status", "words"),
  [
    ("gs://gone/run", 0, "there is no such bucket"),
    ("gs://test/run", 403, "there is no permission to do that"),
    ("gs://test/run", 401, "it does not accept the credentials"),
  ],
)
def test_what_a_bucket_refuses_is_one_sentence(
  bucket, capsys, workdir, status, words
):
  config = f"--config={ROOT / 'configs' / 'digits.py'}"
  if status:
    bucket.fail(status=status)
  try:
    assert main.main([config, f"--workdir={workdir}"]) == 2
  finally:
    bucket.fail(0)
  said = capsys.readouterr().err
  assert said.startswith(f"error: --workdir={workdir} cannot be written: ")
  assert words in said
  assert said.count("\n") == 1


def numbers(text):
  rows = [json.loads(line) for line in text.splitlines()]
  return [
    {name: value for name, value in row.items() if name != "steps_per_second"}
    for row in rows
  ]


def test_a_killed_run_resumes_in_a_bucket_as_in_a_folder(
  bucket, tmp_path, monkeypatch, capsys
):
  """And it is inspected, plotted, exported and adopted there."""
  monkeypatch.setattr(lock, "LEASE", 2.0)
  run = f"gs://test/{tmp_path.name}"
  folder = on_disk(bucket, run)
  job = [
    f"--config={ROOT / 'configs' / 'digits.py'}",
    "--config.optimizer=mechanic",
    "--config.model.widths=(16,)",
    "--config.num_steps=60",
    "--config.schedule.warmup_steps=6",
    "--config.log_every=5",
    "--config.eval_every=20",
    "--config.checkpoint_every=20",
  ]

  def said(command, *arguments):
    assert command.main(arguments) == 0
    return capsys.readouterr().out

  said(main, *job, f"--workdir={tmp_path}/run")
  killed = subprocess.Popen(
    [sys.executable, "-m", "train.main", *job, f"--workdir={run}/run"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
  )
  with killed:
    done = folder / "run/checkpoints/20/commit_success.txt"
    while not done.exists() and killed.poll() is None:
      time.sleep(0.01)
    killed.kill()
  resumed = said(main, *job, f"--workdir={run}/run")
  assert "at step 20" in resumed or "at step 40" in resumed
  log = files.log(storage.path(f"{run}/run/metrics.jsonl"))
  expected = (tmp_path / "run/metrics.jsonl").read_text()
  assert numbers((log.read() or b"").decode()) == numbers(expected)
  assert "| 60 " in said(inspect, f"{run}/run")
  said(plot, f"{run}/run")
  assert (folder / "run/metrics.png").stat().st_size
  said(export, f"{run}/run", f"{run}/model")
  assert export.main([f"{run}/run", "gs://gone/model"]) == 2
  assert "there is no such bucket" in capsys.readouterr().err
  adopted = said(
    main, *job, f"--workdir={run}/second", f"--config.init_from={run}/run"
  )
  assert f"starting from {run}/run/checkpoints/60" in adopted
