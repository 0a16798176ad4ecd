"""The TrainState integration, for Linen and for plain functions."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state

from flax_mechanic import step
from flax_mechanic.methods import readers
from flax_mechanic.methods.extra_args import accepted
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
    """
    shardings = fields.setdefault("shardings", Shardings.of(params))
    of_state = shardings.for_state(shard_over, offload)
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
    self, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False
  ) -> tuple[Self, Any]:
    """Does one step of any method on `loss_fn(params, *args)`.

    Args:
      loss_fn: returns a scalar loss, or `(loss, aux)` with `has_aux`. Mutable
        collections (batch statistics) come back in aux.
      *args: the further arguments of `loss_fn`. For a method that wants a
        gradient per example (dpsgd), the leading axis of every array is the
        batch, `loss_fn` sees batches of one, and random keys (`jax.random.key`)
        are shared, each example folding in its index.
      has_aux: whether `loss_fn` returns auxiliary output.

    Returns:
      The new state, and what `jax.value_and_grad` returns first, evaluated
      before the step: the loss, or `(loss, aux)`. Per example, the means over
      the batch of the loss and of aux's scalars.

    Raises:
      UsageError: the method wants a gradient per example, and aux holds batch
        statistics.
    """

    def pure_loss(params, carried, *args):
      output = loss_fn(params, *args)
      loss, aux = output if has_aux else (output, None)
      return loss, (aux, carried)

    (loss, aux), updates, opt_state, _ = step.minimize(
      self.tx,
      pure_loss,
      self.params,
      on_device(self.opt_state),
      (),
      args,
      self.state_shardings,
    )
    state = self._placed(
      step=self.step + 1,
      params=optax.apply_updates(self.params, updates),
      opt_state=opt_state,
    )
    return state, (loss, aux) if has_aux else loss

  def eval_params(self) -> Any:
    """Returns the parameters that the method evaluates and exports."""
    return readers.eval_params(on_device(self.opt_state), self.params)

  def reanchor(self) -> Self:
    """Returns the state with the method restarted from its parameters.

    To be called once after `state.replace(params=loaded)`: several methods
    (prodigy, dog, dowg, cocob, schedule_free) measure from the parameters that
    they were created with. Mechanic takes those of its first update by itself.
    """
    return self.replace(
      opt_state=self.state_shardings.init(self.tx, self.params)
    )

  def init_from(
    self, directory: str | os.PathLike[str], *, params_only: bool = False
  ) -> tuple[Self, Sequence[str]]:
    """Returns the state started where another run's checkpoint ended.

    See `flax_mechanic.adopt` for what is carried over; other collections, such
    as batch statistics, are for `flax_mechanic.load_params`.

    Args:
      directory: a run's --workdir, or a folder that Orbax wrote.
      params_only: whether to leave the saved optimizer's state.

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
      self.params,
      functools.partial(self.state_shardings.init, self.tx),
      params_only=params_only,
    )
    state = self.replace(params=adopted.params, opt_state=adopted.opt_state)
    return state, adopted.notes

  def _placed(self, **fields: Any) -> Self:
    """Replaces fields, and keeps parameters and state where they belong."""
    state = self.replace(**fields)
    return state.replace(
      params=self.shardings.keep(state.params),
      opt_state=self.state_shardings.place(state.opt_state),
    )
