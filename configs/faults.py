"""The jobs and methods that faults are tried on.

  python -m train.faults
  python -m train.faults.gradients

The first prints how many trials of each kind ended with the numbers of an
undisturbed run or with one sentence: all of them. The second prints what bad
gradients cost each method, without the guard and with it: hardly anything.
"""

import email
from pathlib import Path

import ml_collections

_DIGITS = "configs/digits.py:mlp model.widths=(8,) batch_size=8"
_CNN = "configs/digits.py:small_cnn model.widths=(4,4) batch_size=8"
_LOGISTIC = "configs/digits.py:logistic batch_size=8"
_CANCER = "configs/tabular.py:breast_cancer"
_DIABETES = "configs/tabular.py:diabetes model.widths=(8,)"
_TEXT = (
  f"configs/text.py:tiny data.path={Path(email.__file__).parent} "
  "data.eval_windows=16 sample_length=8"
)


def get_config() -> ml_collections.ConfigDict:
  """Returns the jobs of the campaign, and the methods of the table."""
  config = ml_collections.ConfigDict()
  # A config file, and fields of it.
  config.jobs = (
    f"{_DIGITS} optimizer=mechanic",
    f"{_TEXT} optimizer=mechanic",
    f"{_CANCER} optimizer=mechanic opt.mechanic.base=sgd",
    f"{_CNN} optimizer=mechanic opt.mechanic.base=lion accumulate_steps=2",
    f"{_DIABETES} optimizer=mechanize",
    f"{_DIGITS} optimizer=mechanic param_dtype=bfloat16",
    f"{_TEXT} optimizer=adamw learning_rate=0.003",
    f"{_DIGITS} optimizer=schedule_free learning_rate=0.01",
    f"{_LOGISTIC} optimizer=prodigy",
    f"{_DIABETES} optimizer=sgd learning_rate=0.03",
    f"{_DIGITS} optimizer=dpsgd learning_rate=0.03",
    f"{_CANCER} optimizer=cocob",
    f"{_CNN} optimizer=muon learning_rate=0.01",
  )
  # The same, run by two processes.
  config.jobs_of_two = (
    f"{_DIGITS} optimizer=mechanic",
    f"{_TEXT} optimizer=adamw learning_rate=0.003 mesh.fsdp=2 mesh.data=1",
  )
  # NAME of an optimizer, or LABEL: FIELD=VALUE ... with fields of the job.
  config.methods = (
    "mechanic(adamw): optimizer=mechanic",
    "mechanic(sgd): optimizer=mechanic opt.mechanic.base=sgd",
    "mechanic(lion): optimizer=mechanic opt.mechanic.base=lion",
    "mechanize",
    "mechanic, bfloat16: optimizer=mechanic param_dtype=bfloat16",
    "mechanic, accumulated: optimizer=mechanic accumulate_steps=2",
    "adamw: optimizer=adamw learning_rate=0.03",
    "sgd: optimizer=sgd learning_rate=0.3",
    "lion: optimizer=lion learning_rate=0.01",
    "muon: optimizer=muon learning_rate=0.05",
    "prodigy",
    "schedule_free: optimizer=schedule_free learning_rate=0.03",
    "cocob",
    "dowg",
    "momo_adam",
  )
  return config
