"""The nnx.Optimizer integration."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import filterlib, graphlib
from flax.nnx import optimizer as optimizer_lib
from jax.sharding import NamedSharding

from flax_mechanic import step
from flax_mechanic.errors import UsageError
from flax_mechanic.extra_args import accepted
from flax_mechanic.methods import readers, stack
from flax_mechanic.paths import by_path, map_with_parameters
from flax_mechanic.placement import Shardings, is_traced, on_device

# Of the split and merge that carry a loss's effects to the caller's objects.
_TAG = "flax_mechanic.minimize"


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
    graph: bool | None = None,
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
      graph: as in `nnx.Optimizer`, whether the model may share variables. None
        is flax's setting.

    Raises:
      UsageError: `tx` is no transformation, `wrt` matches none of the model's
        variables, or a parameter holds several arrays.
    """
    step.check_transformation(tx)
    super().__init__(model, optax.identity(), wrt=wrt, graph=graph)
    self.tx = tx
    params = nnx.state(model, wrt, graph=graph)
    if not nnx.to_flat_state(params):
      _check_empty(nnx.state(model, nnx.Not(nnx.RngState), graph=graph), wrt)
    self.shardings = nnx.static(shardings or _shardings(params))
    self.state_shardings = nnx.static(
      _annotated(self.shardings, params).for_state(shard_over, offload)
    )
    self.opt_state = nnx.data(_init(tx, params, self.state_shardings))
    self.step.set_value(self.shardings.place(self.step.get_value()))
    if self.shardings.by_path and not is_traced(nnx.as_pure(params)):
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
    params = self._params(model)
    grads = self._params(grads)
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
    argnums: int = 0,
    axis_name: step.AxisName | None = None,
    **kwargs: Any,
  ) -> Any:
    """Does one step of any method on `loss_fn(model, *args, **kwargs)`.

    The loss may do what it may do under `nnx.value_and_grad`: advance `Rngs`,
    update metrics and other modules among its arguments, which may share
    variables with the model, and sow intermediates. Model and arguments change
    in place. Two things differ:

    - Structural changes, such as what the loss sows, are kept in flax's tree
      mode as well, and variables may be shared there.
    - What the loss itself assigns to the variables of `wrt` is dropped.

    A method that evaluates the loss again (sam) starts each evaluation from the
    same state, random streams included, and keeps the effects of the first.

    A method that wants a gradient per example (dpsgd) evaluates the loss on
    batches of one, each from the same state but with random keys of its own.
    The changes of metrics' states add up over the examples. All other effects,
    such as the counts of random streams and what is sown, are those of the
    first example.

    Args:
      model: the model, or a pytree of models. The optimizer updates its
        variables of `wrt`, the loss the others.
      loss_fn: returns a scalar loss, or `(loss, aux)` with `has_aux`.
      *args: the further arguments of `loss_fn`: arrays, NNX objects, pytrees of
        both. For a method that wants a gradient per example, the leading axis
        of every array outside NNX objects is the batch.
      has_aux: whether `loss_fn` returns auxiliary output.
      argnums: the position of the model among the positional arguments of
        `loss_fn`. The optimizer's `wrt` says what is differentiated in it.
      axis_name: as in `TrainState.minimize`. What the loss does to NNX objects
        stays each device's own.
      **kwargs: keyword arguments of `loss_fn`, like `args`.

    Returns:
      What `nnx.value_and_grad` returns first, evaluated before the step: the
      loss, or `(loss, aux)` with `has_aux`. Per example, the means over the
      batch of the loss and of aux's scalars.

    Raises:
      UsageError: the loss comes first, changes an NNX object that is none of
        its arguments, or is a module's bound method. Or the method wants a
        gradient per example, and the model keeps batch statistics or the loss
        updates `nnx.metrics.Welford`.
    """
    if not callable(loss_fn) or _is_function(model):
      raise UsageError(
        "minimize takes the model first, and then the loss; type "
        "optimizer.minimize(model, loss_fn, batch)"
      )
    if isinstance(getattr(loss_fn, "__self__", None), nnx.Pytree):
      raise UsageError(
        "the loss is a bound method, whose object minimize does not see; make "
        "it a function that takes the object as an argument"
      )
    nodes, others = _without_nodes((args, kwargs))
    params = self._params(model)
    optimized = {(0, *path) for path, _ in nnx.to_flat_state(params)}
    is_optimized = lambda path, _: path in optimized
    per_example = "per_example" in stack.needs(self.tx)

    def pure_loss(params, rest, args, kwargs):
      with nnx.merge_context(_TAG, inner=True) as ctx:
        merged, nodes = ctx.merge(graphdef, nnx.State({0: params}), rest)
      args, kwargs = _with_nodes((args, kwargs), nodes)
      output = loss_fn(*args[:argnums], merged, *args[argnums:], **kwargs)
      loss, aux = output if has_aux else (output, None)
      aux_nodes, aux = _without_nodes(aux)
      with nnx.split_context(_TAG) as ctx:
        graphdef_out, _, rest_out = ctx.split(
          (merged, nodes, aux_nodes), is_optimized, ...
        )
      return loss, (aux, (graphdef_out, rest_out))

    try:
      with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as ctx:
          graphdef, _, rest = ctx.split((model, nodes), is_optimized, ...)
        if per_example:
          _check_per_example(model, nodes)
        (loss, aux), updates, opt_state, effects = step.minimize(
          self.tx,
          pure_loss,
          params,
          self._state(),
          rest,
          others,
          self.state_shardings,
          merge_effects=functools.partial(_merge_effects, rest),
          axis_name=axis_name,
        )
        graphdef_out, rest_out = effects
        with nnx.merge_context(_TAG, inner=False) as ctx:
          _, _, aux_nodes = ctx.merge(
            graphdef_out, nnx.State({0: params}), rest_out
          )
    except flax.errors.TraceContextError as error:
      raise UsageError(
        "the loss changes an NNX object that it reaches by closure; pass the "
        f"object to minimize as an argument of the loss ({error})"
      ) from error
    self._write(model, params, updates, opt_state)
    return (loss, _with_nodes(aux, aux_nodes)) if has_aux else loss

  def eval_model(self, model: nnx.Module) -> nnx.Module:
    """Returns the model to evaluate and export.

    Args:
      model: the model that is being trained; left as it is.

    Returns:
      A model with the parameters that the method evaluates (schedule_free's
      average, DoG's averaged iterates), or `model` itself.
    """
    params = self._params(model)
    evaluated = readers.eval_params(self._state(), params, self.shardings)
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
    params = self._params(model)
    opt_state = self.state_shardings.init(self.tx, params)
    self._write_state(opt_state)

  def init_from(
    self,
    model: nnx.Module,
    directory: str | os.PathLike[str],
    *,
    params_only: bool = False,
    config: Any = None,
  ) -> Sequence[str]:
    """Starts model and state where another run's checkpoint ended.

    See `flax_mechanic.adopt` for what is carried over. Random state and `step`
    stay as they are, and so do the model's `nnx.LoRAParam` where the checkpoint
    is of a model without.

    Args:
      model: the model whose parameters are optimized; updated in place, batch
        statistics included.
      directory: a run's --workdir, or a folder that Orbax wrote.
      params_only: whether to leave the saved optimizer's state.
      config: the job's, to be compared with the saved one.

    Returns:
      Sentences on what was taken and what restarts.

    Raises:
      UsageError: the model's parameters are not there, have other shapes, or
        are damaged.
    """
    from flax_mechanic.checkpoints import adoption  # It imports Orbax.

    def init(params):
      nnx.update(model, params)
      optimized = self._params(model)
      return self.state_shardings.init(self.tx, optimized)

    adopted = adoption.adopt(
      directory,
      nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngState))),
      init,
      params_only=params_only,
      new=by_path(nnx.as_pure(nnx.state(model, nnx.LoRAParam))).keys(),
      config=config,
    )
    self._write_state(adopted.opt_state)
    return adopted.notes

  def _params(self, model: Any) -> Any:
    return nnx.as_pure(nnx.state(model, self.wrt, graph=self.graph))

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
    variables, treedef = jax.tree.flatten(self.opt_state, is_leaf=_is_variable)
    values = treedef.flatten_up_to(opt_state)
    if not all(map(_is_variable, variables)):
      # The user has set an array, such as the learning rate, in its place.
      variables = [
        variable if _is_variable(variable) else optimizer_lib.OptArray(value)
        for variable, value in zip(variables, values, strict=True)
      ]
      self.opt_state = nnx.data(treedef.unflatten(variables))
    for variable, value in zip(variables, values, strict=True):
      variable.set_value(value)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Node:
  """Stands for an NNX object in a pytree; has no leaves."""

  index: int


