r"""Handwritten digits, 8x8 pixels, from scikit-learn: the smallest job.

  python -m train.main --config=configs/digits.py --config.optimizer=mechanic \
    --workdir=runs/digits

takes 10 seconds on two CPU cores and ends with an eval/accuracy of 0.97, and so
does --config.optimizer=adamw. configs/digits.py:cnn is a small convolutional
network, 0.97 to 0.98 in 15 seconds.

Five more take 400 steps of 32 images, 10 to 15 seconds, and end with these
values of eval/accuracy, where adamw has a learning_rate of 3e-3 and - was not
run:

  variant     mechanic  adamw
  :logistic       0.92   0.89  no hidden layer, and a tenth of the labels random
  :mlp            0.97   0.96  two hidden layers of 64
  :small_cnn      0.98   0.96
  :vit            0.93   0.90  a vision transformer
  :augmented         -   0.93  batch normalization, and images that are moved
"""

import ml_collections

from configs import default

# What the five share; the learning rate is adamw's.
_SMALL = {
  "num_steps": 400,
  "batch_size": 32,
  "schedule": {"warmup_steps": 40},
  "learning_rate": 3e-3,
}

# By variant: the fields that differ from configs/default.py, and the model.
_VARIANTS = {
  "": {"model": {"name": "mlp", "widths": (256, 256)}},
  "cnn": {"model": {"name": "cnn", "widths": (32, 64)}},
  "logistic": {
    **_SMALL,
    "data": {"label_noise": 0.1},
    "model": {"name": "logistic"},
  },
  "mlp": {**_SMALL, "model": {"name": "mlp", "widths": (64, 64)}},
  "small_cnn": {**_SMALL, "model": {"name": "cnn", "widths": (8, 16)}},
  "augmented": {
    **_SMALL,
    # Each time they are seen, images are moved by up to so many pixels.
    "data": {"shift": 1},
    "model": {"name": "cnn", "widths": (8, 16), "batch_norm": True},
  },
  "vit": {
    **_SMALL,
    "model": {
      "name": "vit",
      "num_layers": 2,
      "num_heads": 4,
      "embed_dim": 32,
      "mlp_dim": 64,
    },
  },
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the job's config.

  Args:
    variant: what follows the colon of `configs/digits.py:cnn`, or "".

  Raises:
    UsageError: no such variant.
  """
  default.check_variant("configs/digits.py", variant, _VARIANTS)
  config = default.get_config()
  config.task = "digits"

  config.data = ml_collections.ConfigDict()
  # The fraction of the training labels that is replaced by random classes.
  config.data.label_noise = 0.0

  # name: logistic, mlp, cnn or vit; each has its own fields. widths: of the
  # hidden layers.
  config.update(_VARIANTS[variant])
  return config
