"""`flax_mechanic.Optimizer`, the nnx.Optimizer integration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import flax_mechanic
from flax_mechanic import UsageError, mechanize


class Model(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(8, 1, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, x):
  outputs = model(x)
  return jnp.mean((outputs - 1.0) ** 2), outputs


def batch(step):
  return jax.random.normal(jax.random.key(step), (16, 4))


def states_equal(a, b):
  a, b = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(m))) for m in (a, b))
  raw = lambda x: (
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
  )
  return all(np.array_equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True))


def test_minimize_is_value_and_grad_then_update():
  tx = mechanize(optax.adamw(1.0))
  ours, theirs = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
  optimizer = flax_mechanic.Optimizer(ours, tx)
  reference = nnx.Optimizer(theirs, tx, wrt=nnx.Param)
  for i in range(3):
    loss, outputs = optimizer.minimize(ours, loss_fn, batch(i), has_aux=True)
    (expected, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(
      theirs, batch(i)
    )
    reference.update(theirs, grads)
    assert loss == expected
    assert outputs.shape == (16, 1)
  # Batch statistics and the dropout stream advance too.
  assert states_equal(ours, theirs)
  assert ours.dropout.rngs.count[...] == 3
  assert optimizer.step[...] == 3


def test_minimize_without_aux_returns_the_loss():
  model = Model(nnx.Rngs(0))
  optimizer = flax_mechanic.Optimizer(model, optax.sgd(0.1))
  loss = optimizer.minimize(model, lambda m, x: loss_fn(m, x)[0], batch(0))
  assert loss.shape == ()


def test_update_takes_every_extra_argument():
  model = Model(nnx.Rngs(0))
  optimizer = flax_mechanic.Optimizer(model, optax.sgd(0.1))
  grads = nnx.grad(lambda m: loss_fn(m, batch(0))[0])(model)
  before = model.head.bias[...]
  optimizer.update(model, grads, value=jnp.float32(1.0), anything=2)
  assert not np.array_equal(before, model.head.bias[...])


def test_wrt_leaves_the_other_variables_alone():
  model = Model(nnx.Rngs(0))
  only_head = nnx.All(nnx.Param, nnx.PathContains("head"))
  optimizer = flax_mechanic.Optimizer(
    model, mechanize(optax.sgd(1.0)), wrt=only_head
  )
  kernel, head = model.hidden.kernel[...], model.head.kernel[...]
  for i in range(2):
    optimizer.minimize(model, lambda m, x: loss_fn(m, x)[0], batch(i))
  assert np.array_equal(kernel, model.hidden.kernel[...])
  assert not np.array_equal(head, model.head.kernel[...])


def test_donated_step_compiles_once_and_scalars_read_its_state():
  def create():
    model = Model(nnx.Rngs(0))
    tx = mechanize(optax.adamw(1.0))
    return {"model": model, "optimizer": flax_mechanic.Optimizer(model, tx)}

  graphdef, state = nnx.split(create())

  @jax.jit
  def reference(state, x):
    objects = nnx.merge(graphdef, state)
    optimizer = objects["optimizer"]
    loss, _ = optimizer.minimize(objects["model"], loss_fn, x, has_aux=True)
    return nnx.state(objects), {
      "loss": loss,
      **flax_mechanic.scalars(optimizer.opt_state),
    }

  donated = jax.jit(reference.__wrapped__, donate_argnums=0)
  kept, expected = state, []
  for i in range(4):
    kept, metrics = reference(kept, batch(i))
    expected.append(metrics)
  for i in range(4):
    state, metrics = donated(state, batch(i))
    assert metrics == expected[i]
  assert donated._cache_size() == 1
  assert metrics["mechanic/scale"] > 1e-6


def test_eval_model_of_a_plain_method_is_the_model():
  model = Model(nnx.Rngs(0))
  optimizer = flax_mechanic.Optimizer(model, optax.sgd(0.1))
  assert optimizer.eval_model(model) is model


def test_a_train_state_counts_its_steps():
  state = flax_mechanic.TrainState.create(
    apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1)
  )
  state, _ = state.minimize(lambda params: jnp.sum(params["w"]))
  assert int(state.step) == 1
  state = state.apply_gradients(grads=state.params)
  assert int(state.step) == 2


class Line(nnx.Module):
  def __init__(self, **metadata):
    self.slope = nnx.Param(jnp.ones(3), **metadata)
    self.shift = nnx.Param(0.5)

  def __call__(self, x):
    return x @ self.slope[...] + self.shift.get_value()


def assert_is_flax_s(tx, make, before=lambda optimizer: None):
  """Both optimizers train a model for three steps, and are compared."""
  trained = []
  for cls in (nnx.Optimizer, flax_mechanic.Optimizer):
    model = make()
    optimizer = cls(model, tx, wrt=nnx.Param)
    before(optimizer)
    for _ in range(3):
      loss = lambda model: jnp.mean((model(jnp.ones((4, 3))) + 5) ** 2)
      optimizer.update(model, nnx.grad(loss)(model))
    trained.append(jax.tree.leaves(nnx.as_pure(nnx.state(model))))
  np.testing.assert_allclose(*map(np.hstack, trained), rtol=1e-6)


def test_a_parameter_may_be_a_number():
  assert_is_flax_s(optax.adam(0.1), Line)


def test_what_is_done_to_a_parameter_is_not_done_to_its_moments():
  clip = lambda variable, value: jnp.clip(value, -1, 1)
  assert_is_flax_s(
    optax.sgd(1e-2, momentum=0.9), lambda: Line(on_set_value=clip)
  )


def test_the_learning_rate_can_be_set_in_its_state():
  config = ConfigDict({"learning_rate": 0.1})
  tx = flax_mechanic.make_optimizer(flax_mechanic.add_optimizer_config(config))

  def lower(optimizer):
    state = optax.tree.set(optimizer.opt_state, learning_rate=1e-4)
    optimizer.opt_state = nnx.data(state)

  assert_is_flax_s(tx, Line, lower)


def test_a_parameter_that_holds_several_arrays_is_refused():
  model = nnx.Dict({"w": nnx.Param({"a": jnp.ones(2), "b": jnp.ones(2)})})
  with pytest.raises(UsageError, match="the parameter w holds a dict; give"):
    flax_mechanic.Optimizer(model, optax.adam(0.1))


@pytest.mark.parametrize(
  ("tx", "name"), [(optax.adamw, "adamw"), (ConfigDict(), "ConfigDict")]
)
def test_what_is_no_transformation_is_refused(tx, name):
  words = rf"tx={name} is not a transformation; type tx=.*optax\.adamw\(1e-3\)"
  with pytest.raises(UsageError, match=words):
    flax_mechanic.Optimizer(Model(nnx.Rngs(0)), tx)
  with pytest.raises(UsageError, match=words):
    flax_mechanic.TrainState.create(apply_fn=None, params={}, tx=tx)


def test_a_loss_in_the_place_of_the_model_is_refused():
  model = Model(nnx.Rngs(0))
  optimizer = flax_mechanic.Optimizer(model, optax.sgd(0.1))
  words = r"type optimizer\.minimize\(model, loss_fn, batch\)"
  for given in ((loss_fn, model), (model, batch(0), loss_fn)):
    with pytest.raises(UsageError, match=words):
      optimizer.minimize(*given, batch(0))


def test_a_filter_that_matches_no_variable_is_refused():
  model = Model(nnx.Rngs(0))
  words = "wrt=LoRAParam matches none .* are of type BatchStat and Param$"
  for given in (model, nnx.eval_shape(lambda: model), {"a": model}):
    with pytest.raises(UsageError, match=words):
      flax_mechanic.Optimizer(given, optax.sgd(0.1), wrt=nnx.LoRAParam)


@pytest.mark.parametrize(
  "model", [nnx.Dict(), nnx.Dropout(0.1, rngs=nnx.Rngs(0))]
)
def test_a_model_may_have_nothing_to_train(model):
  optimizer = flax_mechanic.Optimizer(model, mechanize(optax.sgd(0.1)))
  assert optimizer.minimize(model, lambda model: jnp.ones([])) == 1
