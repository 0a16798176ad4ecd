"""What really happens to checkpoints: nothing wrong goes on unnoticed."""

import asyncio
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.path import deleter
from orbax.checkpoint._src.path import step as step_lib

from flax_mechanic import Checkpointer, UsageError
from flax_mechanic.checkpoints import arrays, lock, record, storage
from train import inspect

ROOT = pathlib.Path(__file__).parent.parent


def make_state(seed):
  key = jax.random.key(seed)
  return {
    "model": {"kernel": jax.random.normal(key, (64, 32)), "bias": jnp.ones(5)},
    "half": jax.random.normal(key, (33,)).astype("bfloat16"),
    "key": key,
    "count": jnp.int32(seed),
  }


def words(state):
  data = {**state, "key": jax.random.key_data(state["key"])}
  return jax.tree.map(np.asarray, data)


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, words(a), words(b)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with the intact steps 1 and 2."""
  folder = tmp_path_factory.mktemp("saved")
  with Checkpointer(folder) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, make_state(step), data={"step": step})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def files(folder):
  return sorted(each for each in folder.rglob("*") if each.is_file())


def outcome(folder):
  """Restores; returns "harmless" or "detected", and raises otherwise."""
  target = jax.eval_shape(lambda: make_state(0))
  with Checkpointer(folder) as checkpointer:
    restored = checkpointer.restore(target)
    assert same(restored.state, make_state(restored.step))
    assert restored.data == {"step": restored.step}
    if restored.step == 2:
      return "harmless"
    # What is damaged is set aside, and the step can be saved again.
    assert restored.step == 1
    checkpointer.save(2, make_state(2), data={"step": 2})
    checkpointer.wait()
    assert checkpointer.restore(target).step == 2
    return "detected"


@pytest.mark.parametrize(
  "seed",
  [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))],
)
def test_flipped_bits_are_harmless_or_detected(saved, tmp_path, seed):
  rng = np.random.default_rng(seed)
  counts = {}
  every = [path.relative_to(saved) for path in files(saved / "2")]
  for i in range(20):
    folder = shutil.copytree(saved, tmp_path / str(i))
    # Each file as often as any other, whatever its size.
    path = folder / every[(20 * seed + i) % len(every)]
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    found = outcome(folder)
    counts[found] = counts.get(found, 0) + 1
    shutil.rmtree(folder)
  print(counts)
  assert counts.keys() <= {"harmless", "detected"}


@pytest.mark.slow
def test_every_file_truncated_or_gone(saved, tmp_path):
  counts = {}
  for path in files(saved / "2"):
    for what in ("truncated", "emptied", "deleted"):
      folder = shutil.copytree(saved, tmp_path / "copy")
      damaged = folder / path.relative_to(saved)
      if what == "deleted":
        damaged.unlink()
      else:
        size = damaged.stat().st_size // 2 if what == "truncated" else 0
        os.truncate(damaged, size)
      found = outcome(folder)
      counts[found] = counts.get(found, 0) + 1
      shutil.rmtree(folder)
  print(counts)
  assert counts.keys() <= {"harmless", "detected"}


def test_no_thread_waits_for_a_folder_that_has_no_room(tmp_path, monkeypatch):
  mkdir = os.mkdir

  def full(path, *args, **kwargs):
    if "orbax-checkpoint-tmp" in os.fspath(path):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    mkdir(path, *args, **kwargs)

  checkpointer = Checkpointer(tmp_path)
  monkeypatch.setattr(os, "mkdir", full)
  with pytest.raises(UsageError, match="No space left"):
    checkpointer.save(1, make_state(1))
  checkpointer.close()
  names = [type(thread).__name__ for thread in threading.enumerate()]
  assert "_SignalingThread" not in names


def test_orbax_needs_patience_where_an_array_cannot_be_read(
  tmp_path, monkeypatch
):
  item = {f"{i}": np.random.default_rng(i).random(2**16) for i in range(16)}
  ocp.PyTreeCheckpointer().save(tmp_path / "item", item)
  data = max(files(tmp_path), key=lambda path: path.stat().st_size)
  os.truncate(data, data.stat().st_size // 2)
  handler = ocp.PyTreeCheckpointHandler()
  printed = []
  monkeypatch.setattr(sys, "unraisablehook", printed.append)
  attempts = 0  # Each is likely, but not sure, to leave others unread.
  while not printed and attempts < 20:
    attempts += 1
    with pytest.raises(ValueError, match="OUT_OF_RANGE"):
      handler.restore(tmp_path / "item")
    time.sleep(0.1)
  # Once this fails, `arrays._patience` can go.
  assert printed
  printed.clear()
  for _ in range(3 * attempts):
    with pytest.raises(arrays.DamageError, match="item cannot be read"):
      arrays.read_on_all("item", lambda: handler.restore(tmp_path / "item"))
  time.sleep(0.1)
  assert not printed


def test_an_error_whose_first_line_is_empty_is_damage():
  def read():
    raise ValueError("\n  what is wrong\nwhere")

  with pytest.raises(arrays.DamageError, match=r"read \(what is wrong\)"):
    arrays.read_on_all("item", read)


def test_readers_in_several_threads_leave_asyncio_as_it_was(monkeypatch):
  new = asyncio.new_event_loop
  monkeypatch.setattr(asyncio, "new_event_loop", new)
  entered, left = threading.Event(), threading.Event()

  def read():
    with arrays._patience():
      entered.set()
      left.wait(10)

  thread = threading.Thread(target=read)
  with arrays._patience():
    thread.start()
    entered.wait(0.2)  # It has to wait for this one.
  left.set()
  thread.join()
  assert asyncio.new_event_loop is new


def test_a_damaged_array_is_named(folder):
  data = max(files(folder / "2"), key=lambda path: path.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  target = make_state(0)
  with Checkpointer(folder) as checkpointer:
    with pytest.raises(
      UsageError, match=r"array model/kernel of step 2 in .* is"
    ):
      checkpointer.restore(target, step=2)
    assert checkpointer.steps() == [1, 2]
    restored = checkpointer.restore(target)
  assert restored.step == 1
  assert "model/kernel of step 2" in restored.damaged[0]
  assert (folder / "damaged_2").is_dir()


def test_a_record_that_reads_well_but_is_not_what_was_saved(folder):
  path = folder / "2" / "record" / "metadata"
  text = path.read_text()
  saved = r"\"data\": {\"step\": 2}"
  assert saved in text
  path.write_text(text.replace(saved, saved.replace("2", "3")))
  assert outcome(folder) == "detected"


@pytest.mark.parametrize("field", ["arrays", "step", "versions"])
def test_a_record_without_a_field(folder, field):
  path = folder / "2" / "record" / "metadata"
  fields = dict(record.unseal(json.loads(path.read_text())))
  del fields[field]
  path.write_text(json.dumps(record.seal(fields)))
  assert outcome(folder) == "detected"


def test_a_step_under_another_number(folder):
  target = jax.eval_shape(lambda: make_state(0))
  shutil.copytree(folder / "1", folder / "5")
  with Checkpointer(folder) as checkpointer:
    with pytest.raises(UsageError, match=r"step 5 in .* was saved as step 1"):
      checkpointer.verify(5)
    restored = checkpointer.restore(target)
  assert restored.step == 2
  assert "was saved as step 1" in restored.damaged[0]


@pytest.mark.parametrize("name", ["20261124123000", "2147483648"])
def test_a_date_is_no_step(folder, name):
  (folder / name).mkdir()
  assert outcome(folder) == "harmless"
  with Checkpointer(folder) as checkpointer:
    checkpointer.save(3, make_state(3))
    assert checkpointer.steps() == [1, 2, 3]
    with pytest.raises(ValueError, match="holds step 3 already"):
      checkpointer.save(3, make_state(3))
  assert (folder / name).is_dir()


def test_two_arrays_of_one_path(tmp_path):
  state = {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}
  with (
    Checkpointer(tmp_path) as checkpointer,
    pytest.raises(UsageError, match="two arrays have the path 'a/b'"),
  ):
    checkpointer.save(1, state)


def test_a_step_that_is_damaged_again(folder):
  target = jax.eval_shape(lambda: make_state(0))
  names = ["damaged_2", "damaged_2_2", "damaged_2_3"]
  with Checkpointer(folder) as checkpointer:
    for i in range(3):
      (folder / "2" / "state" / "manifest.ocdbt").write_text(f"damage {i}")
      assert checkpointer.restore(target).step == 1
      checkpointer.save(2, make_state(2), data={"step": 2})
      checkpointer.wait()
    assert checkpointer.steps() == [1, 2]
  for i, name in enumerate(names):
    damaged = folder / name / "state" / "manifest.ocdbt"
    assert damaged.read_text() == f"damage {i}"


def test_a_reader_moves_nothing(folder):
  shutil.rmtree(folder / "2" / "state" / "d")
  with Checkpointer(folder, read_only=True) as checkpointer:
    assert checkpointer.restore(make_state(0)).step == 1
  assert (folder / "2").is_dir()


def test_step_0_is_a_step(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(0, make_state(0))
    checkpointer.wait()
    assert checkpointer.restore(make_state(1)).step == 0


def test_when_nothing_is_intact_it_says_so_and_moves_nothing(folder):
  for step in ("1", "2"):
    shutil.rmtree(folder / step / "state")
  with (
    Checkpointer(folder) as checkpointer,
    pytest.raises(UsageError, match="no intact step is left in"),
  ):
    checkpointer.restore(make_state(0))
  assert (folder / "1").is_dir()
  assert (folder / "2").is_dir()


def test_an_empty_step_and_a_stale_temporary_directory(folder):
  (folder / "7").mkdir()
  stale = folder / "8.orbax-checkpoint-tmp"
  shutil.copytree(folder / "1", stale)
  assert outcome(folder) == "harmless"
  while stale.exists():  # A thread of Orbax's deletes it.
    time.sleep(0.01)
  assert (folder / "damaged_7").is_dir()


def test_two_runs_in_one_directory(folder):
  with (
    Checkpointer(folder),
    pytest.raises(UsageError, match="another run is writing"),
  ):
    Checkpointer(folder)
  with Checkpointer(folder, read_only=True) as reader, Checkpointer(folder):
    assert reader.steps() == [1, 2]


def test_a_kill_lets_go_of_the_directory(tmp_path):
  code = f"""
