"""The nnx.Optimizer integration."""

from collections.abc import Callable
from typing import Any

import optax
from flax import nnx
from flax.nnx import filterlib


class Optimizer(nnx.Optimizer):
  """An `nnx.Optimizer` that does a whole step of any registered method.

  Attributes:
    step: uint32 scalar, updates so far.
    tx: the transformation.
    opt_state: its state, in NNX variables.

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
  ):
    """Creates the state of `tx` for the parameters of `model`.

    Args:
      model: the model whose parameters are optimized.
      tx: any optax transformation, as `make_optimizer` returns it.
      wrt: which of the model's variables are optimized.
    """
    super().__init__(model, optax.with_extra_args_support(tx), wrt=wrt)

  def minimize(
    self,
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
  ) -> Any:
    """Does one step on `loss_fn(model, *args)`.

    Args:
      model: the model, updated in place.
      loss_fn: returns a scalar loss, or `(loss, aux)` with `has_aux`.
      *args: the further arguments of `loss_fn`.
      has_aux: whether `loss_fn` returns auxiliary output.

    Returns:
      What `nnx.value_and_grad` returns first, evaluated before the step: the
      loss, or `(loss, aux)` with `has_aux`.
    """
    wrt = nnx.DiffState(0, self.wrt)
    output, grads = nnx.value_and_grad(loss_fn, argnums=wrt, has_aux=has_aux)(
      model, *args
    )
    self.update(model, grads, value=output[0] if has_aux else output)
    return output

  def eval_model(self, model: nnx.Module) -> nnx.Module:
    """Returns the model to evaluate and export.

    Args:
      model: the model that is being trained.
    """
    return model
