"""The nnx.Optimizer integration."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from flax.nnx import filterlib
from flax.nnx import optimizer as optimizer_lib
from jax.sharding import NamedSharding

from flax_mechanic import step
from flax_mechanic.methods import readers, stack
from flax_mechanic.methods.extra_args import accepted
from flax_mechanic.paths import parameter_of
from flax_mechanic.placement import Shardings, is_traced, on_device


class Optimizer(nnx.Optimizer):
  """An `nnx.Optimizer` that does a whole step of any registered method.

  Attributes:
    step: uint32 scalar, updates so far.
    tx: the transformation.
    opt_state: its state, each leaf in an NNX variable.
    shardings: of the parameters, as far as they are known when it is created.
    state_shardings: those that the state's leaves of their shapes have.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_mechanic import mechanize
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, mechanize(optax.adamw(1.0)), wrt=nnx.Param)
    >>> loss = optimizer.minimize(
    ...   model, lambda model, x: jnp.mean(model(x) ** 2), jnp.ones((4, 2))
    ... )
    >>> loss.shape
    ()
  """

  def __init__(
    self,
    model: nnx.Module,
    tx: optax.GradientTransformation,
    *,
    wrt: filterlib.Filter = nnx.Param,
    shard_over: Sequence[str] = (),
    offload: bool = False,
    shardings: Shardings | None = None,
  ):
    """Creates the state of `tx` for the parameters of `model`.

    Args:
      model: the model whose parameters are optimized.
      tx: any optax transformation, as `make_optimizer` returns it.
      wrt: which of the model's variables are optimized.
      shard_over: axes of the parameters' mesh, such as ["data"], over which the
        state is split as well, while the parameters keep their own placement
        (ZeRO-1).
      offload: whether the state's leaves shaped like parameters are kept in
        pinned host memory. An update brings them to the devices and back.
      shardings: of the parameters. To be given where they are traced on an Auto
        mesh and not annotated, and so do not say.
    """
    super().__init__(model, optax.identity(), wrt=wrt)
    self.tx = tx
    params = nnx.state(model, wrt)
    self.shardings = nnx.static(shardings or _shardings(params))
    self.state_shardings = nnx.static(
      self.shardings.for_state(shard_over, offload)
    )
    self.opt_state = nnx.data(_init(tx, params, self.state_shardings))
    self.step.set_value(self.shardings.place(self.step.get_value()))
    if not is_traced(nnx.as_pure(params)):
      # As the step's results are placed, or the step would compile twice.
      nnx.update(model, self.shardings.place(nnx.as_pure(params)))

  def update(
    self, model: nnx.Module, grads: Any, /, **extra_args: Any
  ) -> optax.Updates:
    """Updates the model and the state, given gradients.

    Args:
      model: the model, updated in place.
      grads: as `nnx.grad` returns them; conjugated where they are complex.
      **extra_args: anything; `tx` gets those it accepts, such as `value`.

    Returns:
      The updates.
    """
    params = nnx.as_pure(nnx.state(model, self.wrt))
    grads = nnx.as_pure(nnx.state(grads, self.wrt))
    updates, opt_state = self.tx.update(
      grads,
      self._state(),
      params,
      **accepted(
        self.tx,
        {**self.state_shardings.extra_args(), **nnx.as_pure(extra_args)},
      ),
    )
    self._write(model, params, updates, opt_state)
    return updates

  def minimize(
    self,
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
  ) -> Any:
    """Does one step of any method on `loss_fn(model, *args)`.

    Args:
      model: the model, updated in place: parameters by the optimizer; batch
        statistics, random streams and other state by the loss. Variables that
        the loss adds to the model (`sow`) are dropped.
      loss_fn: returns a scalar loss, or `(loss, aux)` with `has_aux`.
      *args: the further arguments of `loss_fn`. For a method that wants a
        gradient per example (dpsgd), every array's leading axis is the batch,
        and `loss_fn` sees batches of one.
      has_aux: whether `loss_fn` returns auxiliary output.

    Returns:
      What `nnx.value_and_grad` returns first, evaluated before the step: the
      loss, or `(loss, aux)` with `has_aux`. Per example, the means over the
      batch of the loss and of aux's scalars.

    Raises:
      UsageError: the method wants a gradient per example, and the model keeps
        batch statistics.
    """
    graphdef, params, rest = nnx.split(model, self.wrt, ...)
    if "per_example" in stack.needs(self.tx) and nnx.filter_state(
      rest, nnx.BatchStat
    ):
      step.refuse_batch_statistics()

    kept = {path for path, _ in nnx.to_flat_state(rest)}

    def pure_loss(params, rest, *args):
      model = nnx.merge(graphdef, params, rest)
      output = loss_fn(model, *args)
      loss, aux = output if has_aux else (output, None)
      rest = nnx.state(model, lambda path, _: path in kept)
      return loss, (aux, nnx.as_pure(rest))

    params = nnx.as_pure(params)
    (loss, aux), updates, opt_state, rest = step.minimize(
      self.tx,
      pure_loss,
      params,
      self._state(),
      nnx.as_pure(rest),
      args,
      self.state_shardings,
    )
    nnx.update(model, rest)
    self._write(model, params, updates, opt_state)
    return (loss, aux) if has_aux else loss

  def eval_model(self, model: nnx.Module) -> nnx.Module:
    """Returns the model to evaluate and export.

    Args:
      model: the model that is being trained; left as it is.

    Returns:
      A model with the parameters that the method evaluates (schedule_free's
      average, DoG's averaged iterates), or `model` itself.
    """
    params = nnx.as_pure(nnx.state(model, self.wrt))
    evaluated = readers.eval_params(self._state(), params)
    if evaluated is params:
      return model
    model = nnx.clone(model)
    nnx.update(model, evaluated)
    return model

  def reanchor(self, model: nnx.Module) -> None:
    """Restarts the method from the model's present parameters.

    To be called once after weights were loaded into the model: several methods
    (prodigy, dog, dowg, cocob, schedule_free) measure from the parameters that
    they were created with. Mechanic takes those of its first update by itself.

    Args:
      model: the model whose parameters are optimized.
    """
    params = nnx.as_pure(nnx.state(model, self.wrt))
    opt_state = self.state_shardings.init(self.tx, params)
    self._write_state(opt_state)

  def init_from(
    self,
    model: nnx.Module,
    directory: str | os.PathLike[str],
    *,
    params_only: bool = False,
  ) -> Sequence[str]:
    """Starts model and state where another run's checkpoint ended.

    See `flax_mechanic.adopt` for what is carried over. Random state and `step`
    stay as they are.

    Args:
      model: the model whose parameters are optimized; updated in place, batch
        statistics included.
      directory: a run's --workdir, or a folder that Orbax wrote.
      params_only: whether to leave the saved optimizer's state.

    Returns:
      Sentences on what was taken and what restarts.

    Raises:
      UsageError: the model's parameters are not there, have other shapes, or
        are damaged.
    """
    from flax_mechanic.checkpoints import adoption  # It imports Orbax.

    def init(params):
      nnx.update(model, params)
      optimized = nnx.as_pure(nnx.state(model, self.wrt))
      return self.state_shardings.init(self.tx, optimized)

    adopted = adoption.adopt(
      directory,
      nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngState))),
      init,
      params_only=params_only,
    )
    self._write_state(adopted.opt_state)
    return adopted.notes

  def _state(self) -> optax.OptState:
    return on_device(nnx.as_pure(self.opt_state))

  def _write(
    self,
    model: nnx.Module,
    params: optax.Params,
    updates: optax.Updates,
    opt_state: optax.OptState,
  ) -> None:
    params = optax.apply_updates(params, updates)
    nnx.update(model, self.shardings.keep(params))
    self._write_state(self.state_shardings.place(opt_state))
    self.step[...] += 1

  def _write_state(self, opt_state: optax.OptState) -> None:
    # nnx.Optimizer goes through nnx.state here, which turns a NamedTuple among
    # the parameters into a dict (flax 0.12.12, complex parameters).
    variables, treedef = jax.tree.flatten(
      self.opt_state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    for variable, value in zip(
      variables, treedef.flatten_up_to(opt_state), strict=True
    ):
      variable.set_value(value)


def _init(
  tx: optax.GradientTransformation, params: nnx.State, shardings: Shardings
) -> Any:
  """Returns the state of `tx`, each leaf in a variable.

  A leaf shaped like a parameter has that parameter's metadata, its annotated
  sharding above all.
  """
  known = {leaf.path: leaf for leaf in shardings.leaves if leaf.sharding}
  variables = {
    "/".join(map(str, path)): variable
    for path, variable in nnx.to_flat_state(params)
  }

  def in_variable(path, value):
    parameter = parameter_of(path, value.shape, variables)
    if parameter is None:
      return optimizer_lib.OptArray(value)
    metadata = _metadata(parameter)
    placed = parameter_of(path, value.shape, known)
    # A variable moves its value to its annotated sharding.
    if placed is not None and "out_sharding" in metadata:
      metadata["out_sharding"] = tuple(placed.sharding.spec)
    return optimizer_lib.OptVariable(value, **metadata)

  return jax.tree_util.tree_map_with_path(
    in_variable, shardings.init(tx, nnx.as_pure(params))
  )


def _shardings(params: nnx.State) -> Shardings:
  """Returns the parameters' shardings; while tracing, those of annotations."""

  def sharding(variable):
    value = variable.get_value()
    metadata = variable.get_metadata()
    annotated = metadata.get("out_sharding") is not None
    if not isinstance(value, jax.core.Tracer) or not annotated:
      return value
    mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
    spec = nnx.get_partition_spec(variable).get_value()
    return (
      value
      if mesh.empty
      else jax.ShapeDtypeStruct(
        value.shape, value.dtype, sharding=NamedSharding(mesh, spec)
      )
    )

  return Shardings.of(
    nnx.as_pure(
      jax.tree.map(
        sharding, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
      )
    )
  )


def _metadata(parameter: nnx.Variable) -> dict[str, Any]:
  metadata = dict(parameter.get_metadata())
  if "optimizer_sharding" in metadata:
    metadata["out_sharding"] = metadata.pop("optimizer_sharding")
  return metadata
