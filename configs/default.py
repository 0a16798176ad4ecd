"""What every job has; a job's own file starts from here."""

import ml_collections

import flax_mechanic


def get_config() -> ml_collections.ConfigDict:
  """Returns the fields every job has; `task` is for the job to set."""
  config = ml_collections.ConfigDict()
  # A name in train/tasks: the data, the model and the loss.
  config.task = ""
  # Of the initial parameters, the order of the data, dropout and samples.
  config.seed = 0
  # The --workdir of another run, or a folder that Orbax wrote: a new run starts
  # from its parameters and, where they fit, its optimizer's moments.
  config.init_from = ""
  # Leave that optimizer's moments.
  config.init_params_only = False
  # Steps of the whole run; may be raised on a resume.
  config.num_steps = 1000
  # Examples a step, over all devices and hosts together.
  config.batch_size = 64
  # Peak learning rate. Only optimizers that are tuned by hand read it.
  config.learning_rate = 1e-3

  # The learning rate over time, as a shape with peak 1: constant, warmup,
  # warmup_cosine, warmup_linear, rsqrt, or "" for the optimizer's own.
  config.schedule = ml_collections.ConfigDict()
  config.schedule.name = ""
  # Updates from 0 to the peak.
  config.schedule.warmup_steps = 100

  # Steps between evaluations on the held-out split.
  config.eval_every = 100
  # Steps between checkpoints.
  config.checkpoint_every = 500
  # How many of the newest are kept.
  config.checkpoint_keep = 3
  # One every so many steps is kept for ever; 0 for none.
  config.checkpoint_keep_every = 0
  # A metric, such as eval/loss: the one with its smallest value is kept, or
  # with its largest after a minus sign: -eval/accuracy.
  config.checkpoint_best = ""
  # Steps between lines of the log and of metrics.jsonl.
  config.log_every = 10

  # What the model computes in: float32, bfloat16 or float16.
  config.dtype = "float32"
  # What its parameters are kept in.
  config.param_dtype = "float32"

  # The devices of all processes, as a mesh: sizes, at most one of them -1 for
  # the devices that the others leave.
  config.mesh = ml_collections.ConfigDict()
  # The batch is split over these; parameters are whole on each.
  config.mesh.data = -1
  # The batch is split over these too, and so are the parameters (FSDP).
  config.mesh.fsdp = 1
  # Parameters and activations are split over these (tensor parallelism).
  config.mesh.tensor = 1
  # auto or explicit: whether arrays carry their sharding in their types.
  config.mesh.axis_type = "auto"
  # Split the optimizer's state over data and fsdp as well (ZeRO-1).
  config.shard_optimizer_state = False
  # Keep the optimizer's state in pinned host memory.
  config.offload_optimizer_state = False

  # config.optimizer, config.opt.<name>.<option>, config.grad_clip and
  # config.accumulate_steps.
  flax_mechanic.add_optimizer_config(config)
  return config
