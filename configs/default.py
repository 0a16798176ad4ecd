"""The fields that every job has; a job's own file starts from them."""

from collections.abc import Collection

import ml_collections

import flax_mechanic
from flax_mechanic.errors import UsageError, did_you_mean


def get_config() -> ml_collections.ConfigDict:
  """Returns the fields of every job; the job sets `task`."""
  config = ml_collections.ConfigDict()
  # A name in train/tasks: the data, the model and the loss.
  config.task = ""
  # Seed of the initial parameters, the order of the data, dropout and samples.
  config.seed = 0
  # The --workdir of another run, or a folder that Orbax wrote: a new run starts
  # from its parameters and, where they fit, its optimizer's moments.
  config.init_from = ""
  # Whether to leave out the optimizer's moments.
  config.init_params_only = False
  # Steps of the whole run; may be raised when it is resumed.
  config.num_steps = 1000
  # Examples per step, over all devices and hosts.
  config.batch_size = 64
  # Peak learning rate. Only optimizers that are tuned by hand read it.
  config.learning_rate = 1e-3

  # The learning rate over time, scaled to a peak of 1: constant, warmup,
  # warmup_cosine, warmup_linear, warmup_stable_decay, rsqrt, or "" for the
  # optimizer's own.
  config.schedule = ml_collections.ConfigDict()
  config.schedule.name = ""
  # Updates from 0 to the peak.
  config.schedule.warmup_steps = 100

  # Steps between evaluations on the held-out split.
  config.eval_every = 100
  # Steps between checkpoints.
  config.checkpoint_every = 500
  # How many of the newest checkpoints are kept.
  config.checkpoint_keep = 3
  # Steps between checkpoints that are kept forever; 0 for none.
  config.checkpoint_keep_every = 0
  # A metric, such as eval/loss: the checkpoint with its smallest value is kept,
  # and each evaluation that is better is saved. A minus sign keeps the largest
  # value: -eval/accuracy.
  config.checkpoint_best = ""
  # The run ends when so many gradients in a row were skipped, since they were
  # not finite or far larger than usual; 0 for never.
  config.max_skipped_in_a_row = 100
  # Steps between lines of the log and of metrics.jsonl.
  config.log_every = 10

  # The dtype of the model's computation: float32, bfloat16 or float16.
  config.dtype = "float32"
  # The dtype of its parameters.
  config.param_dtype = "float32"

  # The mesh of all processes' devices. Of its sizes, one may be -1, for the
  # devices that the others leave.
  config.mesh = ml_collections.ConfigDict()
  # The batch is split over these devices; the parameters are replicated.
  config.mesh.data = -1
  # The batch and the parameters are split over these (FSDP).
  config.mesh.fsdp = 1
  # Parameters and activations are split over these (tensor parallelism).
  config.mesh.tensor = 1
  # auto, or explicit: arrays have their sharding in their types.
  config.mesh.axis_type = "auto"
  # Split the optimizer's state over data and fsdp as well (ZeRO-1).
  config.shard_optimizer_state = False
  # Keep the optimizer's state in pinned host memory.
  config.offload_optimizer_state = False

  # config.optimizer, config.opt.<name>.<option>, config.guard,
  # config.grad_clip, config.accumulate_steps and others.
  flax_mechanic.add_optimizer_config(config)
  return config


def check_variant(file: str, variant: str, variants: Collection[str]) -> None:
  """Checks what follows the colon of `configs/digits.py:cnn`.

  Args:
    file: the config file.
    variant: what follows, or "".
    variants: those that there are.

  Raises:
    UsageError: no such variant.
  """
  if variant not in variants:
    raise UsageError(
      f"{file} has no variant {variant!r}"
      f"{did_you_mean(variant, filter(None, variants))}"
    )
