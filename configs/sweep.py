r"""How well each method does untuned, compared with tuned ones.

  python -m train.sweep --config=configs/sweep.py --workdir=runs/sweep

takes 36 to 40 minutes on two cores. configs/sweep.py:quick is a part of it that
takes a minute and a half; :range is about the learning rates that adamw trains
with, and the base learning rates that Mechanic trains with; :ablation changes
one of the flag's options at a time; :bases tunes every optimizer that is tuned
by hand, and puts Mechanic over it.

:schedules compares schedules, and schedule_free, in eight minutes; :oracle
says, in eight, why Mechanic is behind on some jobs.

:confirmation is the jobs that no default was chosen on, which should take 40
minutes, and :confirmation_long the expensive rest of them, two hours and a
half; :sizes is each kind of model once more, by which the flag's base was
chosen, in an hour and a quarter. Their jobs of fine-tuning start from a run
that is trained before:

  python -m train.main --config=configs/text.py:small --config.optimizer=adamw \
    --config.num_steps=1600 --workdir=runs/before

On your own job:

  python -m train.sweep --config=configs/sweep.py --workdir=DIR \
    --config.jobs="('configs/digits.py',)" --config.interpolating="()" \
    --config.methods="('adamw','mechanic')" --config.num_steps="(1000,)"
"""

import os
import sysconfig

import ml_collections

import flax_mechanic
from configs import default

_MOMENTUM = "opt.sgd.momentum=0.9"
_TUNED = ("adamw", "muon", f"sgd: optimizer=sgd {_MOMENTUM}", "lion")
_MECHANIC = (
  "mechanic",
  "mechanic(muon): optimizer=mechanic opt.mechanic.base=muon",
  f"mechanic(sgd): optimizer=mechanic opt.mechanic.base=sgd {_MOMENTUM}",
  "mechanic(lion): optimizer=mechanic opt.mechanic.base=lion",
)
_METHODS = (
  *_TUNED,
  *_MECHANIC,
  "mechanize",
  "prodigy",
  "dadapt_adamw",
  "dog",
  "dowg",
  "cocob",
  "momo",
  "momo_adam",
)
# For jobs with expensive steps.
_EXPENSIVE = "runs_at_once=1 num_steps=(400,1600)"
_VERY_EXPENSIVE = "runs_at_once=1 num_steps=(400,)"
_JOBS = (
  "configs/teacher.py",
  "configs/tabular.py:diabetes model.widths=()",
  "configs/tabular.py:breast_cancer",
  "configs/digits.py:logistic",
  f"configs/text.py:small {_EXPENSIVE}",
  f"configs/text.py:gru {_EXPENSIVE}",
)
_INTERPOLATING = (
  "configs/tabular.py:diabetes",
  "configs/digits.py:mlp",
  "configs/autoencoder.py",
  f"configs/digits.py:small_cnn {_VERY_EXPENSIVE}",
  f"configs/digits.py:vit {_VERY_EXPENSIVE}",
)

# The jobs that no default was chosen on. The list was committed before any two
# optimizers were compared on them; adamw was run at a single rate, to see that
# they train and how long a step takes, and so was muon on one.
#
# A job is here for a kind of training that people do and the jobs above do not
# cover: fine-tuning, LoRA, batch normalization with augmented data, embeddings,
# an LSTM, targets that change, many wrong labels, many layers without
# normalization, a latent variable, more tables, and a deeper language model
# over tokens for longer. Sizes and lengths are what two cores do in the time
# that the docstring says. The list has the rule of the one above: what has new
# examples in every batch, augmented ones included, or noise counts with its
# held-out loss, and what memorizes its examples with its training loss. No job
# is changed or left out after it is run.
_CONFIRMATION = (
  "configs/text.py:tune runs_at_once=1 num_steps=(400,)",
  "configs/text.py:lora runs_at_once=1 num_steps=(400,)",
  "configs/text.py:lstm runs_at_once=1 num_steps=(400,)",
  f"configs/digits.py:augmented {_EXPENSIVE}",
  "configs/digits.py:mlp data.label_noise=0.4",
  "configs/ratings.py",
  "configs/teacher.py:changing",
  "configs/autoencoder.py:vae",
)
_CONFIRMATION_INTERPOLATING = (
  "configs/digits.py:mlp model.widths=(64,64,64,64,64,64,64,64)",
  "configs/tabular.py:iris",
  "configs/tabular.py:wine",
)
_CONFIRMATION_LONG = (
  # The rates around the best of the seven, which two seeds were trained with.
  "configs/text.py:deep runs_at_once=1 num_steps=(6400,)"
  " learning_rates=(0.003,0.01,0.03)",
  "configs/text.py:tune runs_at_once=1 num_steps=(1600,)",
  "configs/text.py:lora runs_at_once=1 num_steps=(1600,)",
  "configs/text.py:lstm runs_at_once=1 num_steps=(1600,)",
)
_CONFIRMED = (*_TUNED, *_MECHANIC)

