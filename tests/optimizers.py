"""The table that drives the shared tests: what each row needs to learn."""

from flax_mechanic import methods

# Rows that are tuned by hand, tuned for digits in 200 steps; the others learn
# their learning rate and are not listed.
LEARNING_RATES = {
  "adamw": 1e-2,
  "adam": 1e-2,
  "radam": 3e-2,
  "sgd": 0.05,
  "lion": 1e-2,
  "muon": 5e-2,
  "adafactor": 3e-2,
  "lars": 5.0,
  "lamb": 3e-2,
  "sam": 0.05,
  "schedule_free": 3e-2,
  "split_real_and_imaginary": 1e-2,
  "dpsgd": 0.5,
  "differentially_private_aggregate": 1e-2,
}
NAMES = list(methods())


def configure(config, name):
  """Flips the flag, and for a tuned method sets its learning rate."""
  config.optimizer = name
  if name in LEARNING_RATES:
    config.learning_rate = LEARNING_RATES[name]
  else:
    del config.learning_rate
  return config
