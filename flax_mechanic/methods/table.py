"""The table of optimizers: a row for each name that the flag accepts."""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from flax_mechanic.mechanic import MechanicState, mechanize
from flax_mechanic.methods import features, muon, readers, repairs
from flax_mechanic.methods.guard import guard
from flax_mechanic.methods.registry import default_options, leave_out, register

_POSITIONS = (
  "its updates lead to positions, and the wrapper adds them to another point"
)


def _mechanic(base, learning_rate, follow_schedule, **options):
  schedule = learning_rate if follow_schedule else None
  return mechanize(base, schedule=schedule, **options)


def _register_mechanic(
  name: str,
  *,
  summary: str,
  advice: str,
  follow_schedule: bool = False,
  **defaults: Any,
):
  options: dict[str, Any] = {
    "betas": tuple,
    "x0_dtype": str,
    "relative_s_init": float,
  }
  return register(
    name,
    _mechanic,
    options={
      "base": "adamw",
      "learning_rate": 1.0,
      "follow_schedule": follow_schedule,
      **default_options(mechanize, **options | defaults),
    },
    tuned=False,
    schedule=None,
    unguarded={"spike_factor": 0.0},
    refuses={
      "schedule_free": "it averages what mechanic moves; type "
      "--config.optimizer=schedule_free "
      "--config.opt.schedule_free.base=mechanic",
      "madgrad": _POSITIONS,
      "fromage": "its steps are as large as the weights, which they make grow, "
      "so that mechanic diverges",
    },
    cautions={
      **dict.fromkeys(
        ("lars", "lamb"),
        "mechanic over a method that normalizes its updates (lars, lamb) is "
        "not what it was made for: its authors expect it to work with almost "
        "any first-order optimizer except those",
      ),
      "acprop": "mechanic over acprop may diverge: acprop divides a gradient "
      "by the variance of those before it, so one that is larger than they "
      "were moves the parameters without bound; adabelief's does not",
    },
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
  follow_schedule=True,
  summary="learns the learning rate of any tuned optimizer",
  advice="start here",
)
_register_mechanic(
  "mechanize",
  summary="mechanic with the defaults of optax.contrib.mechanize",
  advice="to compare with optax's; mechanic's own defaults are better",
)

# The types of options whose default is None in optax.
_TYPES = {
  "accumulator_dtype": str,
  "consistent_rms": float,
  "momentum": float,
  "mu_dtype": str,
  "weight_decay_rate": float,
}
# What a dtype may be. optax takes integers too, and computes nonsense; JAX
# promotes no narrower float by itself.
_DTYPES = (
  *("bfloat16", "float16", "float32", "float64"),
  *("complex64", "complex128"),
)


def register_optax(
  name: str,
  summary: str,
  advice: str,
  paper: str,
  *,
  build: Any = None,
  without: tuple[str, ...] = (),
  options: Mapping[str, Any] = MappingProxyType({}),
  choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
  **fields: Any,
) -> None:
  """Adds an optimizer of optax to the flag, with the options of its signature.

  If this optax does not have it, the flag says so.

  Args:
    name: in optax or optax.contrib.
    summary: as in `Method`.
    advice: likewise.
    paper: likewise.
    build: `build(learning_rate, **options)`, by default optax's function.
    without: arguments of that function to leave out.
    options: more options, or other defaults.
    choices: more of them than the signature and the dtypes say.
    **fields: more attributes of `Method`.
  """
  function = getattr(optax, name, getattr(contrib, name, None))
  if function is None:
    leave_out(
      name,
      f"optax {optax.__version__} does not have it; type pip install -U optax",
    )
    return
  arguments = inspect.signature(function).parameters
  types = {
    key: kind
    for key, kind in _TYPES.items()
    if key in arguments and arguments[key].default is None
  }
  dtypes = {key: _DTYPES for key in types if key.endswith("_dtype")}
  literals = {
    key: typing.get_args(argument.annotation)
    for key, argument in arguments.items()
    if typing.get_origin(argument.annotation) is typing.Literal
  }
  masks = ("mask", "weight_decay_mask")
  register(
    name,
    build or function,
    options=default_options(
      function, without=(*masks, *without), **{**types, **options}
    ),
    choices={**dtypes, **literals, **choices},
    decay_mask=next((mask for mask in masks if mask in arguments), None),
    summary=summary,
    advice=advice,
    paper=paper,
    **fields,
  )