# Not in the text without a path.
_IDLE = os.path.join(sysconfig.get_path("stdlib"), "idlelib")

# By these jobs the flag's base was chosen, adamw or muon. The rule, committed
# with the list before any two optimizers were compared on it: the base is muon
# if Mechanic over muon has both the smaller geometric mean and the smaller
# worst ratio to tuned adamw, over all of these jobs and lengths. No job is
# changed or left out after it is run.
#
# Each kind of model of the two lists above is here once more, in another size,
# and with another batch, other data or another amount of noise. A third of them
# are of text, which is most of what people train.
_SIZES = (
  "configs/text.py:deep runs_at_once=1 num_steps=(400,1600) seeds=2",
  "configs/text.py:small data.tokenizer=1000 batch_size=16"
  f" {_EXPENSIVE} seeds=3",
  "configs/text.py:small model.positions=learned model.mlp=gelu"
  f" model.num_layers=2 model.dropout=0.1 {_EXPENSIVE} seeds=3",
  "configs/text.py:gru model.embed_dim=48 model.hidden_dim=96 batch_size=16"
  f" {_VERY_EXPENSIVE} seeds=3",
  "configs/text.py:lstm model.embed_dim=48 model.hidden_dim=96 batch_size=16"
  f" {_VERY_EXPENSIVE} seeds=3",
  f"configs/text.py:tune data.path={_IDLE} {_VERY_EXPENSIVE} seeds=3",
  "configs/digits.py:augmented model.widths=(16,32) data.shift=2 batch_size=64"
  f" {_VERY_EXPENSIVE} seeds=3",
  "configs/digits.py:mlp model.widths=(128,) data.label_noise=0.2",
  "configs/teacher.py model.widths=(64,) batch_size=8",
  "configs/teacher.py:changing model.widths=(16,16,16) data.change_every=300",
  "configs/ratings.py model.embed_dim=16 batch_size=128",
  "configs/autoencoder.py:vae model.widths=(64,) model.code=4 batch_size=16",
  "configs/tabular.py:wine model.widths=(64,) data.label_noise=0.1",
)
_SIZES_INTERPOLATING = (
  f"configs/digits.py:vit model.num_layers=4 {_VERY_EXPENSIVE} seeds=3",
  "configs/digits.py:small_cnn model.widths=(16,16,16) batch_size=16"
  f" {_VERY_EXPENSIVE} seeds=3",
  "configs/digits.py:mlp model.widths=(32,32,32,32) batch_size=128",
  "configs/autoencoder.py model.widths=(64,32) model.code=4 batch_size=64",
)

_STABLE = "schedule.name=warmup_stable_decay"
_FEW = {
  "jobs": ("configs/teacher.py", "configs/digits.py:logistic"),
  "interpolating": ("configs/digits.py:mlp", "configs/autoencoder.py"),
}

_RANGE = tuple(10.0**i for i in range(-6, 3))

# Each optimizer that is tuned by hand, and Mechanic over it.
_BASES = [
  name
  for name, row in flax_mechanic.methods().items()
  if row.tuned and not row.wraps and not row.replaces_gradient
]
_OVER = [
  f"mechanic({name}): optimizer=mechanic opt.mechanic.base={name}"
  for name in _BASES
  if name not in flax_mechanic.methods()["mechanic"].refuses
]

