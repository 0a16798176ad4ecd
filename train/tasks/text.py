"""Next-byte or next-token prediction on any folder of text."""

import functools
import itertools
import math
import pathlib
import re
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError, printable
from train.tasks import corpus, kinds, losses, recurrent, tokens, transformer

_KINDS = {
  "transformer": kinds.Kind(
    transformer.Transformer,
    fields=transformer.FIELDS,
    check=transformer.check,
    config="configs/text.py",
    optional=transformer.OPTIONAL,
  ),
  **{
    name: kinds.Kind(
      recurrent.Recurrent,
      fields=recurrent.FIELDS,
      check=recurrent.check,
      config=f"configs/text.py:{name}",
    )
    for name in recurrent.CELLS
  },
}

# Bytes that a window of tokens is looked for in, for each; twice as many where
# that is not enough.
_BYTES_A_TOKEN = 8
# Tokens at the end of what is read that are not used.
_CUT = 8

# Tests, other people's packages, and folders of tables rather than text.
_NOT_STDLIB = (
  "dist-packages",
  "encodings",
  "idlelib",
  "lib2to3",
  "pydoc_data",
  "site-packages",
  "test",
  "tests",
  "turtledemo",
)


@functools.partial(jax.jit, static_argnames=("graphdef", "length"))
def _sample(graphdef, state, prompt, key, temperature, length):
  """Returns `length` tokens, int32, that follow `prompt` [context_length]."""

  def step(window, key):
    # A model of another trace cannot scan over its layers (flax 0.12).
    model = nnx.merge(graphdef, state)
    model.eval()
    logits = model(window[None])[0, -1]
    noise = jax.random.gumbel(key, logits.shape)
    token = jnp.argmax(logits + temperature * noise).astype(jnp.int32)
    return jnp.append(window[1:], token), token

  return jax.lax.scan(step, prompt, jax.random.split(key, length))[1]


def _left_out(problems: Sequence[str]) -> str:
  """Says which files could not be read."""
  more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
  return f"; left out: {', '.join(problems[:3])}{more}" if problems else ""


def _check(config: ml_collections.ConfigDict) -> None:
  """Raises a UsageError for a field of the job that is out of range."""
  if config.sample_length < 0:
    raise UsageError(
      f"config.sample_length={config.sample_length} must be at least 0; type "
      "--config.sample_length=0 for no text at the end"
    )
  if not 0 <= config.sample_temperature < math.inf:
    raise UsageError(
      f"config.sample_temperature={config.sample_temperature} must be a "
      "finite number of at least 0; type --config.sample_temperature=0.8"
    )
  if config.data.eval_windows < 1:
    raise UsageError(
      f"config.data.eval_windows={config.data.eval_windows} leaves nothing to"
      " evaluate; type --config.data.eval_windows=128"
    )


def _find(path: str) -> tuple[Any, Mapping[str, int], Sequence[str]]:
  """Returns the folder of the text, its files, and why others are left out.

  Args:
    path: config.data.path.

  Raises:
    UsageError: there is no text.
  """
  if path:
    folder = storage.path(path)
    files, problems = corpus.find_text(folder)
  else:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files, problems = corpus.find_text(folder, suffix=".py", skip=_NOT_STDLIB)
  if not files:
    what = f"holds no UTF-8 text{_left_out(problems)}"
    if not folder.is_dir():
      what = "is not a folder"
    raise UsageError(
      f"config.data.path={path!r}: {str(folder)!r}"
      f" {what}; type --config.data.path=FOLDER, a folder of text files"
    )
  return folder, files, problems


