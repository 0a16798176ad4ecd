"""Tokens in place of bytes: a tokenizer that is given, or trained here."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError, not_installed
from train.tasks.transformer import BYTES


class Tokens(NamedTuple):
  """The tokens of a text.

  Attributes:
    ids: int32 [n].
    sizes: how many bytes of the text each takes up, int64 [n].
  """

  ids: np.ndarray
  sizes: np.ndarray


class Tokenizer:
  """What the library `tokenizers` reads and writes as one JSON file.

  Attributes:
    json: that file's content.
    vocabulary: how many tokens there are.
  """

  def __init__(self, json: bytes):
    """Reads the content of a file.

    Raises:
      ValueError: it describes no tokenizer.
    """
    try:
      self._tokenizer = _library().Tokenizer.from_buffer(json)
    except ValueError:
      raise
    except Exception as error:  # What the library raises has no class.
      raise ValueError(str(error)) from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self.json = json
    ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
    self.vocabulary = 1 + max(ids, default=0)
    words = map(self._tokenizer.id_to_token, range(self.vocabulary))
    self._letters = np.array([len(word or "") for word in words])

  def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
    """Returns the tokens of each text, without bytes that are not UTF-8."""
    strings = [text.decode(errors="ignore") for text in texts]
    encodings = self._tokenizer.encode_batch(strings, add_special_tokens=False)
    return [
      self._tokens(string, encoding)
      for string, encoding in zip(strings, encodings, strict=True)
    ]

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of tokens, integers [n]."""
    return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

  def _tokens(self, text: str, encoding: Any) -> Tokens:
    ids = np.array(encoding.ids, np.int32)
    # Of tokens of bytes, which may be parts of a character, each letter is one.
    letters = self._letters[ids]
    if letters.sum() == len(text.encode()):
      return Tokens(ids, letters)
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + sum((code >= least).astype(int) for least in _WIDER)
    before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    ends = np.maximum.accumulate(before[ends])
    return Tokens(ids, np.diff(ends, prepend=0))


# The first characters that take two, three and four bytes.
_WIDER = (0x80, 0x800, 0x10000)


def load(path: str) -> Tokenizer:
  """Reads a tokenizer's file.

  Raises:
    UsageError: it cannot be read, is none, or the library is not installed.
  """
  try:
    return Tokenizer(storage.path(path).read_bytes())
  except UsageError:
    raise
  except (OSError, ValueError) as error:
    why = storage.trouble(path, error) or (
      "there is no such file"
      if isinstance(error, FileNotFoundError)
      else getattr(error, "strerror", error)
    )
    raise UsageError(
      f"config.data.tokenizer={path!r} is no tokenizer ({why}); type"
      " --config.data.tokenizer=FILE, a JSON file of the library tokenizers, or"
      " a number of tokens, such as 8000, to train one on the text"
    ) from error


def train(texts: Iterable[bytes], vocabulary: int) -> Tokenizer:
  """Trains byte-pair encoding of bytes; equal texts make equal tokenizers.

  Args:
    texts: to train on.
    vocabulary: how many tokens; fewer, if the texts have no more.

  Raises:
    UsageError: fewer tokens than bytes are asked for.
  """
  if vocabulary < BYTES:
    raise UsageError(
      f"config.data.tokenizer={vocabulary} is too few: there are {BYTES} bytes;"
      " type --config.data.tokenizer=8000, or '' for bytes"
    )
  library = _library()
  tokenizer = library.Tokenizer(library.models.BPE())
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    (text.decode(errors="ignore") for text in texts),
    library.trainers.BpeTrainer(
      vocab_size=vocabulary,
      initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  return Tokenizer(tokenizer.to_str().encode())


def _library() -> Any:
  try:
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers
  except ModuleNotFoundError as error:
    what = "config.data.tokenizer needs tokenizers"
    raise not_installed(what, "text") from error
  return tokenizers