_VARIANTS = {
  "": {},
  "quick": {
    **_FEW,
    "methods": (*_TUNED, *_MECHANIC, "mechanize", "prodigy"),
    "num_steps": (400,),
  },
  "confirmation": {
    "jobs": _CONFIRMATION,
    "interpolating": _CONFIRMATION_INTERPOLATING,
    "methods": _CONFIRMED,
  },
  "sizes": {
    "jobs": _SIZES,
    "interpolating": _SIZES_INTERPOLATING,
    "methods": (*_TUNED[:2], *_MECHANIC[:2]),
  },
  "oracle": {
    "jobs": (
      "configs/digits.py:logistic num_steps=(1600,6400)",
      "configs/digits.py:mlp data.label_noise=0.4 num_steps=(1600,)",
      "configs/teacher.py:changing num_steps=(400,1600)",
      "configs/autoencoder.py:vae num_steps=(400,1600)",
      "configs/digits.py:augmented runs_at_once=1 num_steps=(400,) seeds=2",
    ),
    "interpolating": (
      "configs/tabular.py:diabetes num_steps=(400,1600)",
      "configs/digits.py:mlp model.widths=(64,64,64,64,64,64,64,64)"
      " num_steps=(400,)",
      "configs/tabular.py:iris num_steps=(400,)",
    ),
    "methods": ("mechanic",),
    "oracle": True,
  },
  "confirmation_long": {
    "jobs": _CONFIRMATION_LONG,
    "interpolating": (),
    "methods": _CONFIRMED,
  },
  "bases": {
    "jobs": _JOBS[:4],
    "interpolating": _INTERPOLATING[1:3],
    "methods": (*_BASES, *_OVER),
    "num_steps": (400,),
    "seeds": 3,
  },
  "range": {
    **_FEW,
    "methods": ("adamw", *_MECHANIC, "mechanize"),
    "learning_rates": _RANGE,
    "factors": _RANGE,
    "num_steps": (400,),
  },
  "schedules": {
    **_FEW,
    "jobs": (
      *_FEW["jobs"],
      "configs/text.py:small runs_at_once=1 num_steps=(400,) seeds=3",
    ),
    "methods": (
      "adamw",
      f"adamw, stable: optimizer=adamw {_STABLE}",
      *_MECHANIC[:2],
      f"mechanic, stable: optimizer=mechanic {_STABLE}",
      "mechanic(muon), stable: optimizer=mechanic opt.mechanic.base=muon"
      f" {_STABLE}",
      "schedule_free",
      "schedule_free(mechanic): optimizer=schedule_free "
      "opt.schedule_free.base=mechanic",
    ),
    "num_steps": (400, 1600),
  },
  "ablation": {
    **_FEW,
    "methods": (
      "mechanic",
      *(
        f"{label}: optimizer=mechanic opt.mechanic.{field}"
        for label, field in (
          ("one scale", "groups="),
          ("s_init=1e-6", "relative_s_init=0"),
          ("rho=0.001", "relative_s_init=0.001"),
          ("rho=0.1", "relative_s_init=0.1"),
          ("decay=0.01", "weight_decay=0.01"),
          ("mean_decay=False", "mean_decay=False"),
          ("follow_schedule=False", "follow_schedule=False"),
        )
      ),
    ),
    "num_steps": (400, 1600),
  },
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns what to run.

  Args:
    variant: what follows the colon of `configs/sweep.py:quick`, or "".

  Raises:
    UsageError: no such variant.
  """
  default.check_variant("configs/sweep.py", variant, _VARIANTS)
  config = ml_collections.ConfigDict()
  # Config files of jobs with fresh data, noise or few parameters. One half of
  # the held-out examples is for tuning learning rates; the loss on the other
  # half counts. FIELD=VALUE ... may follow a file: fields of this config, for
  # this job alone, and fields of the job.
  config.jobs = _JOBS
  # The same for jobs that memorize their examples. The loss on the training
  # examples counts, and learning rates are tuned for it.
  config.interpolating = _INTERPOLATING
  # NAME of an optimizer, or LABEL: FIELD=VALUE ... with fields of the jobs. The
  # others are compared with the first one.
  config.methods = _METHODS
  # FIELD=VALUE for every job.
  config.fields = ()
  # Peaks to choose from for adamw. For another optimizer that is tuned by hand,
  # and under a wrapper for its base, they are times its relative_rate.
  config.learning_rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
  # For the others: factors of the learned rate, as learning rates of the base.
  config.factors = (1.0,)
  # Lengths of the runs; a job's schedule is stretched to each.
  config.num_steps = (400, 1600, 6400)
  # Seeds, from 0, of the parameters and of the order of the batches.
  config.seeds = 5
  # Evaluations of each run.
  config.evaluations = 10
  # How many runs of a program are vectorized; 0 for all. 1 is faster where a
  # single run keeps the machine busy.
  config.runs_at_once = 0
  # Whether to compare with what no tuner can know: constant scales.
  config.oracle = False
  config.update(_VARIANTS[variant])
  return config
