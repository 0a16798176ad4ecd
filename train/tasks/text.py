"""Next-byte prediction on any folder of text."""

import functools
import pathlib
import sysconfig
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from flax_mechanic.errors import UsageError, printable
from train.tasks import corpus, gru, kinds, losses, transformer

_KINDS = {
  "transformer": kinds.Kind(
    transformer.Transformer,
    fields=transformer.FIELDS,
    check=transformer.check,
    config="configs/text.py",
  ),
  "gru": kinds.Kind(
    gru.Gru,
    fields=gru.FIELDS,
    check=gru.check,
    config="configs/text.py:gru",
  ),
}

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
  """Returns `length` bytes, int32, that follow `prompt` [context_length]."""
  model = nnx.merge(graphdef, state)
  model.eval()

  def step(window, key):
    logits = model(window[None])[0, -1]
    noise = jax.random.gumbel(key, logits.shape)
    byte = jnp.argmax(logits + temperature * noise).astype(jnp.int32)
    return jnp.append(window[1:], byte), byte

  return jax.lax.scan(step, prompt, jax.random.split(key, length))[1]


def _left_out(problems: Sequence[str]) -> str:
  """Says which files could not be read."""
  more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
  return f"; left out: {', '.join(problems[:3])}{more}" if problems else ""


class Text:
  """Next-byte prediction.

  Batches are {"text": uint8 [B, context_length + 1]}. Training windows start
  anywhere in the training files laid end to end; the held-out windows are
  evenly spaced and do not overlap.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self._kind = kinds.find_kind(config.model, _KINDS, "text")
    if config.data.eval_windows < 1:
      raise UsageError(
        f"config.data.eval_windows={config.data.eval_windows} leaves nothing to"
        " evaluate; type --config.data.eval_windows=128"
      )
    self._config = config
    self._window = config.model.context_length + 1
    if config.data.path:
      folder = pathlib.Path(config.data.path).expanduser()
      files, problems = corpus.find_text(folder)
    else:
      folder = pathlib.Path(sysconfig.get_path("stdlib"))
      files, problems = corpus.find_text(folder, suffix=".py", skip=_NOT_STDLIB)
    if not files:
      what = f"holds no UTF-8 text{_left_out(problems)}"
      if not folder.is_dir():
        what = "is not a folder"
      raise UsageError(
        f"config.data.path={config.data.path!r}: {str(folder)!r}"
        f" {what}; type --config.data.path=FOLDER, a folder of text files"
      )
    train, held_out = corpus.split_by_file(files)
    self._train = corpus.Corpus(folder, train)
    self._held_out = corpus.Corpus(folder, held_out)
    shorter = min(len(self._train), len(self._held_out))
    if shorter < self._window:
      raise UsageError(
        f"config.data.path={config.data.path!r} has too little text: one side"
        f" of the split by file has {shorter} bytes, and a window takes"
        f" {self._window}; type --config.data.path=FOLDER, a folder with more,"
        " or lower --config.model.context_length"
      )
    self.description = (
      f"text: {(len(self._train) + len(self._held_out)) / 1e6:.2g} MB in"
      f" {len(files)} files, {len(held_out)} held out; unigram entropy"
      f" {unigram_entropy(_sample_of(self._held_out)):.2f} bits per byte"
      f"{_left_out(problems)}"
    )

  def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a new model."""
    return self._kind.create(
      self._config.model, dtype=jnp.dtype(self._config.dtype), rngs=rngs
    )

  def train_batch(
    self, step: int, rows: slice = slice(None)
  ) -> dict[str, np.ndarray]:
    """Returns windows at random offsets."""
    rng = np.random.Generator(np.random.Philox(key=[self._config.seed, step]))
    offsets = len(self._train) - self._window + 1
    starts = rng.integers(offsets, size=self._config.batch_size)
    return {"text": self._train.read(starts[rows], self._window)}

  def eval_batches(self) -> list[dict[str, np.ndarray]]:
    """Returns at most config.data.eval_windows windows, in whole batches.

    If the held-out text is too short for a batch of config.batch_size, there is
    one smaller batch.
    """
    count = min(
      self._config.data.eval_windows, len(self._held_out) // self._window
    )
    batch_size = min(self._config.batch_size, count)
    count -= count % batch_size
    starts = np.arange(count) * (len(self._held_out) // count)
    return [
      {"text": self._held_out.read(part, self._window)}
      for part in starts.reshape(-1, batch_size)
    ]

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean loss in nats per byte, accuracy and bits per byte."""
    text = batch["text"].astype(jnp.int32)
    loss, metrics = losses.cross_entropy(model(text[:, :-1]), text[:, 1:])
    return loss, metrics | {"bits_per_byte": loss / np.log(2.0)}

  def report(self, model: nnx.Module) -> str:
    """Returns config.sample_length bytes that continue the held-out text."""
    graphdef, state = nnx.split(model)
    sample = _sample(
      graphdef,
      state,
      self._held_out.read(np.array([0]), self._window - 1)[0].astype(np.int32),
      jax.random.key(self._config.seed),
      self._config.sample_temperature,
      self._config.sample_length,
    )
    # An untrained model writes control characters.
    return printable(
      np.asarray(sample, np.uint8).tobytes().decode(errors="replace")
    )


def unigram_entropy(data: np.ndarray) -> float:
  """Returns the entropy of the bytes in `data`, uint8 [n], in bits per byte."""
  counts = np.bincount(data, minlength=transformer.BYTES)
  p = counts[counts > 0] / len(data)
  return float(-(p * np.log2(p)).sum())


def _sample_of(text: corpus.Corpus) -> np.ndarray:
  """Returns the whole text, or 4 MB from all over it."""
  pieces = 1 if len(text) <= 2**22 else 1024
  length = min(len(text), 2**22) // pieces
  return text.read(np.arange(pieces) * (len(text) // pieces), length).ravel()