import flax_mechanic, time
checkpointer = flax_mechanic.Checkpointer({str(tmp_path)!r})
print("locked", flush=True)
time.sleep(100)
"""
  holder = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert holder.stdout.readline() == "locked\n"
  with pytest.raises(
    UsageError, match=r"another run is writing .*; stop it, or"
  ):
    Checkpointer(tmp_path)
  holder.kill()
  holder.communicate()
  Checkpointer(tmp_path).close()
  assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch):
  def flock(descriptor, operation):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

  monkeypatch.setattr(lock.fcntl, "flock", flock)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, make_state(1))
    checkpointer.wait()
    assert checkpointer.restore(make_state(0)).step == 1


def test_a_directory_that_is_read_only(tmp_path, monkeypatch):
  # Not by its mode, which root need not heed.
  monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
  with pytest.raises(
    UsageError, match="cannot be written: Permission denied; type --workdir=DIR"
  ):
    Checkpointer(tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match=r"file/x cannot be written: Not a dir"):
    Checkpointer(tmp_path / "file" / "x")


def test_the_restored_dtype_is_the_target_s(folder):
  target = jax.eval_shape(lambda: make_state(0))
  target["model"]["kernel"] = jax.ShapeDtypeStruct((64, 32), "bfloat16")
  with Checkpointer(folder) as checkpointer:
    kernel = checkpointer.restore(target).state["model"]["kernel"]
  wanted = make_state(2)["model"]["kernel"].astype("bfloat16")
  np.testing.assert_array_equal(kernel, wanted)


def test_retention(tmp_path):
  with Checkpointer(
    tmp_path, keep=1, keep_every=4, best="-eval/accuracy"
  ) as checkpointer:
    for step, accuracy in enumerate([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6], 1):
      metrics = {"eval/accuracy": accuracy}
      assert checkpointer.is_best(metrics) == (step <= 3)
      checkpointer.save(step, make_state(step), metrics=metrics)
    assert not checkpointer.is_best({"eval/accuracy": float("nan")})
    assert not checkpointer.is_best({"eval/loss": 0.1})
    checkpointer.wait()
    assert checkpointer.steps() == [3, 4, 7]
    assert checkpointer.read(3)["metrics"] == {"eval/accuracy": 0.9}


def test_the_best_step_is_kept_by_the_runs_that_resume(tmp_path):
  # Of two that are as good, the newer one.
  for step, accuracy in enumerate([0.9, 0.9, 0.2, 0.3], 1):
    with Checkpointer(tmp_path, keep=1, best="-eval/accuracy") as checkpointer:
      metrics = {"eval/accuracy": accuracy}
      checkpointer.save(step, make_state(step), metrics=metrics)
  assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_retention_deletes_no_folder_that_is_not_a_step_of_the_run(folder):
  (folder / "0").mkdir()
  (folder / "0" / "notes").write_text("mine")
  shutil.copytree(folder / "1", folder / "3")  # A backup.
  with Checkpointer(folder, keep=1) as checkpointer:
    for step in (4, 5):
      checkpointer.save(step, make_state(step))
  assert {path.name for path in folder.iterdir()} == {"0", "3", "5"}
  assert (folder / "0" / "notes").read_text() == "mine"


@pytest.mark.parametrize("part", ["record", "state"])
def test_a_kill_while_a_step_is_deleted(folder, tmp_path, monkeypatch, part):
  monkeypatch.setattr(
    deleter.PathDeleter, "delete", lambda self, path: shutil.rmtree(path / part)
  )
  target = jax.eval_shape(lambda: make_state(0))
  killed = tmp_path / "killed"
  with Checkpointer(folder, keep=1) as checkpointer:
    checkpointer.save(3, make_state(3))
    checkpointer.wait()
    shutil.copytree(folder, killed)
  assert (killed / "2").is_dir()
  with Checkpointer(killed, keep=1) as checkpointer:
    assert {path.name for path in killed.iterdir()} == {"3"}
    assert checkpointer.restore(target).step == 3


def test_a_kill_before_a_step_is_whole_deletes_nothing(folder):
  note = {"saved": 3, "deleted": [1, 2, "../elsewhere"]}
  for text in (json.dumps(note), "[]", "{", "[" * 10**5):
    (folder / ".deleting").write_text(text)
    with Checkpointer(folder) as checkpointer:
      assert checkpointer.steps() == [1, 2]


def test_damage_is_one_sentence(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(sys, "unraisablehook", seen.append)
  state = {str(i): jnp.full(100, i) for i in range(60)}
  with Checkpointer(tmp_path) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, state)
    checkpointer.wait()
    for file in files(tmp_path / "2" / "state" / "d"):
      data = file.read_bytes()
      file.write_bytes(data[:-50] + bytes(50))
    assert checkpointer.restore(state).step == 1
  time.sleep(0.1)  # TensorStore's threads print.
  assert not seen


def tamper(step, change):
  """Changes a step's record, and seals it as if nothing were the matter."""
  path = step / "record" / "metadata"
  fields = json.loads(json.dumps(record.unseal(json.loads(path.read_text()))))
  change(fields)
  path.write_text(json.dumps(record.seal(fields)))


