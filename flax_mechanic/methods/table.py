"""The table of optimizers: a row for each name that the flag accepts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from flax_mechanic.mechanic import MechanicState, mechanize
from flax_mechanic.methods import features, readers, repairs
from flax_mechanic.methods.guard import guard
from flax_mechanic.methods.registry import default_options, register

_MOVES_PARAMETERS = (
  "mechanic recovers its offset from the parameters, which schedule_free moves "
  "by itself"
)


def _register_mechanic(
  name: str, *, summary: str, advice: str, **defaults: Any
):
  options: dict[str, Any] = {
    "betas": tuple,
    "x0_dtype": str,
    "relative_s_init": float,
  }
  return register(
    name,
    lambda base, learning_rate, **options: mechanize(base, **options),
    options={
      "base": "adamw",
      "learning_rate": 1.0,
      **default_options(mechanize, **options | defaults),
    },
    tuned=False,
    schedule=None,
    unguarded={"spike_factor": 0.0},
    refuses={"schedule_free": _MOVES_PARAMETERS},
    cautions=dict.fromkeys(
      ("lars", "lamb"),
      "mechanic over a method that normalizes its updates (lars, lamb) is not "
      "what it was made for: its authors expect it to work with almost any "
      "first-order optimizer except those",
    ),
    scalars={
      MechanicState: readers.mechanic,
      contrib.MechanicState: readers.optax_mechanic,
    },
    summary=summary,
    advice=advice,
    paper="Cutkosky, Defazio, Mehta 2023, arXiv 2306.00144",
  )


_register_mechanic(
  "mechanic",
  relative_s_init=0.01,
  weight_decay=1e-4,
  mean_decay=True,
  eps=1e-20,
  groups=".*",
  summary="learns the learning rate of any tuned optimizer",
  advice="start here",
)
_register_mechanic(
  "mechanize",
  summary="mechanic with the defaults of optax.contrib.mechanize",
  advice="to compare with optax's; mechanic's own defaults are better",
)

register(
  "adamw",
  optax.adamw,
  options=default_options(optax.adamw, mu_dtype=str),
  decay_mask="mask",
  summary="Adam with decoupled weight decay",
  advice="the usual choice for transformers",
  paper="Loshchilov, Hutter 2019, arXiv 1711.05101",
)
register(
  "adam",
  optax.adam,
  options=default_options(optax.adam, mu_dtype=str),
  summary="adaptive moments",
  advice="adamw, unless weight decay is unwanted",
  paper="Kingma, Ba 2015, arXiv 1412.6980",
)
register(
  "radam",
  optax.radam,
  summary="Adam whose early steps are rectified",
  advice="needs no warm-up",
  paper="Liu et al. 2020, arXiv 1908.03265",
)
register(
  "sgd",
  optax.sgd,
  options=default_options(optax.sgd, momentum=0.9, accumulator_dtype=str),
  summary="SGD with momentum",
  advice="the usual choice for convolutional networks",
  paper="Sutskever et al. 2013, ICML",
)
register(
  "lion",
  optax.lion,
  options=default_options(optax.lion, mu_dtype=str),
  decay_mask="mask",
  summary="sign of momentum, half of Adam's state",
  advice="a tenth of adamw's learning rate",
  paper="Chen et al. 2023, arXiv 2302.06675",
)
register(
  "muon",
  contrib.muon,
  options=default_options(contrib.muon, mu_dtype=str, consistent_rms=float),
  decay_mask="weight_decay_mask",
  summary="orthogonalized momentum for matrices, Adam for the rest",
  advice="transformers; a larger learning rate than adamw's",
  paper="Jordan et al. 2024, kellerjordan.github.io/posts/muon",
)
register(
  "adafactor",
  lambda learning_rate, **options: repairs.box_what_fits(
    optax.adafactor(learning_rate, **options)
  ),
  options=default_options(
    optax.adafactor, momentum=float, weight_decay_rate=float
  ),
  decay_mask="weight_decay_mask",
  summary="Adam with factored second moments",
  advice="when Adam's state does not fit; its rate is relative to the weights",
  paper="Shazeer, Stern 2018, arXiv 1804.04235",
)
register(
  "lars",
  optax.lars,
  options=default_options(
    optax.lars, without=("weight_decay_mask", "trust_ratio_mask")
  ),
  decay_mask="weight_decay_mask",
  summary="SGD whose step is a fraction of each layer's norm",
  advice="very large batches, convolutional networks; a rate of 1 and more",
  paper="You, Gitman, Ginsburg 2017, arXiv 1708.03888",
)
register(
  "lamb",
  optax.lamb,
  decay_mask="mask",
  summary="Adam whose step is a fraction of each layer's norm",
  advice="very large batches, transformers",
  paper="You et al. 2020, arXiv 1904.00962",
)


def _prodigy(learning_rate, **options):
  return repairs.skip_zeros(
    contrib.prodigy(learning_rate, **options), learning_rate
  )


def _dadapt_adamw(learning_rate, **options):
  return repairs.skip_zeros(
    contrib.dadapt_adamw(learning_rate, **options), learning_rate
  )


register(
  "prodigy",
  _prodigy,
  options=default_options(contrib.prodigy, beta3=float),
  tuned=False,
  rounds_to_nothing=True,
  scalars={contrib.ProdigyState: readers.distance_estimate("prodigy")},
  summary="Adam that learns the distance to the solution",
  advice="close to tuned Adam; two more copies of the parameters",
  paper="Mishchenko, Defazio 2023, arXiv 2306.06101",
)
register(
  "dadapt_adamw",
  _dadapt_adamw,
  options=default_options(contrib.dadapt_adamw),
  tuned=False,
  scalars={contrib.DAdaptAdamWState: readers.distance_estimate("dadapt_adamw")},
  summary="AdamW that learns the distance to the solution",
  advice="prodigy, its successor, grows faster",
  paper="Defazio, Mishchenko 2023, arXiv 2301.07733",
)


def _dog(learning_rate, init_step_kind, init_step, averaging, **options):
  kinds = ("heuristic", "distance", "learning_rate")
  if init_step_kind not in kinds:
    raise ValueError(
      f"init_step_kind={init_step_kind!r} is not one of {', '.join(kinds)}"
    )
  tx = contrib.dog(learning_rate, (init_step_kind, init_step), **options)
  return features.average_iterates(tx, averaging) if averaging else tx


register(
  "dog",
  _dog,
  options={
    "learning_rate": 1.0,
    "init_step_kind": "heuristic",
    "init_step": 1e-6,
    "averaging": 8.0,
    "eps": 1e-8,
    "weight_decay": float,
  },
  tuned=False,
  schedule="constant",
  decay_mask="mask",
  rounds_to_nothing=True,
  scalars={contrib.DoGState: readers.dog},
  eval_params={features.AveragedState: readers.averaged},
  summary="SGD whose step is the distance moved over the gradients seen",
  advice="evaluates averaged iterates; init_step=1e-4 with batch norm",
  paper="Ivgi, Hinder, Carmon 2023, arXiv 2302.12022",
)
register(
  "dowg",
  contrib.dowg,
  options=default_options(
    contrib.dowg, init_estim_sq_dist=float, weight_decay=float
  ),
  tuned=False,
  decay_mask="mask",
  scalars={contrib.DoWGState: readers.dowg},
  summary="DoG with gradients weighted by the distance",
  advice="like dog, without averaging",
  paper="Khaled, Mishchenko, Jin 2023, arXiv 2305.16284",
)


def _cocob(learning_rate, alpha, **options):
  def measure(updates, state, params):
    *_, betting = state
    rates = jax.tree.map(
      lambda L, G, R: (L + R) / (L * jnp.maximum(G + L, alpha * L)),
      betting.scale,
      betting.subgradients,
      betting.reward,
    )
    return {
      "cocob/reward": optax.tree.sum(betting.reward),
      "factor": optax.tree.sum(rates) / optax.tree.size(rates),
    }

  return features.measured(
    contrib.cocob(learning_rate, alpha, **options), measure
  )


register(
  "cocob",
  _cocob,
  options=default_options(contrib.cocob),
  tuned=False,
  schedule="constant",
  decay_mask="mask",
  scalars={features.MeasuredState: readers.measured},
  summary="each coordinate bets on its gradient's sign",
  advice="no rate at all; wants a constant schedule",
  paper="Orabona, Tommasi 2017, arXiv 1705.07795",
)


def _momo_step(name, direction, learning_rate, weight_decay):
  """Measures the step s of an update that is a decay - s d.

  Args:
    name: of the method.
    direction: new state -> d.
    learning_rate: the cap on s.
    weight_decay: of the method.
  """

  def measure(updates, state, params):
    decay = learning_rate * weight_decay / (1 + learning_rate * weight_decay)
    moved = jax.tree.map(lambda u, x: u + decay * x, updates, params)
    length = optax.tree.norm(direction(state))
    step = jnp.where(length > 0, optax.tree.norm(moved) / length, 0.0)
    # The effective learning rate has the cap as a factor already.
    fraction = jnp.where(learning_rate > 0, step / learning_rate, 0.0)
    return {f"{name}/step": step, "factor": fraction}

  return measure


def _momo(learning_rate, **options):
  measure = _momo_step(
    "momo",
    lambda state: state.exp_avg,
    jnp.asarray(learning_rate),
    options["weight_decay"],
  )
  return features.measured(contrib.momo(learning_rate, **options), measure)


def _momo_adam(learning_rate, **options):
  def direction(state):
    correction = 1 - options["b2"] ** state.count
    return jax.tree.map(
      lambda m, v: m / (options["eps"] + jnp.sqrt(v / correction)),
      state.exp_avg,
      state.exp_avg_sq,
    )

  measure = _momo_step(
    "momo_adam", direction, jnp.asarray(learning_rate), options["weight_decay"]
  )
  return features.measured(contrib.momo_adam(learning_rate, **options), measure)


register(
  "momo",
  _momo,
  options=default_options(contrib.momo),
  tuned=False,
  needs=frozenset({"value"}),
  scalars={features.MeasuredState: readers.measured},
  summary="momentum whose step follows from the loss and a lower bound",
  advice="losses that are at least lower_bound; the rate is a cap",
  paper="Schaipp et al. 2023, arXiv 2305.07583",
)
register(
  "momo_adam",
  _momo_adam,
  options=default_options(contrib.momo_adam),
  tuned=False,
  needs=frozenset({"value"}),
  scalars={features.MeasuredState: readers.measured},
  summary="Adam whose step follows from the loss and a lower bound",
  advice="losses that are at least lower_bound; the rate is a cap",
  paper="Schaipp et al. 2023, arXiv 2305.07583",
)


def _sam(base, learning_rate, rho, sync_period):
  # SAM's own normalize() divides 0 by 0 on a zero gradient (optax 0.2.8).
  ascent = optax.chain(
    optax.normalize_by_update_norm(eps=1e-12), optax.sgd(rho)
  )
  return repairs.hand_on(
    lambda tx: contrib.sam(
      tx, ascent, sync_period=sync_period, opaque_mode=True
    ),
    base,
  )


register(
  "sam",
  _sam,
  options={"base": "sgd", "rho": 0.05, "sync_period": 2},
  needs=frozenset({"grad_fn"}),
  schedule=None,
  summary="the gradient where the loss is worst within rho",
  advice="generalizes better at twice the time; over any base",
  paper="Foret et al. 2021, arXiv 2010.01412",
)


def _schedule_free(base, learning_rate, b1, **options):
  if not 0 < b1 < 1:
    raise ValueError(f"b1={b1} must be above 0 and below 1")
  return contrib.schedule_free(base, learning_rate, b1=b1, **options)


register(
  "schedule_free",
  _schedule_free,
  options={
    "base": "adamw",
    **default_options(contrib.schedule_free, state_dtype=str),
  },
  schedule="warmup",
  # Its own b1 takes the place of the base's momentum.
  base_options={"b1": 0.0, "momentum": None},
  refuses={
    **dict.fromkeys(
      ("lars", "muon", "momo", "prodigy", "dadapt_adamw"),
      "its momentum cannot be switched off, and schedule_free has its own",
    ),
    "cocob": "cocob's updates are positions, and schedule_free adds them to "
    "another point",
    **dict.fromkeys(("mechanic", "mechanize"), _MOVES_PARAMETERS),
  },
  eval_params={contrib.ScheduleFreeState: readers.schedule_free},
  summary="averages iterates instead of decaying the learning rate",
  advice="warm-up only; a larger learning rate than the base's",
  paper="Defazio et al. 2024, arXiv 2405.15682",
)
register(
  "split_real_and_imaginary",
  lambda base, learning_rate: repairs.hand_on(
    contrib.split_real_and_imaginary, base
  ),
  options={"base": "adamw"},
  schedule=None,
  eval_params={contrib.SplitRealAndImaginaryState: readers.split},
  summary="gives the base real and imaginary parts as separate leaves",
  advice="complex parameters; over any base",
  paper="optax.contrib.split_real_and_imaginary",
)


def _aggregate(l2_norm_clip, noise_multiplier, seed):
  return repairs.on_any_mesh(
    contrib.differentially_private_aggregate(
      l2_norm_clip, noise_multiplier, key=seed
    )
  )


def _dpsgd(learning_rate, momentum, nesterov, guarded=True, **privacy):
  sgd = optax.sgd(learning_rate, momentum, nesterov)
  # contrib.dpsgd hands its seed on to a deprecated argument (optax 0.2.8).
  # What was clipped and noised may be judged without a loss of privacy.
  return optax.chain(_aggregate(**privacy), guard(sgd) if guarded else sgd)


_PRIVACY = {"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "seed": 0}

register(
  "dpsgd",
  _dpsgd,
  options=_PRIVACY | {"momentum": float, "nesterov": False},
  unguarded={"guarded": False},
  needs=frozenset({"per_example"}),
  summary="SGD on clipped and noised per-example gradients",
  advice="differential privacy; large batches, no batch norm",
  paper="Abadi et al. 2016, arXiv 1607.00133",
)
register(
  "differentially_private_aggregate",
  lambda base, learning_rate, **options: optax.chain(
    _aggregate(**options), base
  ),
  options={"base": "adamw"} | _PRIVACY,
  needs=frozenset({"per_example"}),
  schedule=None,
  summary="clipped and noised per-example gradients in front of any base",
  advice="differential privacy with another optimizer than SGD",
  paper="Abadi et al. 2016, arXiv 1607.00133",
)