def _without_nodes(tree: Any) -> tuple[list[Any], Any]:
  """Returns the NNX objects in a pytree, and it with a `_Node` for each."""
  nodes = []

  def take(leaf):
    if not graphlib.is_graph_node(leaf):
      return leaf
    nodes.append(leaf)
    return _Node(len(nodes) - 1)

  tree = jax.tree.map(take, tree, is_leaf=graphlib.is_graph_node)
  return nodes, tree


def _with_nodes(tree: Any, nodes: Sequence[Any]) -> Any:
  """Undoes `_without_nodes`."""
  is_node = lambda leaf: isinstance(leaf, _Node)
  return jax.tree.map(
    lambda leaf: nodes[leaf.index] if is_node(leaf) else leaf,
    tree,
    is_leaf=is_node,
  )


def _check_empty(state: nnx.State, wrt: filterlib.Filter) -> None:
  """Raises where a model has variables, of which `wrt` matches none."""
  types = {type(variable).__name__ for _, variable in nnx.to_flat_state(state)}
  if types:
    raise UsageError(
      f"wrt={getattr(wrt, '__name__', wrt)} matches none of the model's "
      f"variables, so that nothing would be trained; its variables are of type "
      f"{' and '.join(sorted(types))}"
    )


def _is_function(model: Any) -> bool:
  """Whether something is called, and holds no variables that are known."""
  is_tree = graphlib.is_graph_node(model) or not jax.tree_util.all_leaves(
    [model]
  )
  return callable(model) and not is_tree


