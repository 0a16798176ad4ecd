"""The text task: files, windows, what its models compute and write."""

import errno
import math
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import text as text_config
from flax_mechanic import Checkpointer
from flax_mechanic.errors import UsageError
from tests.references import (
  assert_same,
  check_loss,
  check_narrow,
  create,
  f64,
  gelu,
  join,
  linear,
  perturbed,
  softmax,
)
from train.job import make_job
from train.tasks import corpus, make_task, sources
from train.tasks import text as text_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """40 files of random characters, 20 kB."""
  folder = tmp_path_factory.mktemp("text")
  rng = np.random.default_rng(0)
  for i in range(40):
    path = folder / f"part{i % 4}" / f"{i}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(rng.integers(32, 127, size=500, dtype=np.uint8).tobytes())
  return folder


def text(path, variant="tiny", **fields):
  config = text_config.get_config(variant)
  config.data.path = str(path)
  config.update(fields)
  return make_task(config)


# The data.


def test_text_is_found_in_sorted_order(tmp_path):
  written = {
    "b.txt": b"b",
    "a/z.txt": "\N{SNOWMAN}".encode(),
    "a/b/c.md": b"c",
    "empty.txt": b"",
    "nul.txt": b"a\0b",
    "latin1.txt": "\xe9".encode("latin-1"),
    "cut.txt": "\xe9".encode()[:1],
    ".hidden": b"h",
    ".git/config": b"h",
    "__pycache__/a.txt": b"p",
    "skipped/a.txt": b"s",
  }
  for name, data in written.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  files, problems = corpus.find_text(tmp_path, skip=("skipped",))
  assert list(files) == ["a/b/c.md", "a/z.txt", "b.txt"]
  assert files == {name: len(written[name]) for name in files}
  assert not problems
  assert list(corpus.find_text(tmp_path, ".md")[0]) == ["a/b/c.md"]


def test_what_cannot_be_read_is_left_out_and_said(tmp_path, monkeypatch):
  for name in ("a", "b", "secret"):
    (tmp_path / name).write_bytes(b"text " * 99)
  with open(os.fsencode(tmp_path) + b"/caf\xe9", "wb") as file:
    file.write(b"text")

  def refuse(path, *mode, **options):  # Root need not heed a file's mode.
    if path.name == "secret":
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return open(path, *mode, **options)

  monkeypatch.setattr(sources, "open", refuse, raising=False)
  task = text(tmp_path)
  assert "in 2 files" in task.description
  assert task.description.endswith(
    f"; left out: {tmp_path}/caf\udce9: a name that is not UTF-8, "
    f"{tmp_path}/secret: Permission denied"
  )


def test_split_by_file_is_disjoint_and_stable():
  files = {f"{i}.txt": i for i in range(1, 1000)}
  train, held_out = corpus.split_by_file(files)
  assert train | held_out == {path: range(n) for path, n in files.items()}
  assert not train.keys() & held_out.keys()
  assert 50 < len(held_out) < 150
  assert all(zlib.crc32(path.encode()) % 10 == 0 for path in held_out)
  more = files | {f"more{i}.txt": 1 for i in range(1000)}
  assert held_out.items() <= corpus.split_by_file(more)[1].items()


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_text_is_remembered(tmp_path, monkeypatch, read_only):
  data, cache = tmp_path / "data", tmp_path / "cache"
  data.mkdir()
  for name, content in (("a", b"text"), ("b", b"text"), ("c", b"\0")):
    (data / name).write_bytes(content)
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
  monkeypatch.setattr(corpus, "_WORTH_AN_INDEX", 0)
  if read_only:  # Not by its mode, which root need not heed.
    places = corpus._places(data)
    nowhere = tmp_path / "a file" / "index"
    nowhere.parent.write_bytes(b"")
    monkeypatch.setattr(corpus, "_places", lambda _: [nowhere, places[1]])
  read, is_text = [], corpus._is_text

  def record(files, path, size):
    read.append(path)
    return is_text(files, path, size)

  monkeypatch.setattr(corpus, "_is_text", record)
  assert corpus.find_text(data) == ({"a": 4, "b": 4}, [])
  assert sorted(read) == ["a", "b", "c"]
  assert (data / corpus._INDEX).exists() != read_only
  assert cache.exists() == read_only
  # One is rewritten in its size, one is new, one is gone.
  (data / "a").write_bytes(b"te\0t")
  os.utime(data / "a", ns=(0, 0))
  (data / "d").write_bytes(b"more")
  (data / "b").unlink()
  read.clear()
  for _ in range(2):
    assert corpus.find_text(data) == ({"d": 4}, [])
  assert sorted(read) == ["a", "d"]
  # One that is damaged is as good as none.
  for place in corpus._places(data)[int(read_only) :][:1]:
    place.write_text('{"a": [4, 0, "1"]}')
  assert corpus.find_text(data) == ({"d": 4}, [])
  assert len(read) == 5