KERNEL = "model/kernel"


@pytest.mark.parametrize(
  "change",
  [
    lambda fields: fields.update(config=[]),
    lambda fields: fields.update(data=[]),
    lambda fields: fields.update(metrics={"eval/loss": "low"}),
    lambda fields: fields.update(versions={"jax": 1}),
    lambda fields: fields.update(arrays={KERNEL: 1}),
    lambda fields: fields["arrays"][KERNEL].update(shape=5),
    lambda fields: fields["arrays"][KERNEL].update(dtype="none"),
  ],
)
def test_a_record_that_no_run_has_written(folder, capsys, change):
  tamper(folder / "2", change)
  assert inspect.main([str(folder)]) == 1
  output = capsys.readouterr().out
  assert [line.split("|")[3].strip() for line in output.splitlines()[2:4]] == [
    "yes",
    "no",
  ]


def test_a_shape_that_no_file_holds_is_not_allocated(folder):
  def declare(fields):
    fields["arrays"][KERNEL]["shape"] = [2**22, 2**22]

  tamper(folder / "2", declare)
  # Of a target that is what the folder asks for.
  target = jax.eval_shape(lambda: make_state(0))
  target["model"]["kernel"] = jax.ShapeDtypeStruct((2**22,) * 2, "float32")
  with Checkpointer(folder, read_only=True) as checkpointer:
    for read in (
      lambda: checkpointer.verify(2),
      lambda: checkpointer.restore(target, step=2),
    ):
      with pytest.raises(UsageError, match="declares 70,369 GB of arrays"):
        read()


