r"""A language model on any folder of text: a transformer, a GRU or an LSTM.

  python -m train.main --config=configs/text.py --config.optimizer=mechanic \
    --config.data.path=FOLDER --workdir=runs/text

Without a path the text is Python's standard library, 8 MB. On that it takes a
minute on two CPU cores and ends with an eval/bits_per_byte of 2.4;
--config.optimizer=adamw, with the learning_rate of 3e-3 below, ends with 2.6,
and the entropy of single bytes is 4.5. configs/text.py:tiny is for tests and
takes seconds.

Three more take 400 steps of 8 windows of 32 bytes, 15 to 25 seconds, and end
with these values of eval/bits_per_byte, where adamw has a learning_rate of 3e-3
and - was not run:

  variant  mechanic  adamw
  :small        3.3    3.6  a transformer of one layer
  :gru          2.9    3.5  a recurrent network
  :lstm           -    3.8  another one

:tune and :lora are :small on other text, after the standard library. With adamw
they end with 2.4 and 2.9, 400 steps after

  python -m train.main --config=configs/text.py:small --config.optimizer=adamw \
    --config.num_steps=1600 --workdir=runs/before

:deep has four layers over 512 tokens; with adamw it ends with 2.7.
"""

import os
import sysconfig
from typing import Any

import ml_collections

from configs import default


def _transformer(**sizes: Any) -> dict[str, Any]:
  """Returns config.model of a transformer."""
  return {
    "name": "transformer",
    # rotary or learned.
    "positions": "rotary",
    # swiglu or gelu.
    "mlp": "swiglu",
    # Dropout rate of the output of each block's two halves.
    "dropout": 0.0,
    # Stack the layers' parameters in one array and loop over the layers: that
    # compiles in the time of one layer. Optimizers that work layer by layer
    # (lars, lamb, galore) then take the stack for one layer.
    "scan_layers": False,
    # Recompute each block in the backward pass instead of keeping its
    # activations.
    "remat": False,
    **sizes,
  }


# What the three share.
_SMALL = {
  "num_steps": 400,
  "batch_size": 8,
  "schedule": {"warmup_steps": 40},
  "checkpoint_every": 100,
}
_SMALL_MODEL = _transformer(
  num_layers=1,
  num_heads=2,
  embed_dim=32,
  mlp_dim=96,
  context_length=32,
)

# What fine-tuning of :small has in common.
_TUNE = {
  **_SMALL,
  "init_from": "runs/before",
  "init_params_only": True,
  # Tables of characters, which are not in the text without a path.
  "data": {"path": os.path.join(sysconfig.get_path("stdlib"), "encodings")},
}

# By variant: the fields that differ from configs/default.py, and the model.
_VARIANTS = {
  "": {
    "num_steps": 400,
    "batch_size": 16,
    "schedule": {"warmup_steps": 40},
    "checkpoint_every": 100,
    "model": _transformer(
      num_layers=2,
      num_heads=4,
      embed_dim=128,
      mlp_dim=384,
      context_length=128,
    ),
  },
  "1b": {
    "num_steps": 20_000,
    "batch_size": 256,
    "schedule": {"warmup_steps": 500},
    "learning_rate": 3e-4,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "dtype": "bfloat16",
    "mesh": {"data": 1, "fsdp": -1},
    "model": _transformer(
      num_layers=24,
      num_heads=16,
      embed_dim=2048,
      mlp_dim=6144,
      context_length=2048,
      scan_layers=True,
      remat=True,
    ),
  },
  "8b": {
    "num_steps": 50_000,
    "batch_size": 256,
    "schedule": {"warmup_steps": 1000},
    "learning_rate": 2e-4,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "dtype": "bfloat16",
    "mesh": {"data": 1, "fsdp": -1},
    "model": _transformer(
      num_layers=32,
      num_heads=32,
      embed_dim=4096,
      mlp_dim=14_336,
      context_length=2048,
      scan_layers=True,
      remat=True,
    ),
  },
  "tiny": {
    "num_steps": 50,
    "batch_size": 8,
    "schedule": {"warmup_steps": 5},
    "eval_every": 25,
    "checkpoint_every": 25,
    "model": _transformer(
      num_layers=1,
      num_heads=2,
      embed_dim=32,
      mlp_dim=64,
      context_length=32,
    ),
  },
  "small": {**_SMALL, "model": _SMALL_MODEL},
  "deep": {
    **_SMALL,
    "data": {"tokenizer": "512"},
    "model": _transformer(
      num_layers=4,
      num_heads=4,
      embed_dim=64,
      mlp_dim=192,
      context_length=64,
    ),
  },
  "tune": {**_TUNE, "model": _SMALL_MODEL},
  "lora": {
    **_TUNE,
    # All but the matrices of low rank.
    "freeze": ("^(?!.*lora_)",),
    # Each linear layer's kernel has a product of that rank added to it.
    "model": {**_SMALL_MODEL, "lora_rank": 4},
  },
  **{
    name: {
      **_SMALL,
      "model": {
        "name": name,
        "embed_dim": 32,
        "hidden_dim": 64,
        "context_length": 32,
      },
    }
    for name in ("gru", "lstm")
  },
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the job's config.

  Args:
    variant: what follows the colon of `configs/text.py:tiny`, or "".

  Raises:
    UsageError: no such variant.
  """
  default.check_variant("configs/text.py", variant, _VARIANTS)
  config = default.get_config()
  config.task = "text"
  # For adamw; other optimizers that are tuned by hand need another one.
  config.learning_rate = 3e-3
  # In a stack of layers, kernels and vectors have one more axis.
  config.opt.muon.matrices = (
    "blocks/[a-z_]+/ bio",
    "blocks/[a-z_]+/ bb",
    *config.opt.muon.matrices,
  )

  config.data = ml_collections.ConfigDict()
  # A folder of UTF-8 text, which may be in a bucket; "" for the sources of
  # Python's standard library.
  config.data.path = ""
  # "" for bytes; a tokenizer, as a JSON file of the library tokenizers; or a
  # number of tokens, such as 8000, of a byte-pair encoding of the text.
  config.data.tokenizer = ""
  # Whether each file is its own document: in a window over several files,
  # nothing is predicted from another one.
  config.data.separate_documents = False
  # Largest number of held-out windows of context_length tokens per evaluation.
  config.data.eval_windows = 128

  # Length in tokens of the sample that is shown at the end of the run.
  config.sample_length = 256
  # 0 takes the most likely token each time; 1 samples from the model's
  # distribution.
  config.sample_temperature = 0.8

  config.update(_VARIANTS[variant])
  return config
