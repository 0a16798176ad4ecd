r"""A class, or a number, from a row of measurements; from scikit-learn.

  python -m train.main --config=configs/tabular.py:breast_cancer \
    --config.optimizer=mechanic --workdir=runs/breast_cancer

is a logistic regression with a tenth of the training labels random. It takes 8
seconds on two CPU cores and ends with an eval/accuracy of 0.93;
--config.optimizer=adamw, with the learning_rate of 3e-3 below, ends with 0.92.

configs/tabular.py:diabetes is a small network that predicts a number whose
variance is 1. It ends with an eval/loss, the mean squared error, of 0.50 with
both optimizers; so does linear least squares.

:iris and :wine are small networks for three classes. With adamw they end with
an eval/loss of 0.26 and 0.087.
"""

import ml_collections

from configs import default

_VARIANTS = {
  "breast_cancer": {"data": {"label_noise": 0.1}, "model": {"widths": ()}},
  **{
    name: {"data": {"label_noise": 0.0}, "model": {"widths": (32,)}}
    for name in ("diabetes", "iris", "wine")
  },
}


def get_config(variant: str = "breast_cancer") -> ml_collections.ConfigDict:
  """Returns the job's config.

  Args:
    variant: the table: breast_cancer, diabetes, iris or wine; what follows the
      colon of `configs/tabular.py:diabetes`.

  Raises:
    UsageError: no such variant.
  """
  default.check_variant("configs/tabular.py", variant, _VARIANTS)
  config = default.get_config()
  config.task = "tabular"
  config.num_steps = 400
  config.batch_size = 32
  config.schedule.warmup_steps = 40
  config.learning_rate = 3e-3

  config.data = ml_collections.ConfigDict()
  # breast_cancer, diabetes, iris or wine.
  config.data.name = variant
  # The fraction of the training labels that is replaced by random classes; 0.0
  # where the target is a number.
  config.data.label_noise = 0.0

  config.model = ml_collections.ConfigDict()
  # Widths of the hidden layers; () is a linear model.
  config.model.widths = ()

  config.update(_VARIANTS[variant])
  return config