def test_zeros_are_no_shape_that_no_file_holds(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"w": jnp.zeros((4096, 4096))})
    checkpointer.wait()
    checkpointer.verify(1)


def test_what_a_terminal_would_obey_is_not_printed(folder, capsys):
  def escape(fields):
    fields["versions"] = {"jax\x1b[2J": "\x1b]0;title\x07\r"}
    fields["metrics"] = {"\x1b[31mloss": 1.0}

  tamper(folder / "2", escape)
  assert inspect.main([str(folder)]) == 0
  output = capsys.readouterr().out
  assert "loss" in output
  assert not {"\x1b", "\x07", "\r"} & {*output}


@pytest.mark.parametrize("name", ["3", "3.orbax-checkpoint-tmp"])
def test_a_link_in_a_step_s_place(folder, tmp_path, name):
  (tmp_path / "elsewhere").mkdir()
  (folder / name).symlink_to(tmp_path / "elsewhere")
  Checkpointer(folder, read_only=True).close()  # It writes nothing through it.
  with pytest.raises(UsageError, match=f"{name} is a link"):
    Checkpointer(folder)
  assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("read_only", [False, True])
def test_a_pipe_in_a_file_s_place(folder, read_only):
  os.mkfifo(folder / "2" / "state" / "pipe")
  with pytest.raises(UsageError, match="2/state/pipe is neither a file nor a"):
    Checkpointer(folder, read_only=read_only)


