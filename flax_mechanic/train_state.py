"""The TrainState integration, for Linen and for plain functions."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

from flax_mechanic import step
from flax_mechanic.errors import UsageError
from flax_mechanic.extra_args import accepted
from flax_mechanic.methods import readers, stack
from flax_mechanic.placement import Shardings, is_traced, on_device


class TrainState(train_state.TrainState, kw_only=True):
  """A flax `TrainState` that does a whole step of any registered method.

  Attributes:
    shardings: of the parameters, as far as they are known when it is created;
      static.
    state_shardings: those that the state's leaves of their shapes have; static.

  Example:
    >>> state = TrainState.create(
    ...   apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1)
    ... )
    >>> state, loss = state.minimize(
    ...   lambda params, x: jnp.sum(params["w"] * x) ** 2, jnp.ones(2)
    ... )
    >>> float(loss)
    4.0
  """

  shardings: Shardings = struct.field(pytree_node=False, default=Shardings())
  state_shardings: Shardings = struct.field(
    pytree_node=False, default=Shardings()
  )

  @classmethod
  def create(
    cls,
    *,
    apply_fn: Callable[..., Any] | None,
    params: Any,
    tx: optax.GradientTransformation,
    shard_over: Sequence[str] = (),
    offload: bool = False,
    **fields: Any,
  ) -> Self:
    """Returns a new state at step 0.

    Args:
      apply_fn: usually `model.apply`.
      params: the parameters.
      tx: any optax transformation, as `make_optimizer` returns it.
      shard_over: axes of the parameters' mesh, such as ["data"], over which the
        state is split as well, while the parameters keep their own placement
        (ZeRO-1).
      offload: whether the state's leaves shaped like parameters are kept in
        pinned host memory. An update brings them to the devices and back.
      **fields: the fields that a subclass adds, and `shardings`, those of the
        parameters where they are traced and so do not say.

    Raises:
      UsageError: `tx` is no transformation.
    """
    step.check_transformation(tx)
    shardings = fields.setdefault("shardings", Shardings.of(params))
    of_state = shardings.for_state(shard_over, offload)
    of_state = _of_trained(of_state, params)
    placing = optax.GradientTransformation(
      functools.partial(of_state.init, tx), tx.update
    )
    if shardings.by_path and not is_traced(params):
      params = shardings.place(params)
    state = super().create(
      apply_fn=apply_fn,
      params=params,
      tx=placing,
      state_shardings=of_state,
      **fields,
    )
    # An array from the start, so that the step compiles once.
    count = shardings.place(jnp.zeros([], jnp.int32))
    return state.replace(step=count, tx=tx)

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
    """Returns the state after an update.

    Args:
      grads: a tree like the parameters; conjugated where they are complex.
      **kwargs: fields to replace, as in flax; any other goes to `tx`, if it
        accepts it, such as `value`.
    """
    names = {field.name for field in dataclasses.fields(self)}
    fields = {k: v for k, v in kwargs.items() if k in names}
    extra = {k: v for k, v in kwargs.items() if k not in names}
    update = functools.partial(
      self.tx.update,
      **accepted(self.tx, {**self.state_shardings.extra_args(), **extra}),
    )
    bound = self.replace(
      opt_state=on_device(self.opt_state),
      tx=optax.GradientTransformation(self.tx.init, update),
    )
    state = super(TrainState, bound).apply_gradients(grads=grads, **fields)
    return state._placed(tx=self.tx)

  def minimize(
    self,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    axis_name: step.AxisName | None = None,
  ) -> tuple[Self, Any]:
    """Does one step of any method on `loss_fn(params, *args)`.

    Where a subclass's field `dynamic_scale` holds flax's `DynamicScale`, it
    scales every evaluation of the loss, and is replaced. A step whose gradient
    is not finite leaves parameters and optimizer as they were.

    Args:
      loss_fn: returns a scalar loss, or `(loss, aux)` with `has_aux`. Mutable
        collections (batch statistics) come back in aux.
      *args: the further arguments of `loss_fn`. For a method that wants a
        gradient per example (dpsgd), the leading axis of every array is the
        batch, `loss_fn` sees batches of one, and random keys (`jax.random.key`)
        are shared, each example folding in its index.
      has_aux: whether `loss_fn` returns auxiliary output.
      axis_name: of the axis of `jax.pmap` or `jax.shard_map` over whose devices
        the batch is split. The loss, and every gradient that the method takes,
        are means over it. Aux stays each device's own, since it may hold
        outputs of each example; `jax.lax.pmean` averages the rest. A method
        that wants a gradient per example keeps those of the whole batch on
        every device.

    Returns:
      The new state, and what `jax.value_and_grad` returns first, evaluated
      before the step: the loss, or `(loss, aux)`. Per example, the means over
      the batch of the loss and of aux's scalars.

    Raises:
      UsageError: the loss does not come first. The method wants a gradient per
        example, and aux holds batch statistics, or there is a `dynamic_scale`,
        or fp8's statistics are among the parameters. Or the loss is averaged
        already, under `shard_map`.
    """
    if not callable(loss_fn):
      raise UsageError(
        "minimize takes the loss first, and then its arguments after the "
        "parameters; type state.minimize(loss_fn, batch)"
      )
    if "per_example" in stack.needs(self.tx):
      self._check_per_example()

    def pure_loss(params, _, *args):
      output = loss_fn(params, *args)
      loss, aux = output if has_aux else (output, None)
      return loss, (aux, _Effects())

    trained, finite = _trained(self.params), []
    (loss, aux), updates, opt_state, effects = step.minimize(
      self.tx,
      pure_loss,
      trained,
      on_device(self.opt_state),
      (),
      args,
      self.state_shardings,
      axis_name=axis_name,
      value_and_grad=functools.partial(self._value_and_grad, finite),
    )
    new = {
      "params": _whole(
        self.params, optax.apply_updates(trained, updates), effects.overwritten
      ),
      "opt_state": opt_state,
    }
    if effects.dynamic_scale:
      new["dynamic_scale"] = effects.dynamic_scale
      new = self._unless_overflowed(new, finite)
    state = self._placed(step=self.step + 1, **new)
    return state, (loss, aux) if has_aux else loss

  def eval_params(self) -> Any:
    """Returns the parameters that the method evaluates and exports."""
    evaluated = readers.eval_params(
      on_device(self.opt_state),
      _trained(self.params),
      _of_trained(self.shardings, self.params),
    )
    return _whole(self.params, evaluated)

  def reanchor(self) -> Self:
    """Returns the state with the method restarted from its parameters.

    To be called once after `state.replace(params=loaded)`: several methods
    (prodigy, dog, dowg, cocob, schedule_free) measure from the parameters that
    they were created with. Mechanic takes those of its first update by itself.
    """
    return self.replace(
      opt_state=self.state_shardings.init(self.tx, _trained(self.params))
    )

  def init_from(
    self,
    directory: str | os.PathLike[str],
    *,
    params_only: bool = False,
    config: Any = None,
  ) -> tuple[Self, Sequence[str]]:
    """Returns the state started where another run's checkpoint ended.

    See `flax_mechanic.adopt` for what is carried over; other collections, such
    as batch statistics, are for `flax_mechanic.load_params`. fp8's statistics
    restart.

    Args:
      directory: a run's --workdir, or a folder that Orbax wrote.
      params_only: whether to leave the saved optimizer's state.
      config: the job's, to be compared with the saved one.

    Returns:
      The state, its `step` as it was, and sentences on what was taken and what
      restarts.

    Raises:
      UsageError: the parameters are not there, have other shapes, or are
        damaged.
    """
    from flax_mechanic.checkpoints import adoption  # It imports Orbax.

    adopted = adoption.adopt(
      directory,
      _trained(self.params),
      functools.partial(self.state_shardings.init, self.tx),
      params_only=params_only,
      config=config,
    )
    state = self.replace(
      params=_whole(self.params, adopted.params), opt_state=adopted.opt_state
    )
    return state, adopted.notes

  def _value_and_grad(
    self,
    finite: list[jax.Array],
    loss_fn: step.LossFn,
    axis_name: step.AxisName | None,
  ) -> Callable[..., Any]:
    """Like `step.value_and_grad`, scaled, and for the part that `tx` sees.

    Args:
      finite: gets whether the gradient is finite, of each that is scaled.
      loss_fn: as there.
      axis_name: as there.
    """
    dynamic_scale = self._dynamic_scale()

    def by_trained(trained, *args):
      params = _whole(self.params, trained)
      if dynamic_scale:
        evaluate = dynamic_scale.value_and_grad(
          loss_fn,
          has_aux=True,
          axis_name=axis_name,  # pyrefly: ignore
        )
        scale, is_finite, (loss, (aux, _)), grads = evaluate(params, *args)
        finite.append(is_finite)
        effects = _Effects(_overwritten(grads), scale)
      else:
        evaluate = step.value_and_grad(loss_fn, axis_name)
        (loss, (aux, _)), grads = evaluate(params, *args)
        effects = _Effects(_overwritten(grads))
      return (loss, (aux, effects)), _trained(grads)

    return by_trained

  def _dynamic_scale(self) -> DynamicScale | None:
    """Returns the field of flax's examples, if a subclass has it."""
    field = getattr(self, "dynamic_scale", None)
    return field if isinstance(field, DynamicScale) else None

  def _unless_overflowed(
    self, new: dict[str, Any], finite: Sequence[jax.Array]
  ) -> dict[str, Any]:
    """Returns new fields, or the old ones and a smaller dynamic scale.

    Args:
      new: the fields after the step.
      finite: of each gradient; a second one may overflow where the first fits.
    """
    before: Any = self._dynamic_scale()
    overflow = before.value_and_grad(lambda x: x * jnp.nan)(1.0)
    old = {
      "params": self.params,
      "opt_state": on_device(self.opt_state),
      "dynamic_scale": overflow.dynamic_scale,
    }
    all_finite = functools.reduce(jnp.logical_and, finite)
    return jax.tree.map(functools.partial(jnp.where, all_finite), new, old)

  def _check_per_example(self) -> None:
    """Raises for what would tell of single examples, past the noise."""
    if self._dynamic_scale():
      raise UsageError(
        "a gradient per example does not go with a dynamic_scale, which skips "
        "the step if one example overflows and so leaks it; compute in "
        "bfloat16 or float32 without one"
      )
    if _overwritten(self.params) is not None:
      raise UsageError(
        "a gradient per example does not go with fp8's statistics, which mix "
        "the examples of a batch and so leak them past the clipping; compute "
        "in bfloat16 or float32 instead"
      )

  def _placed(self, **fields: Any) -> Self:
    """Replaces fields, and keeps parameters and state where they belong."""
    state = self.replace(**fields)
    return state.replace(
      params=self.shardings.keep(state.params),
      opt_state=self.state_shardings.place(state.opt_state),
    )


class _Effects(NamedTuple):
  """What an evaluation changes beside `tx`'s parameters and state."""

  overwritten: Any = None
  dynamic_scale: DynamicScale | None = None


def _overwritten(params: Any) -> Any:
  """Returns the part that its gradient replaces, fp8's statistics, or None."""
  if isinstance(params, Mapping):
    return params.get(OVERWRITE_WITH_GRADIENT)
  return None


def _trained(params: Any) -> Any:
  """Returns the part of parameters, or of gradients, that `tx` sees."""
  return params if _overwritten(params) is None else params["params"]


def _of_trained(shardings: Shardings, params: Any) -> Shardings:
  """Returns those of the part that `tx` sees."""
  return shardings if _trained(params) is params else shardings.under("params")


def _whole(params: Any, trained: Any, overwritten: Any = None) -> Any:
  """Returns the parameters with new parts; `trained` alone without fp8."""
  if _overwritten(params) is None:
    return trained
  if overwritten is None:
    overwritten = _overwritten(params)
  return {"params": trained, OVERWRITE_WITH_GRADIENT: overwritten}