register_optax(
  "adamw",
  "Adam with decoupled weight decay",
  "the usual choice for transformers",
  "Loshchilov, Hutter 2019, arXiv 1711.05101",
)
register_optax(
  "adam",
  "adaptive moments",
  "adamw, unless weight decay is unwanted",
  "Kingma, Ba 2015, arXiv 1412.6980",
)
register_optax(
  "radam",
  "Adam whose early steps are rectified",
  "needs no warm-up",
  "Liu et al. 2020, arXiv 1908.03265",
  relative_rate=3.0,
)
register_optax(
  "sgd",
  "SGD with momentum",
  "the usual choice for convolutional networks",
  "Sutskever et al. 2013, ICML",
  options={"momentum": 0.9},
  relative_rate=10.0,
)
register_optax(
  "lion",
  "sign of momentum, half of Adam's state",
  "a tenth of adamw's learning rate",
  "Chen et al. 2023, arXiv 2302.06675",
  relative_rate=0.1,
)
# The axes of a kernel that are a matrix's input (i) and output (o).
_MATRICES = (
  "(query|key|value)/kernel ioo",
  "out/kernel iio",
  "kernel iiio",
)
register_optax(
  "muon",
  "orthogonalized momentum for matrices, Adam for the rest",
  "transformers; a larger learning rate than adamw's",
  "Jordan et al. 2024, kellerjordan.github.io/posts/muon",
  build=lambda learning_rate, matrices, **options: muon.muon(
    learning_rate,
    muon_weight_dimension_numbers=features.matrices(
      matrices, contrib.MuonDimensionNumbers
    ),
    **options,
  ),
  options={"matrices": _MATRICES},
  relative_rate=3.0,
)
register_optax(
  "galore",
  "Adam in a subspace of each matrix's gradients",
  "when Adam's state does not fit; a rank far below the matrices'",
  "Zhao et al. 2024, arXiv 2403.03507",
  build=lambda learning_rate, matrices, **options: repairs.without_empty_arrays(
    contrib.galore(
      learning_rate,
      weight_dimension_numbers=features.matrices(
        matrices, contrib.GaLoreDimensionNumbers
      ),
      **options,
    )
  ),
  options={"matrices": _MATRICES},
  relative_rate=3.0,
)
register_optax(
  "adafactor",
  "Adam with factored second moments",
  "when Adam's state does not fit; its rate is relative to the weights",
  "Shazeer, Stern 2018, arXiv 1804.04235",
  relative_rate=3.0,
)
register_optax(
  "sm3",
  "Adagrad with a second moment for each row and column",
  "when Adam's state does not fit",
  "Anil et al. 2019, arXiv 1901.11150",
  build=lambda learning_rate, momentum: repairs.with_an_axis(
    optax.sm3(learning_rate, momentum or 0.0)
  ),
  relative_rate=30.0,
)
register_optax(
  "lars",
  "SGD whose step is a fraction of each layer's norm",
  "very large batches, convolutional networks; a rate of 1 and more",
  "You, Gitman, Ginsburg 2017, arXiv 1708.03888",
  without=("trust_ratio_mask",),
  relative_rate=300.0,
)
register_optax(
  "lamb",
  "Adam whose step is a fraction of each layer's norm",
  "very large batches, transformers",
  "You et al. 2020, arXiv 1904.00962",
  relative_rate=3.0,
)
register_optax(
  "fromage",
  "SGD whose step is a fraction of each layer's norm, and keeps it bounded",
  "lars, which has momentum",
  "Bernstein et al. 2020, arXiv 2002.03432",
  relative_rate=3.0,
)
register_optax(
  "adamax",
  "Adam that divides by the largest gradient",
  "sparse gradients, as of embeddings",
  "Kingma, Ba 2015, arXiv 1412.6980",
  relative_rate=3.0,
)
register_optax(
  "adamaxw",
  "adamax with decoupled weight decay",
  "sparse gradients, as of embeddings",
  "Loshchilov, Hutter 2019, arXiv 1711.05101",
  relative_rate=3.0,
)
register_optax(
  "nadam",
  "Adam with Nesterov momentum",
  "nadamw, unless weight decay is unwanted",
  "Dozat 2016, ICLR workshop",
)
register_optax(
  "nadamw",
  "nadam with decoupled weight decay",
  "in place of adamw",
  "Dozat 2016, ICLR workshop",
)
register_optax(
  "amsgrad",
  "Adam whose second moment never falls",
  "where Adam does not converge",
  "Reddi, Kale, Kumar 2018, arXiv 1904.09237",
)
register_optax(
  "adabelief",
  "Adam that divides by the surprise in the gradient",
  "noisy gradients",
  "Zhuang et al. 2020, arXiv 2010.07468",
)
register_optax(
  "acprop",
  "adabelief that divides by the step before",
  "noisy gradients",
  "Zhuang et al. 2021, arXiv 2110.05454",
  # With optax's 1e-16 a coordinate whose first gradient is 0 then moves by 1e8
  # times the learning rate and more.
  options={"eps": 1e-4},
)
register_optax(
  "yogi",
  "Adam whose second moment grows slowly",
  "gradients of varying size",
  "Zaheer et al. 2018, NeurIPS",
)
register_optax(
  "adopt",
  "Adam that divides by the second moment of the steps before",
  "any b2; gradients that are often 0",
  "Taniguchi et al. 2024, arXiv 2411.02853",
)
register_optax(
  "adan",
  "Adam with Nesterov momentum of gradient differences",
  "transformers; twice Adam's state",
  "Xie et al. 2022, arXiv 2208.06677",
)
register_optax(
  "ademamix",
  "AdamW with a second, slow momentum",
  "long runs: the slow momentum remembers 10000 steps",
  "Pagliardini, Ablin, Grangier 2024, arXiv 2409.03137",
)
register_optax(
  "simplified_ademamix",
  "Adam with one momentum that does not forget its weight",
  "large alpha with small batches, 0 with large ones",
  "Morwani et al. 2025, arXiv 2502.02431",
  relative_rate=0.004,
)
register_optax(
  "novograd",
  "Adam with one second moment a layer",
  "half of Adam's state",
  "Ginsburg et al. 2019, arXiv 1905.11286",
  relative_rate=3.0,
)
register_optax(
  "optimistic_adam_v2",
  "Adam that anticipates the next gradient",
  "adversarial losses",
  "Daskalakis et al. 2017, arXiv 1711.00141",
)
register_optax(
  "optimistic_gradient_descent",
  "gradient descent that anticipates the next gradient",
  "adversarial losses",
  "Mokhtari, Ozdaglar, Pattathil 2019, arXiv 1901.08511",
  relative_rate=20.0,
)
register_optax(
  "rmsprop",
  "gradients over their root mean square",
  "recurrent networks, reinforcement learning",
  "Hinton, Tieleman 2012, Coursera lecture 6.5",
)
register_optax(
  "adagrad",
  "gradients over the root of the sum of their squares",
  "sparse features, convex losses",
  "Duchi, Hazan, Singer 2011, JMLR 12",
  relative_rate=30.0,
)
register_optax(
  "adadelta",
  "steps of the size of the steps before",
  "a rate of 1 was meant to need no tuning",
  "Zeiler 2012, arXiv 1212.5701",
  relative_rate=1000.0,
)
register_optax(
  "madgrad",
  "dual averaging of gradients over the cube root of their squares",
  "convolutional networks; a constant schedule",
  "Defazio, Jelassi 2021, arXiv 2101.11075",
)
register_optax(
  "sign_sgd",
  "sign of the gradient, no state",
  "gradients that are cheap to send",
  "Bernstein et al. 2018, arXiv 1802.04434",
  relative_rate=0.3,
)
register_optax(
  "signum",
  "sign of momentum",
  "lion, its successor",
  "Bernstein et al. 2018, arXiv 1802.04434",
  relative_rate=0.3,
)
register_optax(
  "rprop",
  "a step for each coordinate that grows while its gradient keeps its sign",
  "the whole data set in every batch",
  "Riedmiller, Braun 1993, ICNN",
  # Optax reads the rate in init alone, where a schedule may have it 0 (0.2.8).
  build=lambda learning_rate, **options: optax.chain(
    optax.rprop(1.0, **options), optax.scale(learning_rate)
  ),
  relative_rate=0.3,
)
register_optax(
  "noisy_sgd",
  "SGD with noise on the gradient that fades",
  "very deep networks that are hard to start",
  "Neelakantan et al. 2015, arXiv 1511.06807",
  build=lambda learning_rate, seed, **options: optax.noisy_sgd(
    learning_rate, key=seed, **options
  ),
  options={"seed": 0},
  relative_rate=20.0,
)
register_optax(
  "sophia",
  "momentum over an estimate of the Hessian's diagonal, clipped",
  "language models; another gradient in one of update_interval steps",
  "Liu et al. 2023, arXiv 2305.14342",
  build=lambda learning_rate, seed, **options: contrib.sophia(
    learning_rate, hessian_diagonal_fn=features.hutchinson(seed), **options
  ),
  without=("hessian_diagonal_fn", "verbose", "print_win_rate_every_n_steps"),
  options={"seed": 0},
  needs=frozenset({"grad_fn"}),
  relative_rate=0.3,
)


