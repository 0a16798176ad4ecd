"""Complex parameters, in NNX and in Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic import Optimizer, TrainState
from tests.by_hand import (
  RATE,
  build,
)

# Complex parameters.


class Complex(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.zeros(4, jnp.complex64))
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, inputs):
    return self.scale * (inputs @ self.w)


def complex_batch(step, size=16):
  rng = np.random.default_rng(step)
  pair = lambda *shape: np.complex64(
    rng.normal(size=shape) + 1j * rng.normal(size=shape)
  )
  inputs = pair(size, 4)
  return inputs, inputs @ np.complex64([1 + 1j, -1j, 0.5, -1 + 0.5j])


def complex_loss(outputs, targets):
  return jnp.mean(jnp.abs(outputs - targets) ** 2)


def complex_nnx_job(tx):
  def create():
    model = Complex()
    return {"model": model, "optimizer": Optimizer(model, tx)}

  graphdef = nnx.graphdef(nnx.eval_shape(create))

  def step(state, inputs, targets):
    objects = nnx.merge(graphdef, state)
    loss = objects["optimizer"].minimize(
      objects["model"],
      lambda model, x, y: complex_loss(model(x), y),
      inputs,
      targets,
    )
    return nnx.state(objects), loss

  return lambda: nnx.state(create()), step


def complex_linen_job(tx):
  def create():
    params = {"w": jnp.zeros(4, jnp.complex64), "scale": jnp.ones(())}
    return TrainState.create(apply_fn=None, params=params, tx=tx)

  def loss_fn(params, inputs, targets):
    return complex_loss(params["scale"] * (inputs @ params["w"]), targets)

  return create, lambda state, *batch: state.minimize(loss_fn, *batch)


@pytest.mark.parametrize("make_job", [complex_nnx_job, complex_linen_job])
def test_complex_parameters_train_and_resume_bit_for_bit(tmp_path, make_job):
  create, step = make_job(build("split_real_and_imaginary", learning_rate=0.05))
  step = jax.jit(step, donate_argnums=0)
  state, losses = create(), []
  with flax_mechanic.Checkpointer(tmp_path) as checkpointer:
    for i in range(100):
      if i == 50:
        checkpointer.save(i, state)
      state, loss = step(state, *complex_batch(i))
      losses.append(loss)
    assert losses[-1] < losses[0] / 10
    assert step._cache_size() == 1
    checkpointer.wait()
    state = checkpointer.restore(jax.eval_shape(create)).state
  resumed = []
  for i in range(50, 100):
    state, loss = step(state, *complex_batch(i))
    resumed.append(loss)
  np.testing.assert_array_equal(resumed, losses[50:])


@pytest.mark.parametrize(
  ("base", "make_job"),
  [
    ("mechanic", complex_nnx_job),
    ("momo", complex_nnx_job),
    ("schedule_free", complex_linen_job),
    *(
      pytest.param(base, complex_linen_job, marks=pytest.mark.slow)
      for base in ("prodigy", "dog")
    ),
  ],
)
def test_complex_parameters_train_over(base, make_job):
  tx = build(
    "split_real_and_imaginary",
    opt__split_real_and_imaginary__base=base,
    learning_rate=0.1,
  )
  create, step = make_job(tx)
  step = jax.jit(step, donate_argnums=0)
  state, losses = create(), []
  for i in range(150):
    state, loss = step(state, *complex_batch(i))
    losses.append(loss)
  assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", ["sgd", "split_real_and_imaginary"])
@pytest.mark.parametrize("make_job", [complex_nnx_job, complex_linen_job])
def test_a_complex_step_goes_down_the_gradient(name, make_job):
  tx = build(
    name,
    opt__sgd__momentum=None,
    opt__split_real_and_imaginary__base="sgd",
  )
  create, step = make_job(tx)
  state = jax.jit(step)(create(), *complex_batch(0))[0]
  state = jax.jit(step)(state, *complex_batch(1))[0]
  w, scale = np.zeros(4, np.complex64), 1.0
  for i in range(2):
    inputs, targets = complex_batch(i)
    errors = scale * (inputs @ w) - targets
    # dL/d(Re w) + i dL/d(Im w).
    d_w = 2 * scale * inputs.conj().T @ errors / len(inputs)
    d_scale = 2 * np.real(np.vdot(inputs @ w, errors)) / len(inputs)
    w, scale = w - RATE * d_w, scale - RATE * d_scale
  if isinstance(state, TrainState):
    params = state.params
  else:
    params = nnx.to_pure_dict(state)["model"]
  np.testing.assert_allclose(params["w"], w, rtol=1e-5)
  np.testing.assert_allclose(params["scale"], scale, rtol=1e-5)


def test_the_second_gradient_is_of_steepest_ascent_too():
  """What `grad_fn` returns has the sign of the gradient that `tx` receives."""

  def update(updates, state, params=None, *, grad_fn, **extra_args):
    return jax.tree.map(lambda a, b: a - b, grad_fn(params), updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
  params = {"w": jnp.array([1.0 + 2.0j, -3.0j])}
  state = TrainState.create(apply_fn=None, params=params, tx=tx)
  state, _ = state.minimize(
    lambda params: jnp.sum(jnp.abs(params["w"] - 1.0) ** 2)
  )
  np.testing.assert_allclose(state.params["w"], params["w"])


def test_a_complex_parameter_s_path_ends_where_its_name_does():
  config = ConfigDict({"learning_rate": 0.1})
  flax_mechanic.add_optimizer_config(config, "split_real_and_imaginary")
  config.no_decay = ("bias$",)
  config.guard = False  # It skips a first gradient of 0.
  config.opt.adamw.weight_decay = 0.5
  tx = flax_mechanic.make_optimizer(config)
  x = {
    "bias": jnp.ones(3, jnp.complex64),
    "kernel": jnp.ones(3, jnp.complex64),
  }
  updates, _ = tx.update(optax.tree.zeros_like(x), tx.init(x), x)
  np.testing.assert_array_equal(updates["bias"], 0)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
