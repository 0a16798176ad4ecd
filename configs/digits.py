r"""Handwritten digits, 8x8 pixels, from scikit-learn: the smallest job.

  python -m train.main --config=configs/digits.py --config.optimizer=mechanic \
    --workdir=runs/digits

takes 10 seconds on two CPU cores and ends with an eval/accuracy of 0.97, and so
does --config.optimizer=adamw. configs/digits.py:cnn is a small convolutional
network, 0.97 to 0.98 in 15 seconds.
"""

import ml_collections

from configs import default
from flax_mechanic.errors import UsageError, did_you_mean

_MODELS = {
  "": {"name": "mlp", "widths": (256, 256)},
  "cnn": {"name": "cnn", "widths": (32, 64)},
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the job's config.

  Args:
    variant: "" for a multilayer perceptron or "cnn", what follows the colon of
      `configs/digits.py:cnn`.

  Raises:
    UsageError: no such variant.
  """
  if variant not in _MODELS:
    raise UsageError(
      f"configs/digits.py has no variant {variant!r}"
      f"{did_you_mean(variant, filter(None, _MODELS))}"
    )
  config = default.get_config()
  config.task = "digits"
  # name: mlp or cnn; widths: of the hidden layers.
  config.model = ml_collections.ConfigDict(_MODELS[variant])
  return config
