"""Tokens in place of bytes, and documents that do not see each other."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import create, join
from test_train import Writer, make_config

from configs import text as text_config
from flax_mechanic.errors import UsageError
from train import loop
from train.job import make_job
from train.tasks import corpus, losses, make_task, tokens

WORDS = [
  "naïve ",
  "the ",
  "cat\n",
  "\N{SNOWMAN} ",
  "日本",
  "\U0001f600",
  "sat ",
]
MODELS = {
  "rotary": ("tiny", {"num_layers": 2}),
  "learned": ("tiny", {"positions": "learned", "scan_layers": True}),
  "lstm": ("lstm", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """300 files of 10 to 160 characters of one to four bytes."""
  folder = tmp_path_factory.mktemp("words")
  rng = np.random.default_rng(0)
  for i in range(300):
    count = int(rng.integers(5, 40))
    content = "".join(rng.choice(WORDS, count))
    (folder / f"{i}.txt").write_text(content, encoding="utf-8")
  return folder


def make(folder, variant="tiny", model=(), **data):
  config = text_config.get_config(variant)
  config.data.update(path=str(folder), **data)
  config.update(batch_size=4, model={"context_length": 16, **dict(model)})
  return make_task(config)


def test_windows_are_tokens_of_the_text(folder):
  task = make(folder, tokenizer="280")
  paths = corpus.split_by_file(corpus.find_text(folder)[0])[0]
  whole = b"".join((folder / path).read_bytes() for path in paths)
  decode = lambda ids: task._tokenizer.decode(ids).encode()
  for step in range(20):
    batch = task.train_batch(step)
    assert batch["text"].shape == (4, 17)
    assert batch["text"].dtype == np.int32
    for ids, size in zip(batch["text"], batch["bytes"], strict=True):
      # At its ends a window may hold a part of a character.
      if b"\xef\xbf\xbd" not in decode(ids) + decode(ids[:1]):
        assert decode(ids) in whole
        assert size == len(decode(ids)) - len(decode(ids[:1]))
    part = task.train_batch(step, slice(1, 3))
    assert (part["text"] == batch["text"][1:3]).all()


@pytest.mark.parametrize("data", [{}, {"separate_documents": True}], ids=str)
def test_bits_per_byte_are_those_of_all_that_is_predicted(folder, data):
  task = make(folder, tokenizer="280", eval_windows=28, **data)
  batches = task.eval_batches()
  assert len(batches) > 1
  model = create(task)
  loss = nnx.jit(task.loss)
  mean = np.mean([loss(model, batch)[1]["bits_per_byte"] for batch in batches])
  batch = join(batches)
  seen = batch["text"][:, :-1]
  args = (seen, batch["document"][:, :-1]) if data else (seen,)
  call = nnx.jit(lambda model, *args: model(*args))
  logits = np.asarray(call(model, *args), np.float64)
  nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
    logits, batch["text"][:, 1:, None], -1
  ).squeeze(-1)
  sizes = task._tokenizer._letters[batch["text"][:, 1:]]
  same = np.ones_like(nats, bool)
  if data:
    same = batch["document"][:, 1:] == batch["document"][:, :-1]
    assert not same.all()
  bits = nats[same].sum() / np.log(2)
  np.testing.assert_allclose(mean, bits / sizes[same].sum(), rtol=1e-5)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "rotary"))
    for name in MODELS
  ],
)
def test_a_document_is_seen_as_if_it_were_alone(folder, name):
  variant, model_fields = MODELS[name]
  task = make(folder, variant, model_fields, separate_documents=True)
  model = create(task)
  call = nnx.jit(lambda model, *args: model(*args))
  ids = task.train_batch(0)["text"][:1, :11].astype(np.int32)
  of = np.repeat([[0, 1, 2]], [5, 1, 5], axis=1)
  packed = call(model, ids, of)[0]
  for start, stop in ((0, 5), (5, 6), (6, 11)):
    alone = call(model, ids[:, start:stop])[0]
    np.testing.assert_allclose(packed[start:stop], alone, atol=1e-5)
  together = call(model, ids)[0]
  assert np.abs(packed[6:] - together[6:]).max() > 1e-3


def test_targets_do_not_cross_documents(folder):
  task = make(folder, separate_documents=True)
  batches = [task.train_batch(step) for step in range(80)]
  batch = next(batch for batch in batches if batch["document"].max())
  crossed = np.diff(batch["document"]) != 0
  assert (batch["bytes"] == 16 - crossed.sum(1)).all()
  row = int(np.argmax(crossed.any(1)))
  at = int(np.argmax(crossed[row])) + 1
  # The first byte of a document is no target, and what follows is not asked.
  model, loss = create(task), nnx.jit(task.loss)
  short = {k: v[row : row + 1] for k, v in batch.items()}
  short = {k: v[:, : at + 1] if v.ndim > 1 else v for k, v in short.items()}
  before = loss(model, short)[0]
  short["text"] = short["text"].copy()
  short["text"][0, at] ^= 1
  assert loss(model, short)[0] == before


def test_what_is_not_asked_for_counts_in_no_mean():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(4, 9, 3)))
  labels = jnp.asarray(rng.integers(3, size=(4, 9)))
  where = rng.random((4, 9)) < 0.5
  found = losses.cross_entropy(logits, labels, where)
  wanted = losses.cross_entropy(logits[where], labels[where])
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


def lossy():
  """A tokenizer of lower-case words, whose letters are not bytes."""
  import tokenizers

  words = ["[UNK]", "naïve", "the", "cat", "\N{SNOWMAN}", "日本"]
  vocab = {word: i for i, word in enumerate(words)}
  model = tokenizers.models.WordLevel(vocab, unk_token="[UNK]")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return tokenizer.to_str().encode()


def test_every_byte_is_of_a_token():
  text = "The NAÏVE  cat \N{SNOWMAN} ran 日本"
  (encoded,) = tokens.Tokenizer(lossy()).encode([text.encode()])
  assert encoded.ids.tolist() == [2, 1, 3, 4, 0, 5]
  assert encoded.sizes.tolist() == [3, 7, 5, 4, 4, 7]
  assert encoded.sizes.sum() == len(text.encode())
  # The last and the first characters of each width.
  edges = "\x7f \x80 \u07ff \u0800 \uffff \U00010000"
  (encoded,) = tokens.Tokenizer(lossy()).encode([edges.encode()])
  assert encoded.sizes.tolist() == [1, 3, 3, 4, 4, 5]


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(folder, tmp_path):
  fields = {"data__path": str(folder), "sample_length": 8, "batch_size": 8}
  fields |= {"num_steps": 6, "data__eval_windows": 8}
  config = make_config(
    text_config.get_config, "tiny", data__tokenizer="280", **fields
  )
  loop.train(config, tmp_path / "run", Writer())
  kept = tmp_path / "run" / "tokenizer.json"
  assert len(json.loads(kept.read_bytes())["model"]["vocab"]) == 280
  config.data.tokenizer = "281"
  with pytest.raises(UsageError, match=r"another than .* type --config.data"):
    loop.train(config, tmp_path / "run", Writer())
  config.data.tokenizer = str(kept)
  loop._check_files(make_job(config), kept.parent)


@pytest.mark.parametrize(
  ("tokenizer", "message"),
  [
    ("255", "config.data.tokenizer=255 is too few"),
    ("missing.json", "'missing.json' is no tokenizer .there is no such file"),
    ("notes.json", "notes.json' is no tokenizer .*a number of tokens"),
  ],
)
def test_what_is_no_tokenizer_is_said(folder, tmp_path, tokenizer, message):
  if tokenizer == "notes.json":
    tokenizer = str(tmp_path / tokenizer)
    (tmp_path / "notes.json").write_text("{}")
  with pytest.raises(UsageError, match=message):
    make(folder, tokenizer=tokenizer)


def test_without_the_library_it_is_said(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  for tokenizer in ("280", str(folder / "0.txt")):
    with pytest.raises(
      UsageError, match=r"^config.data.tokenizer needs .*pip install .*\[text\]"
    ):
      make(folder, tokenizer=tokenizer)


def test_too_few_tokens_are_said(tmp_path):
  (tmp_path / "a.txt").write_text("a" * 3000)
  task = make(tmp_path, tokenizer="270")
  with pytest.raises(UsageError, match=r"too little text: one side .* tokens"):
    task.eval_batches()