def _check_per_example(model: nnx.Module, nodes: Sequence[Any]) -> None:
  """Raises for what has no gradient, or no effect, of one example."""
  if jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
    step.refuse_batch_statistics()
  for _, node in nnx.iter_graph((model, nodes)):
    if isinstance(node, nnx.metrics.Welford):
      raise UsageError(
        "a gradient per example does not go with an nnx.metrics.Welford that "
        "the loss takes; return its values in aux, and update it after minimize"
      )


def _merge_effects(before: nnx.State, effects: Any) -> Any:
  """Returns the effects that are kept of those on each example.

  Args:
    before: the state from which each example started.
    effects: a graphdef and the state after, whose arrays have a leading axis,
      the examples.
  """
  graphdef, after = effects
  known = dict(nnx.to_flat_state(before))

  def merge(path, variable):
    old = known.get(path)
    if isinstance(old, nnx.RngKey):
      return old
    if isinstance(old, nnx.metrics.MetricState):
      return jax.tree.map(
        lambda new, old: old + jnp.sum(new - old, axis=0, dtype=old.dtype),
        variable,
        old,
      )
    return jax.tree.map(lambda new: new[0], variable)

  merged = [(path, merge(path, v)) for path, v in nnx.to_flat_state(after)]
  return graphdef, nnx.from_flat_state(merged)


def _init(
  tx: optax.GradientTransformation, params: nnx.State, shardings: Shardings
) -> Any:
  """Returns the state of `tx`, each leaf in a variable.

  A leaf shaped like a parameter has that parameter's metadata, its annotated
  sharding above all.
  """
  variables = {
    "/".join(map(str, path)): variable
    for path, variable in nnx.to_flat_state(params)
  }
  for path, variable in variables.items():
    value = variable.get_value()
    if value is not None and not jax.tree_util.all_leaves([value]):
      raise UsageError(
        f"the parameter {path} holds a {type(value).__name__}; give each array "
        "in it a variable of its own"
      )

  def in_variable(value, parameter):
    if parameter is None:
      return optimizer_lib.OptArray(value)
    metadata = _metadata(variables[parameter.path])
    # A variable moves its value to its annotated sharding.
    if parameter.sharding and "out_sharding" in metadata:
      metadata["out_sharding"] = tuple(parameter.sharding.spec)
    return optimizer_lib.OptVariable(value, **metadata)

  return map_with_parameters(
    in_variable,
    shardings.init(tx, nnx.as_pure(params)),
    {leaf.path: leaf for leaf in shardings.leaves},
  )


def _is_variable(node: Any) -> bool:
  return isinstance(node, nnx.Variable)


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
    nnx.as_pure(jax.tree.map(sharding, params, is_leaf=_is_variable))
  )


def _annotated(shardings: Shardings, params: nnx.State) -> Shardings:
  """Returns the shardings with those that flax's `optimizer_sharding` names."""
  specs = {}
  for path, variable in nnx.to_flat_state(params):
    if variable.get_metadata().get("optimizer_sharding") is not None:
      of_state = nnx.Variable.from_metadata(
        variable.get_value(), _metadata(variable)
      )
      spec = nnx.get_partition_spec(of_state).get_value()
      specs["/".join(map(str, path))] = spec
  return shardings.with_specs(specs)


def _metadata(parameter: nnx.Variable) -> dict[str, Any]:
  """Returns a parameter's metadata for a leaf of the state.

  What is to be done with the parameter's own value, such as to clip it, is left
  out.
  """
  metadata = {
    name: value
    for name, value in parameter.get_metadata().items()
    if name not in ("on_create_value", "on_get_value", "on_set_value")
  }
  if "optimizer_sharding" in metadata:
    metadata["out_sharding"] = metadata.pop("optimizer_sharding")
  return metadata
