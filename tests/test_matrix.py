"""Every row of the table, in NNX and in Linen: trains, stays, resumes."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

import flax_mechanic
from configs import digits
from tests import optimizers
from train.tasks import make_task

STEPS = 200
# One row of each way to step.
QUICK = ["mechanic", "prodigy", "momo", "sam", "dpsgd"]


@dataclasses.dataclass
class Job:
  """A job in either API, whose state is one pytree."""

  create: Callable
  step: Callable  # (state, batch) -> (state, loss)
  eval_loss: Callable  # (state, batch) -> loss


def nnx_job(task, tx):
  def create():
    model = task.create_model(nnx.Rngs(0))
    return {"model": model, "optimizer": flax_mechanic.Optimizer(model, tx)}

  graphdef = nnx.graphdef(nnx.eval_shape(create))

  def step(state, batch):
    objects = nnx.merge(graphdef, state)
    loss, _ = objects["optimizer"].minimize(
      objects["model"], task.loss, batch, has_aux=True
    )
    return nnx.state(objects), loss

  def eval_loss(state, batch):
    objects = nnx.merge(graphdef, state)
    model = objects["optimizer"].eval_model(objects["model"])
    return task.loss(model, batch)[0]

  return Job(lambda: nnx.state(create()), step, eval_loss)


class LinenMlp(linen.Module):
  @linen.compact
  def __call__(self, images):
    x = images.reshape(len(images), -1)
    return linen.Dense(10)(linen.relu(linen.Dense(16)(x)))


def linen_job(task, tx):
  del task
  model = LinenMlp()

  def loss_fn(params, batch):
    logits = model.apply({"params": params}, batch["image"] / 16.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"].astype(int)
    )
    return losses.mean()

  def create():
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8)))
    return flax_mechanic.TrainState.create(
      apply_fn=model.apply, params=variables["params"], tx=tx
    )

  return Job(
    create,
    lambda state, batch: state.minimize(loss_fn, batch),
    lambda state, batch: loss_fn(state.eval_params(), batch),
  )


def kinds(state):
  """Returns what a compiled step takes each leaf for."""
  weak = lambda leaf: getattr(leaf, "weak_type", False)  # Keys are not.
  return [(x.shape, x.dtype, weak(x)) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize(
  ("name", "make_job"),
  [
    *optimizers.cases(optimizers.NAMES, QUICK, nnx_job),
    *optimizers.cases(optimizers.STEPS, ["mechanic"], linen_job),
  ],
)
def test_trains_compiles_once_keeps_dtypes_and_resumes(
  tmp_path, name, make_job
):
  config = optimizers.configure(digits.get_config(), name)
  config.model.widths = (16,)
  task = make_task(config)
  schedule = flax_mechanic.make_schedule(
    flax_mechanic.own_schedule(config), STEPS, 20
  )
  job = make_job(task, flax_mechanic.make_optimizer(config, schedule))
  step = jax.jit(job.step, donate_argnums=0)

  losses = []
  # Eagerly, with every buffer its own; a jitted creation has the same kinds.
  # Where a restored state is, so that one program serves both.
  state = jax.device_put(job.create(), jax.devices()[0])
  target = jax.eval_shape(job.create)
  before = kinds(state)
  assert before == kinds(target)
  with flax_mechanic.Checkpointer(tmp_path) as checkpointer:
    for i in range(STEPS):
      if i == STEPS - 5:
        checkpointer.save(i, state)
      state, loss = step(state, task.train_batch(i))
      losses.append(float(loss))
    assert step._cache_size() == 1
    assert kinds(state) == before
    assert np.mean(losses[-10:]) < losses[0] / 2
    (held_out,) = task.eval_batches()
    assert job.eval_loss(state, held_out) < losses[0] / 2

    checkpointer.wait()
    restored = checkpointer.restore(target)
    state = restored.state
    for i in range(restored.step, STEPS):
      state, loss = step(state, task.train_batch(i))
      assert float(loss) == losses[i]


def test_every_row_says_what_it_is():
  text = flax_mechanic.describe()
  for name, row in flax_mechanic.methods().items():
    assert name in text
    assert row.summary
    assert row.advice
    assert row.paper