def test_what_is_deleted_meanwhile_is_no_pipe(folder, monkeypatch):
  stat, seen = os.stat, []

  def stat_once(path, *args, **kwargs):
    """Finds a file once; then it is deleted."""
    if str(path).startswith(f"{folder}/2/"):
      if path in seen:
        raise FileNotFoundError(errno.ENOENT, "deleted", path)
      seen.append(path)
    return stat(path, *args, **kwargs)

  place = storage.storage(folder)
  monkeypatch.setattr(os, "stat", stat_once)
  for _ in range(2):
    place.check_kinds(read_only=True)
  assert seen


@pytest.mark.parametrize("text", ["[]", "[" * 10**5], ids=["list", "deep"])
def test_metadata_of_a_step_that_orbax_has_not_written(folder, text):
  (folder / "2" / "_CHECKPOINT_METADATA").write_text(text)
  for _ in range(2):  # The lock is let go of.
    with pytest.raises(
      UsageError, match=r"cannot be opened .*delete that file"
    ):
      Checkpointer(folder)
  (folder / "2" / "_CHECKPOINT_METADATA").unlink()
  assert outcome(folder) == "harmless"


def test_inspect(folder, capsys):
  assert inspect.main([str(folder)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("|")[1].strip() for line in lines[2:4]] == ["1", "2"]
  assert all("yes" in line for line in lines[2:4])
  shutil.rmtree(folder / "2" / "state" / "d")
  assert inspect.main([str(folder)]) == 1
  output = capsys.readouterr().out
  assert "step 2 in" in output
  assert inspect.main([str(folder / "nowhere")]) == 2
  assert inspect.main([]) == 2
  assert capsys.readouterr().err.count("error: ") == 2


def test_a_step_that_is_deleted_while_orbax_lists_it(folder, monkeypatch):
  commit_timestamp = step_lib.Metadata.commit_timestamp

  def deleted(step):
    if step.step == 1:
      shutil.rmtree(step.path)
    return commit_timestamp.fget(step)

  monkeypatch.setattr(step_lib.Metadata, "commit_timestamp", property(deleted))
  with Checkpointer(folder, read_only=True) as checkpointer:
    assert checkpointer.steps() == [2]


@pytest.mark.parametrize("deleted", ["", "state"])
def test_inspect_beside_a_run_that_deletes(
  folder, monkeypatch, capsys, deleted
):
  verify = Checkpointer.verify

  def verify_late(checkpointer, step):
    if step == 1:
      note = {"saved": 2, "deleted": [1]}
      (folder / ".deleting").write_text(json.dumps(note))
      shutil.rmtree(folder / "1" / deleted)
    verify(checkpointer, step)

  monkeypatch.setattr(Checkpointer, "verify", verify_late)
  assert inspect.main([str(folder)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("|")[3].strip() for line in lines[2:4]] == [
    "deleted",
    "yes",
  ]


JOB = [
  *(sys.executable, "-m", "train.main", "--config=configs/digits.py"),
  *("--config.optimizer=mechanic", "--config.model.widths=(16,)"),
  *("--config.batch_size=32", "--config.checkpoint_every=20"),
  *("--config.log_every=20", "--config.eval_every=100"),
]


def run(workdir, *arguments, limit="unlimited"):
  """Starts the job; no file may grow beyond `limit` blocks of 1024 bytes."""
  return subprocess.Popen(
    [
      *("bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash"),
      *JOB,
      f"--workdir={workdir}",
      *arguments,
    ],
    cwd=ROOT,
    # Nothing goes into the cache of jax, which warns of what does not fit.
    env=os.environ
    | (
      {}
      if limit == "unlimited"
      else {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    ),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("limit", "words", "options"),
  [
    (4, "error: ", []),
    (
      *(12, "events.out.tfevents"),
      ["--config.log_every=1", "--config.checkpoint_every=120"],
    ),
    (200, "error: saving into", ["--config.model.widths=(256, 256)"]),
  ],
  ids=["config", "metrics", "arrays"],
)
def test_a_full_disk(tmp_path, limit, words, options):
  more = ["--config.num_steps=120", *options]
  process = run(tmp_path, *more, limit=limit)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2
  assert error.startswith("error: ")
  assert words in error
  assert "File too large" in error
  assert "make room" in error
  assert error.count("\n") == 1
  process = run(tmp_path, *more)
  output, error = process.communicate()
  assert process.returncode == 0, error
  assert "done at step 120" in output


@pytest.mark.slow
def test_a_damaged_step_is_told_in_one_line(tmp_path):
  process = run(tmp_path, "--config.num_steps=120")
  process.communicate()
  for each in (tmp_path / "checkpoints" / "120" / "state").rglob("d/*"):
    os.truncate(each, 20)
  process = run(tmp_path, "--config.num_steps=140")
  output, error = process.communicate()
  assert process.returncode == 0, error
  assert "at step 100" in output
  assert "step 120 in" in output
  assert error.count("\n") == 1
  assert "step 120 in" in error