def test_files_that_change_under_a_run_are_named(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"0123456789" * 100)
  gone = corpus.Corpus(tmp_path, {"a.txt": range(1000)})
  task = text(tmp_path)
  os.truncate(tmp_path / "a.txt", 40)
  with pytest.raises(UsageError, match=r"a.txt has become shorter .* resumes"):
    task.train_batch(0)
  (tmp_path / "a.txt").unlink()
  with pytest.raises(UsageError, match=r"a.txt cannot be read any more \(No"):
    gone.read(np.array([0]), 1)


@pytest.mark.parametrize("count", [2, 3, 9, 25])
@pytest.mark.parametrize("chosen", [True, False])
def test_split_by_file_leaves_neither_side_empty(count, chosen):
  paths = (f"{i}.txt" for i in range(10_000))
  paths = [p for p in paths if (zlib.crc32(p.encode()) % 10 == 0) == chosen]
  files = dict.fromkeys(paths[:count], 4)
  train, held_out = corpus.split_by_file(files)
  assert (train | held_out).keys() == files.keys()
  assert len(held_out) == max(1, count // 10)
  assert len(train) == count - len(held_out)


def test_one_file_holds_out_its_last_tenth():
  train, held_out = corpus.split_by_file({"a": 100})
  assert (train["a"], held_out["a"]) == (range(90), range(90, 100))


def test_text_batches_are_a_pure_function_of_seed_and_step(folder):
  task, again = text(folder, seed=3), text(folder, seed=3)
  for step in (0, 1, 1000):
    batch = task.train_batch(step)
    assert batch["text"].shape == (8, 33)
    assert batch["text"].dtype == np.uint8
    assert_same(batch, again.train_batch(step))
  batch = task.train_batch(1)["text"]
  assert (batch != task.train_batch(2)["text"]).any()
  assert (batch != text(folder, seed=4).train_batch(1)["text"]).any()


def test_text_batches_are_those_of_text_in_memory(folder):
  """Runs of earlier versions resume with the batches that they would see."""
  train, _ = corpus.split_by_file(corpus.find_text(folder)[0])
  data = b"".join((folder / path).read_bytes() for path in train)
  # Longer than a file, so that windows span up to three.
  window = 600
  task = text(folder, seed=3, model={"context_length": window - 1})
  for step in (0, 7):
    rng = np.random.Generator(np.random.Philox(key=[3, step]))
    starts = rng.integers(len(data) - window + 1, size=8)
    expected = [data[start : start + window] for start in starts]
    batch = task.train_batch(step, slice(2, 8))["text"]
    assert [row.tobytes() for row in batch] == expected[2:]


def test_text_windows_come_from_their_own_side(folder):
  train, held_out = (
    b"".join((folder / path).read_bytes() for path in side)
    for side in corpus.split_by_file(corpus.find_text(folder)[0])
  )
  task = text(folder)
  for step in range(5):
    for window in task.train_batch(step)["text"]:
      assert window.tobytes() in train
      assert window.tobytes() not in held_out
  batches = task.eval_batches()
  assert_same(batches, text(folder, seed=9).eval_batches())
  starts = [
    held_out.index(window.tobytes()) for window in join(batches)["text"]
  ]
  assert (np.diff(starts) >= 33).all()
  # Evenly spread over all of it.
  assert np.unique(np.diff(starts)).tolist() == [len(held_out) // len(starts)]


def test_text_windows_reach_both_ends_of_the_data(tmp_path):
  data = np.arange(1, 126, dtype=np.uint8)
  (tmp_path / "a.txt").write_bytes(data.tobytes())
  task = text(tmp_path, model={"context_length": 10}, batch_size=5000)
  batch = task.train_batch(0)["text"]
  # The last tenth, 12 bytes, is held out.
  np.testing.assert_array_equal(np.unique(batch), data[:-12])


@pytest.mark.parametrize(
  ("batch_size", "eval_windows", "shapes"),
  [
    (8, 32, [(8, 33)] * 4),
    (8, 35, [(8, 33)] * 4),
    (8, 3, [(3, 33)]),
    (4096, 10**9, [(60, 33)]),
    (50, 10**9, [(50, 33)]),
  ],
)
def test_text_eval_batches_are_of_one_shape(
  tmp_path, batch_size, eval_windows, shapes
):
  (tmp_path / "a.txt").write_bytes(b"0123456789" * 2000)
  task = text(
    tmp_path, batch_size=batch_size, data={"eval_windows": eval_windows}
  )
  assert [batch["text"].shape for batch in task.eval_batches()] == shapes


def test_standard_library_is_the_default_text():
  task = text("")
  kind, rest = task.description.split(": ", 1)
  assert kind == "text"
  assert float(rest.split(" MB")[0]) >= 4
  assert text("").description == task.description
  for batch in task.eval_batches():
    assert batch["text"].max() < 256


def test_unigram_entropy():
  data = np.repeat(np.arange(256, dtype=np.uint8), 3)
  assert text_task.unigram_entropy(data) == pytest.approx(8)
  data = np.frombuffer(b"aaab", np.uint8)
  expected = 0.25 * 2 + 0.75 * math.log2(4 / 3)
  assert text_task.unigram_entropy(data) == pytest.approx(expected)


# The model.


@pytest.fixture(
  scope="module", params=[("rotary", "swiglu"), ("learned", "gelu")], ids=str
)
def language_model(request, folder):
  """A task and its model, for each kind of positions and of MLP."""
  positions, mlp = request.param
  task = text(
    folder, model={"positions": positions, "mlp": mlp, "num_layers": 2}
  )
  return task, create(task)


@nnx.jit
def forward(model, tokens):
  return model(tokens)


def test_transformer_is_causal(language_model):
  task, model = language_model
  tokens = task.train_batch(0)["text"][:, :-1].astype(np.int32)
  changed = tokens.copy()
  changed[:, 20] = 255
  before, after = np.split(forward(model, np.r_[tokens, changed]), 2)
  np.testing.assert_array_equal(before[:, :20], after[:, :20])
  # It sees what came before as well: every later logit moves.
  moved = np.abs(before - after).max(-1)
  assert (moved[:, 20:] > 0).all()


def test_text_loss_is_the_reference(language_model):
  task, model = language_model
  model = nnx.clone(model)
  # At its initial size the head leaves every loss near ln 256.
  model.head.kernel[...] = 10 * model.head.kernel[...]
  batch = task.train_batch(0)
  logits = reference(model, batch["text"][:, :-1], num_heads=2)
  metrics = check_loss(task, model, batch, logits, batch["text"][:, 1:])
  loss = metrics["loss"]
  assert abs(loss - math.log(256)) > 0.01
  np.testing.assert_allclose(
    metrics["bits_per_byte"], loss / math.log(2), rtol=1e-6
  )


def reference(model, tokens, num_heads):
  """The transformer's logits in float64 NumPy, one example at a time."""

  def norm(layer, x):
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + layer.epsilon)
    return x * scale * f64(layer.scale)

  def attend(layer, x):
    length, dim = len(x), x.shape[1] // num_heads
    heads = []
    for h in range(num_heads):
      q, k, v = (
        x @ f64(f.kernel)[:, h * dim : (h + 1) * dim]
        for f in (layer.query, layer.key, layer.value)
      )
      if layer.rotary:
        q, k = turn(q), turn(k)
      scores = q @ k.T / np.sqrt(dim)
      scores[np.triu_indices(length, 1)] = -np.inf
      heads.append(softmax(scores) @ v)
    return np.concatenate(heads, -1) @ f64(layer.out.kernel)

  def turn(x):
    half = x.shape[1] // 2
    z = x[:, :half] + 1j * x[:, half:]
    angle = np.arange(len(x))[:, None] * 10_000.0 ** -(np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)

  def feed_forward(layer, x):
    up = x @ f64(layer.up.kernel)
    if hasattr(layer, "gate"):
      gate = x @ f64(layer.gate.kernel)
      up = up * gate / (1 + np.exp(-gate))
    else:
      up = gelu(up)
    return up @ f64(layer.down.kernel)

  logits = []
  for example in tokens:
    x = f64(model.embed.embedding)[example]
    if model.positions is not None:
      x = x + f64(model.positions.embedding)[: len(x)]
    for block in model.blocks:
      x = x + attend(block.attention, norm(block.attention_norm, x))
      x = x + feed_forward(block.mlp, norm(block.mlp_norm, x))
    logits.append(norm(model.norm, x) @ f64(model.head.kernel))
  return np.stack(logits)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_loss_is_the_reference(folder, cell):
  task = text(folder, variant=cell)
  model = perturbed(task)
  batch = task.train_batch(0)
  logits = {"gru": gru, "lstm": lstm}[cell](model, batch["text"][:, :-1])
  metrics = check_loss(task, model, batch, logits, batch["text"][:, 1:])
  np.testing.assert_allclose(
    metrics["bits_per_byte"], metrics["loss"] / math.log(2), rtol=1e-6
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def lstm(model, tokens):
  """The LSTM's logits in float64 NumPy, one example at a time."""
  kernel, recurrent = f64(model.cell.dense_i.kernel), model.cell.dense_h
  logits = []
  for example in tokens:
    c, h, states = np.zeros(64), np.zeros(64), []
    for x in f64(model.embed.embedding)[example]:
      i, f, g, o = np.split(x @ kernel + linear(recurrent, h), 4)
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
      h = sigmoid(o) * np.tanh(c)
      states.append(h)
    logits.append(linear(model.head, np.stack(states)))
  return np.stack(logits)


def gru(model, tokens):
  """The GRU's logits in float64 NumPy, one example at a time."""
  kernels = np.split(f64(model.cell.dense_i.kernel), 3, axis=1)
  biases = np.split(f64(model.cell.dense_i.bias), 3)
  recurrent = np.split(f64(model.cell.dense_h.kernel), 3, axis=1)
  logits = []
  for example in tokens:
    h, states = np.zeros(64), []
    for x in f64(model.embed.embedding)[example]:
      of_x = [x @ w + b for w, b in zip(kernels, biases, strict=True)]
      of_h = [h @ w for w in recurrent]
      r, z = (sigmoid(of_x[i] + of_h[i]) for i in range(2))
      n = np.tanh(of_x[2] + r * of_h[2])
      h = (1 - z) * n + z * h
      states.append(h)
    logits.append(linear(model.head, np.stack(states)))
  return np.stack(logits)


def test_dropout_only_where_asked(folder):
  plain = create(text(folder))
  assert not jax.tree.leaves(nnx.state(plain, nnx.RngState))
  task = text(folder, model={"dropout": 0.5})
  model = create(task)
  batch = task.train_batch(0)
  loss = nnx.jit(task.loss)
  assert loss(model, batch)[0] != loss(model, batch)[0]
  model.eval()
  assert loss(model, batch)[0] == loss(model, batch)[0]
  # On either half of a block, where the other one adds nothing.
  for half in (lambda block: block.attention.out, lambda block: block.mlp.down):
    model = create(task)
    for block in model.blocks:
      kernel = half(block).kernel
      kernel.set_value(jnp.zeros_like(kernel.get_value()))
    assert loss(model, batch)[0] != loss(model, batch)[0]


@pytest.mark.parametrize(
  ("variant", "dtype"),
  [
    ("tiny", "bfloat16"),
    ("tiny", "float16"),
    pytest.param("gru", "bfloat16", marks=pytest.mark.slow),
  ],
)
def test_narrow_dtypes(folder, variant, dtype):
  task = text(folder, variant, dtype=dtype)
  check_narrow(task, dtype)
  model = create(task)
  logits = jax.eval_shape(model, jnp.zeros((2, 32), jnp.int32))
  assert (logits.shape, logits.dtype) == ((2, 32, 256), jnp.float32)


def test_report_is_deterministic(folder):
  task = text(folder, sample_length=50, model={"dropout": 0.5})
  model = create(task)
  sample = task.report(model)
  assert 0 < len(sample) <= 50
  assert all(c.isprintable() or c in "\n\t" for c in sample)
  assert sample == task.report(model)
  # The report's evaluation mode is its own.
  assert not model.blocks[0].dropout.deterministic
  assert sample != text(folder, sample_length=50, seed=1).report(model)
  assert text(folder, sample_length=0).report(model) == ""


@pytest.mark.parametrize("scan_layers", [False, True])
def test_report_at_temperature_zero_takes_the_likeliest(folder, scan_layers):
  model = {"scan_layers": scan_layers, "num_layers": 1}
  task = text(folder, sample_length=4, sample_temperature=0.0, model=model)
  model = create(task)
  # Only lower case, so that what is sampled can be shown.
  letters = np.zeros(256)
  letters[97:123] = 1
  model.head.kernel[...] = model.head.kernel[...] * letters
  window = task.eval_batches()[0]["text"][0, :-1].astype(np.int32)
  for letter in task.report(model):
    likeliest = int(forward(model, window[None])[0, -1].argmax())
    assert letter == chr(likeliest)
    window = np.append(window[1:], np.int32(likeliest))


@pytest.mark.slow
def test_lora_trains_its_matrices_from_the_base_on(folder, tmp_path):
  def job(variant):
    config = text_config.get_config(variant)
    config.update(optimizer="adamw", data={"path": str(folder)})
    config.schedule.warmup_steps = 0
    return make_job(config, jax.devices()[:1])

  base, tuned = job("small"), job("lora")
  with jax.set_mesh(base.mesh):
    before = base.create()
    with Checkpointer(tmp_path) as checkpointer:
      checkpointer.save(1, before)
    state, _ = tuned.init_from(str(tmp_path), params_only=True)
    batch = base.train_batch(0)
    of_base, of_tuned = (
      float(each.eval_step(at, batch)["eval/loss"])
      for each, at in ((base, before), (tuned, state))
    )
    assert of_tuned == pytest.approx(of_base, rel=1e-6)
    start = jax.device_get(state["model"])
    for _ in range(2):  # a moves once b is not 0 any more.
      state, _ = tuned.train_step(state, batch)
  start, end = (nnx.to_flat_state(each) for each in (start, state["model"]))
  for (path, a), (_, b) in zip(start, end, strict=True):
    changed = (a.get_value() != b.get_value()).any()
    assert changed == (path[-1] in ("lora_a", "lora_b")), path


# What cannot be run.


def test_unknown_variants_name_the_known_ones():
  with pytest.raises(UsageError, match="did you mean 'tiny'"):
    text_config.get_config("tiney")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model": {"positions": "rotery"}}, "model.positions.*'rotary'"),
    ({"model": {"mlp": "relu"}}, "config.model.mlp='relu'"),
    ({"model": {"num_layers": 0}}, "config.model.num_layers=0"),
    ({"model": {"num_heads": 3}}, "embed_dim=32 must be a multiple of 6"),
    ({"model": {"num_heads": 32}}, "embed_dim=32 must be a multiple of 64"),
    ({"model": {"dropout": 1.0}}, "config.model.dropout=1.0"),
    ({"model": {"lora_rank": -1}}, "config.model.lora_rank=-1"),
    ({"data": {"eval_windows": 0}}, "config.data.eval_windows=0"),
    ({"sample_length": -1}, "config.sample_length=-1 must be at least 0"),
    ({"sample_temperature": -1.0}, "config.sample_temperature=-1.0 must be"),
    ({"sample_temperature": math.nan}, "config.sample_temperature=nan must"),
    ({"model": {"context_length": 5000}}, "too little text.*2500 bytes.*5001"),
  ],
)
def test_transformer_errors(folder, fields, message):
  with pytest.raises(UsageError, match=message):
    text(folder, **fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "lsdm"}, "config.model.name='lsdm' is not a model for text"),
    (
      {"name": "transformer"},
      "remat and has no hidden_dim; type --config=configs/text.py",
    ),
    ({"num_layers": 2}, "'gru' has no num_layers; .*configs/text.py:gru"),
    ({"hidden_dim": 0}, "config.model.hidden_dim=0"),
  ],
)
def test_gru_errors(folder, fields, message):
  with pytest.raises(UsageError, match=message):
    text(folder, variant="gru", model=fields)


@pytest.mark.parametrize("variant", ["", "1b", "8b", "deep"])
def test_large_variants_have_the_fields_of_their_model(folder, variant):
  text(folder, variant)


def test_learned_positions_need_no_even_width(folder):
  text(folder, model={"num_heads": 32, "positions": "learned"})


def test_folders_without_text(tmp_path):
  with pytest.raises(UsageError, match=r"config.data.path.*is not a folder"):
    text(tmp_path / "missing")
  (tmp_path / "binary").write_bytes(b"\0")
  with pytest.raises(UsageError, match=r"config.data.path.*holds no UTF-8"):
    text(tmp_path)
  with pytest.raises(UsageError, match=r"config.data.path.*is not a folder"):
    text(tmp_path / "binary")