def _distance_learner(function):
  """Returns what builds `contrib.prodigy` or `dadapt_adamw`."""

  def build(learning_rate, betas, **options):
    if len(betas) != 2:  # dadapt_adamw itself looks in `update` alone.
      raise ValueError(f"betas={betas} must be two numbers, as (0.9, 0.999)")
    return repairs.skip_zeros(
      function(learning_rate, betas=betas, **options), learning_rate
    )

  return build


register(
  "prodigy",
  _distance_learner(contrib.prodigy),
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
  _distance_learner(contrib.dadapt_adamw),
  options=default_options(contrib.dadapt_adamw),
  tuned=False,
  scalars={contrib.DAdaptAdamWState: readers.distance_estimate("dadapt_adamw")},
  summary="AdamW that learns the distance to the solution",
  advice="prodigy, its successor, grows faster",
  paper="Defazio, Mishchenko 2023, arXiv 2301.07733",
)


def _dog(learning_rate, init_step_kind, init_step, averaging, **options):
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
  choices={"init_step_kind": ("heuristic", "distance", "learning_rate")},
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
  def measure(updates, state, params, gradient):
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


def _capped(
  name: str,
  tx: optax.GradientTransformation,
  direction: Callable[[Any, optax.Updates], optax.Updates],
  learning_rate: jax.typing.ArrayLike,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """Measures the step s of updates that are a decay - s d.

  Args:
    name: of the method.
    tx: the method.
    direction: (its new state, gradient) -> d.
    learning_rate: the cap on s.
    weight_decay: of the method.
  """
  learning_rate = jnp.asarray(learning_rate)

  def measure(updates, state, params, gradient):
    decay = learning_rate * weight_decay / (1 + learning_rate * weight_decay)
    moved = jax.tree.map(lambda u, x: u + decay * x, updates, params)
    length = optax.tree.norm(direction(state, gradient))
    step = jnp.where(length > 0, optax.tree.norm(moved) / length, 0.0)
    # The effective learning rate has the cap as a factor already.
    fraction = jnp.where(learning_rate > 0, step / learning_rate, 0.0)
    return {f"{name}/step": step, "factor": fraction}

  return features.measured(tx, measure)


def _momo(learning_rate, **options):
  return _capped(
    "momo",
    contrib.momo(learning_rate, **options),
    lambda state, _: state.exp_avg,
    learning_rate,
    options["weight_decay"],
  )


def _momo_adam(learning_rate, **options):
  def direction(state, _):
    correction = 1 - options["b2"] ** state.count
    return jax.tree.map(
      lambda m, v: m / (options["eps"] + jnp.sqrt(v / correction)),
      state.exp_avg,
      state.exp_avg_sq,
    )

  return _capped(
    "momo_adam",
    contrib.momo_adam(learning_rate, **options),
    direction,
    learning_rate,
    options["weight_decay"],
  )


def _polyak_sgd(learning_rate, **options):
  # Optax divides by its other rate, `scaling` (0.2.8).
  return _capped(
    "polyak_sgd",
    optax.polyak_sgd(learning_rate, **options),
    lambda _, gradient: gradient,
    learning_rate,
  )


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


register_optax(
  "polyak_sgd",
  "SGD whose step follows from the loss and its least value",
  "losses whose least value, f_min, is reached; the rate is a cap",
  "Loizou et al. 2020, arXiv 2002.10542",
  build=_polyak_sgd,
  without=("max_learning_rate", "scaling"),
  options={"learning_rate": 1.0},
  choices={"variant": ("sps", "sps+")},
  tuned=False,
  needs=frozenset({"value"}),
  scalars={features.MeasuredState: readers.measured},
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


register(
  "schedule_free",
  features.schedule_free,
  options={
    "base": "adamw",
    **default_options(contrib.schedule_free, state_dtype=str),
  },
  choices={"state_dtype": _DTYPES},
  schedule="warmup",
  # Its own b1 takes the place of the base's momentum.
  base_options={"b1": 0.0, "momentum": None},
  refuses={
    **dict.fromkeys(
      (
        *("lars", "muon", "momo", "prodigy", "dadapt_adamw", "signum"),
        *("ademamix", "simplified_ademamix", "galore"),
      ),
      "its momentum cannot be switched off, and schedule_free has its own",
    ),
    **dict.fromkeys(("cocob", "madgrad"), _POSITIONS),
  },
  eval_params={contrib.ScheduleFreeState: readers.schedule_free},
  summary="averages iterates instead of decaying the learning rate",
  advice="warm-up only; over mechanic, or a larger rate than the base's",
  paper="Defazio et al. 2024, arXiv 2405.15682",
)
register(
  "reduce_on_plateau",
  lambda base, learning_rate, **options: features.reduce_on_plateau(
    base, contrib.reduce_on_plateau(**options)
  ),
  options={
    "base": "adamw",
    **default_options(contrib.reduce_on_plateau, accumulation_size=10),
  },
  needs=frozenset({"value"}),
  schedule=None,
  scalars={contrib.ReduceLROnPlateauState: readers.plateau},
  summary="reduces the learning rate when the loss stops falling",
  advice="runs of unknown length, with a constant schedule; over any base",
  paper="optax.contrib.reduce_on_plateau",
)
register(
  "split_real_and_imaginary",
  lambda base, learning_rate: repairs.hand_on(
    contrib.split_real_and_imaginary, base
  ),
  options={"base": "adamw"},
  schedule=None,
  refuses={
    "sophia": "its Hessian is that of real parameters",
  },
  eval_params={contrib.SplitRealAndImaginaryState: readers.split},
  summary="gives the base real and imaginary parts as separate leaves",
  advice="complex parameters; over any base",
  paper="optax.contrib.split_real_and_imaginary",
)


def _aggregate(l2_norm_clip, noise_multiplier, seed):
  aggregate = contrib.differentially_private_aggregate(
    l2_norm_clip, noise_multiplier, key=seed
  )
  return repairs.on_any_mesh(repairs.in_float32(aggregate))


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
  relative_rate=100.0,
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

leave_out(
  "optimistic_adam",
  "optax replaces it by another; type --config.optimizer=optimistic_adam_v2",
)
for _base in ("adamw", "sgd"):
  leave_out(
    f"schedule_free_{_base}",
    "it is a wrapper with a base; type --config.optimizer=schedule_free "
    f"--config.opt.schedule_free.base={_base}",
  )
leave_out(
  "lbfgs",
  "its line search evaluates the loss at up to 20 points a step, of which the "
  "guard sees none; call optax.lbfgs in a step of your own, or type "
  "--config.optimizer=polyak_sgd",
)