class Text:
  """Next-byte or, with config.data.tokenizer, next-token prediction.

  Batches are {"text": uint8 [B, context_length + 1]}. Training windows start
  anywhere in the training files laid end to end; the held-out windows are
  evenly spaced and do not overlap.

  Of tokens "text" is int32, and with config.data.separate_documents there is
  "document", int32 of the same shape, the number of each one's file. With
  either there is "bytes", float32 [B]: what is predicted, in bytes.

  Attributes:
    description: one line about the data, for the log.
    files: what a run keeps of the task, by file name.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self._kind = kinds.find_kind(config.model, _KINDS, "text")
    _check(config)
    self._config = config
    self._window = config.model.context_length + 1
    # Runs of earlier versions have neither field.
    tokenizer = config.data.get("tokenizer", "")
    self._separate = config.data.get("separate_documents", False)
    # How many bytes a window takes, or is first looked for in.
    self._span = self._window * (_BYTES_A_TOKEN if tokenizer else 1)
    folder, files, problems = _find(config.data.path)
    train, held_out = corpus.split_by_file(files)
    self._train = corpus.Corpus(folder, train)
    self._held_out = corpus.Corpus(folder, held_out)
    shorter = min(len(self._train), len(self._held_out))
    if shorter < self._span:
      raise UsageError(
        f"config.data.path={config.data.path!r} has too little text: one side"
        f" of the split by file has {shorter} bytes, and a window takes"
        f" {self._span}; type --config.data.path=FOLDER, a folder with more,"
        " or lower --config.model.context_length"
      )
    self._tokenizer: tokens.Tokenizer | None = None
    self.files: Mapping[str, bytes] = {}
    if tokenizer.isdecimal():
      pieces = _sample_of(self._train, 2**24)
      self._tokenizer = tokens.train(map(bytes, pieces), int(tokenizer))
    elif tokenizer:
      self._tokenizer = tokens.load(tokenizer)
    if self._tokenizer:
      self.files = {"tokenizer.json": self._tokenizer.json}
    sample = _sample_of(self._held_out, 2**22).ravel()
    self.description = (
      f"text: {(len(self._train) + len(self._held_out)) / 1e6:.2g} MB in"
      f" {len(files)} files, {len(held_out)} held out; unigram entropy"
      f" {unigram_entropy(sample):.2f} bits per byte"
      f"{f'; {self._tokenizer.vocabulary} tokens' if self._tokenizer else ''}"
      f"{_left_out(problems)}"
    )

  def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a new model."""
    tokenizer = self._tokenizer
    return self._kind.create(
      self._config.model,
      vocabulary=tokenizer.vocabulary if tokenizer else transformer.BYTES,
      dtype=jnp.dtype(self._config.dtype),
      rngs=rngs,
    )

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns windows at random offsets."""
    rng = np.random.Generator(np.random.Philox(key=[self._config.seed, step]))
    offsets = len(self._train) - self._span + 1
    starts = rng.integers(offsets, size=self._config.batch_size)
    return self._windows(self._train, starts[rows])

  def eval_batches(self) -> list[dict[str, np.ndarray]]:
    """Returns at most config.data.eval_windows windows, in whole batches.

    If the held-out text is too short for a batch of config.batch_size, there is
    one smaller batch.
    """
    count = min(
      self._config.data.eval_windows, len(self._held_out) // self._span
    )
    batch_size = min(self._config.batch_size, count)
    count -= count % batch_size
    starts = np.arange(count) * (len(self._held_out) // count)
    batches = [
      self._windows(self._held_out, part)
      for part in starts.reshape(-1, batch_size)
    ]
    if "bytes" in batches[0]:
      # So that the mean over batches is that of all bytes.
      mean = np.mean([batch["bytes"] for batch in batches])
      for batch in batches:
        batch["bytes"] = np.full(batch_size, mean, np.float32)
    return batches

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean loss in nats per token, accuracy and bits per byte."""
    text = batch["text"].astype(jnp.int32)
    inputs, targets = text[:, :-1], text[:, 1:]
    if "bytes" not in batch:
      loss, metrics = losses.cross_entropy(model(inputs), targets)
      return loss, metrics | {"bits_per_byte": loss / np.log(2.0)}
    where = jnp.ones_like(targets, bool)
    logits_of = model
    if "document" in batch:
      of = batch["document"]
      where = of[:, 1:] == of[:, :-1]
      logits_of = lambda inputs: model(inputs, of[:, :-1])
    loss, metrics = losses.cross_entropy(logits_of(inputs), targets, where)
    bits = loss * where.sum() / np.log(2.0)
    bytes_ = jnp.maximum(batch["bytes"].sum(), 1)
    return loss, metrics | {"bits_per_byte": bits / bytes_}

  def report(self, model: nnx.Module) -> str:
    """Returns config.sample_length tokens that continue the held-out text."""
    graphdef, state = nnx.split(model)
    start = self._windows(self._held_out, np.array([0]))
    sample = _sample(
      graphdef,
      nnx.as_pure(state),
      start["text"][0, :-1].astype(np.int32),
      jax.random.key(self._config.seed),
      self._config.sample_temperature,
      self._config.sample_length,
    )
    # An untrained model writes control characters.
    if self._tokenizer:
      return printable(self._tokenizer.decode(np.asarray(sample)))
    return printable(
      np.asarray(sample, np.uint8).tobytes().decode(errors="replace")
    )

  def _windows(
    self, text: corpus.Corpus, starts: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Returns the batch of the windows that start at these bytes."""
    if not self._tokenizer:
      batch = {"text": text.read(starts, self._window)}
      if not self._separate:
        return batch
      sizes = np.ones_like(batch["text"])
      of = text.files_of(starts, self._window)
    else:
      starts = np.minimum(starts, len(text) - self._span)
      rows = zip(starts.tolist(), text.read(starts, self._span), strict=True)
      ids, sizes, of = zip(
        *(self._tokens(text, start, data) for start, data in rows), strict=True
      )
      batch = {"text": np.stack(ids)}
      sizes, of = np.stack(sizes), np.stack(of)
    counted = sizes[:, 1:]
    if self._separate:
      batch["document"] = (of - of[:, :1]).astype(np.int32)
      counted = np.where(of[:, 1:] == of[:, :-1], counted, 0)
    return batch | {"bytes": counted.sum(1, dtype=np.float32)}

  def _tokens(
    self, text: corpus.Corpus, start: int, data: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a window of tokens that starts near a byte.

    Args:
      text: to read more of, if it takes more.
      start: that byte.
      data: what starts there, uint8 [n].

    Returns:
      The tokens, how many bytes each takes up, and its file, [window] each.
    """
    assert self._tokenizer
    while True:
      span = len(data)
      of = text.files_of(np.array([start]), span)[0]
      cuts = [0, *(1 + np.flatnonzero(np.diff(of))), span]
      parts = [data[a:b].tobytes() for a, b in itertools.pairwise(cuts)]
      # Rather not within a word.
      space = re.search(rb"\s", parts[0][:64])
      parts[0] = parts[0][space.start() if space else 0 :]
      encoded = self._tokenizer.encode(parts)
      ids = np.concatenate([part.ids for part in encoded])
      # The last ones may be of a word that is cut.
      if len(ids) >= self._window + (_CUT if start + span < len(text) else 0):
        sizes = np.concatenate([part.sizes for part in encoded])
        of = np.repeat(of[cuts[:-1]], [len(part.ids) for part in encoded])
        end = self._window
        return ids[:end], sizes[:end], of[:end]
      if span == len(text):
        raise UsageError(
          f"config.data.path={self._config.data.path!r} has too little text:"
          f" one side of the split by file has {len(ids)} tokens, and a window"
          f" takes {self._window}; type --config.data.path=FOLDER, a folder"
          " with more, or lower --config.model.context_length"
        )
      span = min(2 * span, len(text))
      start = min(start, len(text) - span)
      data = text.read(np.array([start]), span)[0]


def unigram_entropy(data: np.ndarray) -> float:
  """Returns the entropy of the bytes in `data`, uint8 [n], in bits per byte."""
  counts = np.bincount(data, minlength=transformer.BYTES)
  p = counts[counts > 0] / len(data)
  return float(-(p * np.log2(p)).sum())


def _sample_of(text: corpus.Corpus, most: int) -> np.ndarray:
  """Returns the whole text, or `most` bytes from all over it, uint8 [n, m]."""
  pieces = 1 if len(text) <= most else 1024
  length = min(len(text), most) // pieces
  return text.read(np.arange(pieces) * (len(text) // pieces), length)
