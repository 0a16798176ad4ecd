"""The tasks but text: their data, their losses, what cannot be run."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn import datasets

from configs import autoencoder, digits, ratings, tabular, teacher, text
from flax_mechanic.errors import UsageError
from tests import references
from tests.references import assert_same, check_loss, f64, join, perturbed
from train.job import make_job
from train.tasks import make_task

# Every config that a laptop can run: its module, and its variant if any.
CONFIGS = {
  "digits": (digits, ""),
  "cnn": (digits, "cnn"),
  "logistic": (digits, "logistic"),
  "mlp": (digits, "mlp"),
  "small_cnn": (digits, "small_cnn"),
  "vit": (digits, "vit"),
  "augmented": (digits, "augmented"),
  "autoencoder": (autoencoder,),
  "vae": (autoencoder, "vae"),
  "breast_cancer": (tabular, "breast_cancer"),
  "diabetes": (tabular, "diabetes"),
  "wine": (tabular, "wine"),
  "teacher": (teacher,),
  "changing": (teacher, "changing"),
  "ratings": (ratings,),
  "small": (text, "small"),
  "gru": (text, "gru"),
  "lstm": (text, "lstm"),
}


def make_config(name, **fields):
  module, *variant = CONFIGS[name]
  config = module.get_config(*variant)
  config.update(fields)
  return config


def make(name, **fields):
  return make_task(make_config(name, **fields))


# Every task.


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_are_a_pure_function_of_seed_and_step(name):
  task, again = make(name, seed=3), make(name, seed=3)
  for step in (0, 1, 22, 1000):
    batch = task.train_batch(step)
    sizes = {len(array) for array in batch.values()}
    assert sizes == {make_config(name).batch_size}
    assert_same(batch, again.train_batch(step))
    part = again.train_batch(step, slice(2, 6))
    assert_same({k: v[2:6] for k, v in batch.items()}, part)
  assert_same(task.train_batch(5), again.train_batch(5))
  first = next(iter(batch))
  for other in (task.train_batch(6), make(name, seed=4).train_batch(5)):
    assert (other[first] != task.train_batch(5)[first]).any()
  for a, b in zip(
    task.eval_batches(), make(name, seed=4).eval_batches(), strict=True
  ):
    assert_same(a, b)
    assert not len(a[first]) % 8


# tests/test_train.py trains an augmented job.
_ELSEWHERE = {"digits", "cnn", "augmented"}
_SLOW = {
  *("changing", "gru", "iris", "lstm", "ratings", "small", "tiny", "vae"),
  *("vit", "wine"),
}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW))
    for name in sorted(CONFIGS.keys() - _ELSEWHERE)
  ],
)
def test_jobs_train(name):
  config = make_config(name, batch_size=8)
  # What is compiled is the task's own.
  config.optimizer, config.guard = "sign_sgd", False
  job = make_job(config, jax.devices()[:1])
  losses = []
  with jax.set_mesh(job.mesh):
    state, batch = job.create(), job.train_batch(0)
    # Of four steps the first has a learning rate of 0: it warms up.
    for _ in range(4):
      state, metrics = job.train_step(state, batch)
      losses.append(float(metrics["train/loss"]))
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]


def test_a_model_is_evaluated_in_evaluation_mode():
  job = make_job(make_config("vae"), jax.devices()[:1])
  modes = []

  def look(state):
    modes.append(job.functions.eval_model(state).deterministic)

  with jax.set_mesh(job.automatic):
    jax.eval_shape(look, job.target)
  assert modes == [True]


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_runs_can_be_vmapped_over_seeds(name):
  task = make(name, batch_size=8)
  batch = task.train_batch(0)

  def first_step(seed):
    model = task.create_model(nnx.Rngs(jax.random.key(seed)))
    return nnx.value_and_grad(task.loss, has_aux=True)(model, batch)

  (loss, _), grads = jax.eval_shape(jax.vmap(first_step), jnp.arange(2))
  assert loss.shape == (2,)
  assert {leaf.shape[0] for leaf in jax.tree.leaves(grads)} == {2}


@pytest.mark.parametrize(
  ("name", "model"),
  [
    ("cnn", {}),
    pytest.param("vit", {"num_layers": 1}, marks=pytest.mark.slow),
    ("autoencoder", {}),
  ],
)
def test_bfloat16(name, model):
  references.check_narrow(make(name, dtype="bfloat16", model=model), "bfloat16")


def test_only_text_has_a_report():
  for name in CONFIGS.keys() - {"small", "gru", "lstm"}:
    assert make(name).report(None) == ""


# Digits: the data.


def rows(batch):
  """The examples of a digits batch as a sorted list of bytes."""
  pairs = zip(batch["image"], batch["label"], strict=True)
  return sorted(image.tobytes() + label.tobytes() for image, label in pairs)


@pytest.mark.parametrize("batch_size", [100, 3000])
def test_digits_covers_each_epoch_exactly_once(batch_size):
  task = make("digits", batch_size=batch_size)
  everything = datasets.load_digits()
  held_out = join(task.eval_batches())
  count = len(everything.target) - len(held_out["label"])
  steps = math.ceil(3 * count / batch_size)
  stream = join([task.train_batch(step) for step in range(steps)])
  epochs = [
    {k: v[e * count : (e + 1) * count] for k, v in stream.items()}
    for e in range(3)
  ]
  whole = {
    "image": everything.images.astype(np.uint8),
    "label": everything.target.astype(np.uint8),
  }
  for epoch in epochs:
    assert rows(join([epoch, held_out])) == rows(whole)
  assert (epochs[0]["label"] != epochs[1]["label"]).any()


def test_digits_batches_stay_what_they_were():
  # A run resumed by a newer release goes on with the same examples.
  batch = make("digits", seed=3).train_batch(1000)
  expected = [5, 2, 4, 5, 2, 2, 3, 3, 5, 4, 0, 2]
  np.testing.assert_array_equal(batch["label"][:12], expected)


def test_digits_holds_out_a_fixed_stratified_fifth():
  (batch,) = make("digits", seed=1).eval_batches()
  np.testing.assert_array_equal(np.bincount(batch["label"]), [36] * 10)


@pytest.mark.parametrize(
  ("name", "classes", "key"),
  [("digits", 10, "label"), ("breast_cancer", 2, "target")],
)
def test_label_noise_is_of_training_labels_only(name, classes, key):
  def task(fraction):
    return make(name, batch_size=count, data={"label_noise": fraction})

  count = {"digits": 1437, "breast_cancer": 457}[name]
  clean = task(0.0).train_batch(0)
  changed = {}
  for fraction in (0.1, 0.5, 1.0):
    noisy = task(fraction).train_batch(0)
    assert_same(
      {k: v for k, v in noisy.items() if k != key},
      {k: v for k, v in clean.items() if k != key},
    )
    assert noisy[key].dtype == clean[key].dtype
    changed[fraction] = noisy[key] != clean[key]
    # Of those drawn anew, one in so many gets its own class again.
    expected = fraction * (1 - 1 / classes)
    assert changed[fraction].mean() == pytest.approx(expected, abs=0.05)
    assert_same(task(fraction).eval_batches(), task(0.0).eval_batches())
  assert (changed[0.1] <= changed[0.5]).all()
  assert (changed[0.5] <= changed[1.0]).all()
  shares = np.bincount(noisy[key]) / count
  np.testing.assert_allclose(shares, [1 / classes] * classes, atol=0.05)


def test_label_noise_is_the_same_for_every_seed():
  tasks = [
    make("logistic", seed=seed, batch_size=1437, data={"label_noise": 0.5})
    for seed in range(2)
  ]
  one, other = (rows(task.train_batch(0)) for task in tasks)
  assert one == other


def test_images_are_moved_by_seed_and_step_alone():
  def moves(seed, step):
    """By what each image of a batch may have been moved."""
    task, still = (make(n, seed=seed) for n in ("augmented", "small_cnn"))
    pairs = zip(
      task.train_batch(step)["image"],
      np.pad(still.train_batch(step)["image"], ((0, 0), (1, 1), (1, 1))),
      strict=True,
    )
    return [
      {
        (y, x)
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
        if (padded[1 - y : 9 - y, 1 - x : 9 - x] == image).all()
      }
      for image, padded in pairs
    ]

  found = moves(0, 7)
  assert all(found)
  assert len(set().union(*found)) == 9
  for other in (moves(0, 8), moves(1, 7)):
    assert any(a.isdisjoint(b) for a, b in zip(found, other, strict=True))
  augmented, small = make("augmented"), make("small_cnn")
  assert_same(join(augmented.eval_batches()), join(small.eval_batches()))


# Digits: the models.


@pytest.mark.parametrize(
  ("name", "widths"),
  [("digits", (8,)), ("cnn", (4,)), ("cnn", (4, 4, 4, 4, 4))],
)
def test_digits_models_take_any_widths(name, widths):
  task = make(name, model={"widths": widths})
  model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
  logits = nnx.eval_shape(lambda m: m(jnp.zeros([3, 8, 8])), model)
  assert logits.shape == (3, 10)
  assert len(model.hidden) == len(widths)


def convolutions(model, images):
  """The logits of a Cnn: at each place, the 3x3 pixels around it."""
  x = images[..., None]
  for i, layer in enumerate(model.hidden):
    # An even side at stride 2 is padded behind alone.
    stride, padding = (1, (1, 1)) if i == 0 else (2, (0, 1))
    x = np.pad(x, ((0, 0), padding, padding, (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    x = np.einsum(
      "bijcyx,yxcd->bijd", patches[:, ::stride, ::stride], f64(layer.kernel)
    )
    x = np.maximum(x + f64(layer.bias), 0)
  return references.linear(model.head, x.reshape(len(x), -1))


def vision_transformer(model, images, num_heads=4):
  """The logits of a Vit, one image and one head at a time."""

  def norm(layer, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * f64(layer.scale) + f64(layer.bias)

  def attend(layer, x):
    y = f64(layer.out.bias)
    for h in range(num_heads):
      q, k, v = (
        x @ f64(f.kernel)[:, h] + f64(f.bias)[h]
        for f in (layer.query, layer.key, layer.value)
      )
      p = references.softmax(q @ k.T / np.sqrt(q.shape[1]))
      y = y + p @ v @ f64(layer.out.kernel)[h]
    return y

  logits = []
  for image in images:
    patches = [
      image[y : y + 2, x : x + 2].reshape(-1)
      for y in range(0, 8, 2)
      for x in range(0, 8, 2)
    ]
    x = references.linear(model.embed, np.stack(patches))
    x = x + f64(model.positions)
    for block in model.blocks:
      x = x + attend(block.attention, norm(block.attention_norm, x))
      up = references.linear(block.up, norm(block.mlp_norm, x))
      x = x + references.linear(block.down, references.gelu(up))
    logits.append(references.linear(model.head, norm(model.norm, x).mean(0)))
  return np.stack(logits)


@pytest.mark.parametrize(
  ("name", "forward"),
  [
    ("logistic", references.mlp),
    ("mlp", references.mlp),
    ("small_cnn", convolutions),
    pytest.param("vit", vision_transformer, marks=pytest.mark.slow),
  ],
)
def test_digits_loss_is_the_reference(name, forward):
  task = make(name)
  model = perturbed(task)
  batch = task.train_batch(0)
  logits = forward(model, batch["image"] / np.float64(16))
  check_loss(task, model, batch, logits, batch["label"])


def test_logistic_has_no_hidden_layer():
  model = references.create(make("logistic"))
  assert len(model.hidden) == 0
  assert model.head.kernel.shape == (64, 10)


def test_batch_norm_is_the_reference():
  task = make("augmented", model={"widths": (4,)})
  model = perturbed(task)
  images = task.train_batch(0)["image"] / np.float32(16)
  layer, norm = model.hidden[0], model.norms[0]
  x = f64(layer.bias) + np.einsum(
    "bijyx,yxd->bijd",
    np.lib.stride_tricks.sliding_window_view(
      np.pad(images, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2)
    ),
    f64(layer.kernel)[:, :, 0],
  )
  mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
  for train in (True, False):
    y = (x - mean) / np.sqrt(variance + 1e-5) * f64(norm.scale) + f64(norm.bias)
    logits = references.linear(model.head, np.maximum(y, 0).reshape(32, -1))
    np.testing.assert_allclose(model(images), logits, rtol=1e-4, atol=1e-4)
    if train:
      np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-4)
      model.eval()
      mean, variance = 0.1 * mean, 0.9 + 0.1 * variance


# The autoencoders.


def test_autoencoder_loss_is_the_reference():
  task = make("autoencoder", model={"widths": (32, 16)})
  model = perturbed(task)
  batch = task.train_batch(0)
  assert batch.keys() == {"image"}
  pixels = batch["image"].reshape(32, 64) / np.float64(16)
  code = references.mlp(model.encoder, pixels)
  assert code.shape == (32, 8)
  assert code.min() < 0
  assert [f.kernel.shape[1] for f in model.decoder.hidden] == [16, 32]
  restored = references.mlp(model.decoder, code)
  references.check_squared_error(task, model, batch, restored, pixels)


def test_vae_loss_is_the_reference():
  task = make("vae")
  model = perturbed(task)
  batch = task.train_batch(0)
  pixels = batch["image"].reshape(32, 64) / np.float64(16)
  mean, log_variance = np.split(references.mlp(model.encoder, pixels), 2, 1)
  terms = (np.exp(log_variance) + mean**2 - 1 - log_variance) / 2
  divergence = terms.sum(1).mean()
  noise = jax.random.normal(nnx.clone(model).rngs(), mean.shape)
  for drawn in (np.asarray(noise, np.float64), 0):
    code = mean + np.exp(log_variance / 2) * drawn
    error = ((references.mlp(model.decoder, code) - pixels) ** 2).mean()
    loss, metrics = nnx.jit(task.loss)(model, batch)
    np.testing.assert_allclose(metrics["divergence"], divergence, rtol=1e-5)
    np.testing.assert_allclose(
      loss, error + 2 * 0.02 / 64 * divergence, rtol=1e-5
    )
    model.eval()


def test_autoencoder_has_the_images_of_digits():
  ours, theirs = (make(name, seed=3) for name in ("autoencoder", "mlp"))
  ours, theirs = ours.train_batch(7), theirs.train_batch(7)
  np.testing.assert_array_equal(ours["image"], theirs["image"])


# Tables.


@pytest.mark.parametrize(
  ("name", "counts"), [("breast_cancer", (457, 112)), ("diabetes", (354, 88))]
)
def test_tables_are_standardized_by_their_training_rows(name, counts):
  task = make(name, batch_size=counts[0], data={"label_noise": 0.0})
  train, held_out = task.train_batch(0), join(task.eval_batches())
  assert (len(train["target"]), len(held_out["target"])) == counts
  features, target = getattr(datasets, f"load_{name}")(return_X_y=True)
  originals = {"features": features}
  if name == "diabetes":
    originals["target"] = target
  else:
    both = join([train, held_out])["target"]
    np.testing.assert_array_equal(np.bincount(both), np.bincount(target))
  for key, original in originals.items():
    assert train[key].dtype == np.float32
    np.testing.assert_allclose(train[key].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train[key].std(0), 1, rtol=1e-5)
    assert (np.abs(held_out[key].mean(0)) > 1e-3).any()
    # The held-out rows are moved and scaled alike.
    ours = np.sort(join([train, held_out])[key].astype(np.float64), 0)
    ours, theirs = (
      (x - x.mean(0)) / x.std(0) for x in (ours, np.sort(original, 0))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_tables_keep_rows_together():
  task = make("diabetes", batch_size=354)
  features, target = datasets.load_diabetes(return_X_y=True)
  batch = join([task.train_batch(0), *task.eval_batches()])
  for column in range(features.shape[1]):
    ours = np.corrcoef(batch["features"][:, column], batch["target"])
    theirs = np.corrcoef(features[:, column], target)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_class_loss_is_the_reference():
  task = make("breast_cancer", model={"widths": (5,)})
  model = perturbed(task)
  batch = task.train_batch(0)
  assert batch["features"].shape == (32, 30)
  logits = references.mlp(model, batch["features"])
  assert logits.shape == (32, 2)
  check_loss(task, model, batch, logits, batch["target"])


@pytest.mark.parametrize(("name", "width"), [("diabetes", 10), ("teacher", 16)])
@pytest.mark.parametrize("widths", [(), (7, 5)])
def test_number_loss_is_the_reference(name, width, widths):
  task = make(name, model={"widths": widths})
  model = perturbed(task)
  batch = task.train_batch(0)
  assert batch["features"].shape == (32, width)
  predictions = references.mlp(model, batch["features"])
  references.check_squared_error(
    task, model, batch, predictions, batch["target"]
  )


# The teacher.


def test_teacher_is_a_fixed_function_and_noise():
  noisy = make("teacher", batch_size=4096)
  clean = make("teacher", batch_size=4096, data={"noise": 0.0})
  a, b = noisy.train_batch(0), clean.train_batch(0)
  np.testing.assert_array_equal(a["features"], b["features"])
  x = b["features"].astype(np.float64)
  np.testing.assert_allclose(b["target"], teacher_of(clean, 0)(x), atol=1e-5)
  for other in (make("teacher", seed=9), noisy):
    assert_same(other._weights, clean._weights)
  assert (a["target"] - b["target"]).std() == pytest.approx(0.3, rel=0.05)
  assert (a["target"] - b["target"]).mean() == pytest.approx(0, abs=0.02)
  np.testing.assert_allclose(np.cov(x.T), np.eye(16), atol=0.1)


def teacher_of(task, turn):
  w1, w2 = task._weights[turn]
  return lambda x: (np.tanh(x.astype(np.float64) @ w1) @ w2)[:, 0]


def test_a_teacher_changes_at_the_step_it_says():
  task = make("changing", data={"noise": 0.0})
  held_out = [(-1, batch) for batch in task.eval_batches()]
  assert_same(task._weights[0], make("teacher")._weights[0])
  for step, turn in ((0, 0), (99, 0), (100, 1), (399, 3), (400, 0)):
    held_out.append((turn, task.train_batch(step)))
  for turn, batch in held_out:
    for each in range(4):
      error = teacher_of(task, each)(batch["features"]) - batch["target"]
      assert (np.abs(error).max() < 1e-5) == (each == turn % 4)


def test_teacher_never_repeats_an_example():
  task = make("teacher")
  batches = [task.train_batch(step) for step in range(20)]
  batches += [make("teacher", seed=1).train_batch(0), *task.eval_batches()]
  features = join(batches)["features"]
  assert len(features) == 21 * 32 + 2048
  assert len(np.unique(features[:, 0])) > 0.999 * len(features)


# Ratings.


def test_ratings_are_products_and_noise():
  task = make("ratings", batch_size=4096)
  model = perturbed(task)
  batch = task.train_batch(0)
  user, item = batch["user"], batch["item"]
  clean = (task._users[user] * task._items[item]).sum(1) / 2
  assert (batch["rating"] - clean).std() == pytest.approx(0.3, rel=0.05)
  for drawn in (user, item):
    assert np.bincount(drawn).argmax() == 0
  assert_same(make("ratings", seed=1)._users, task._users)
  of = lambda name, index: f64(getattr(model, name).embedding)[index]
  predictions = (
    (of("user", user) * of("item", item)).sum(1, keepdims=True)
    + of("user_bias", user)
    + of("item_bias", item)
  )
  references.check_squared_error(
    task, model, batch, predictions, batch["rating"]
  )


# What cannot be run.


def test_unknown_variants_name_the_known_ones():
  with pytest.raises(UsageError, match=r"digits.py has no variant 'x'.* cnn"):
    digits.get_config("x")
  with pytest.raises(UsageError, match="did you mean 'diabetes'"):
    tabular.get_config("diabetis")


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("digits", {"task": "digitz"}, "config.task='digitz'.*mean 'digits'"),
    ("digits", {"dtype": "bfloat"}, "config.dtype='bfloat'.*'bfloat16'"),
    ("digits", {"param_dtype": "int8"}, "config.param_dtype='int8'"),
    ("digits", {"model": {"name": "cnm"}}, "config.model.name='cnm'.*'cnn'"),
    (
      "digits",
      {"model": {"name": "vit"}},
      "'vit' needs num_layers, num_heads, embed_dim, mlp_dim and has no widths"
      "; type --config=configs/digits.py:vit",
    ),
    (
      "digits",
      {"model": {"name": "logistic"}},
      "'logistic' has no widths; type --config=configs/digits.py:logistic",
    ),
    (
      "logistic",
      {"model": {"name": "cnn"}},
      "'cnn' needs widths; type --config=configs/digits.py:cnn",
    ),
    ("digits", {"model": {"widths": (3, 0)}}, r"config.model.widths=\(3, 0\)"),
    ("digits", {"model": {"widths": ()}}, r"config.model.widths=\(\)"),
    ("digits", {"model": {"widths": ("8",)}}, r"widths=\('8',\) must hold"),
    ("vit", {"model": {"num_layers": 0}}, "config.model.num_layers=0"),
    (
      "vit",
      {"model": {"num_heads": 3}},
      "embed_dim=32 must be a multiple of 3",
    ),
    (
      "logistic",
      {"data": {"label_noise": 1.1}},
      "config.data.label_noise=1.1 must be from 0 to 1",
    ),
    ("autoencoder", {"model": {"code": 0}}, "config.model.code=0"),
    ("autoencoder", {"model": {"widths": (0,)}}, "config.model.widths"),
    ("diabetes", {"model": {"widths": (0,)}}, "config.model.widths"),
    ("teacher", {"model": {"widths": (0,)}}, "config.model.widths"),
    ("diabetes", {"data": {"name": "diabetis"}}, "'diabetis'.*'diabetes'"),
    (
      "diabetes",
      {"data": {"label_noise": 0.1}},
      "the target of diabetes is a number; type --config.data.label_noise=0.0",
    ),
    ("breast_cancer", {"data": {"label_noise": -1.0}}, "label_noise=-1.0"),
    ("teacher", {"data": {"noise": -0.1}}, "config.data.noise=-0.1"),
    ("changing", {"data": {"change_every": -1}}, "change_every=-1"),
    ("ratings", {"data": {"noise": -0.1}}, "config.data.noise=-0.1"),
    ("ratings", {"model": {"embed_dim": 0}}, "config.model.embed_dim=0"),
    ("augmented", {"data": {"shift": 8}}, "config.data.shift=8"),
    ("vae", {"model": {"variance": 0.0}}, "config.model.variance=0.0"),
  ],
)
def test_errors(name, fields, message):
  with pytest.raises(UsageError, match=message):
    make(name, **fields)


@pytest.mark.parametrize("name", ["digits", "autoencoder", "diabetes"])
def test_tasks_without_scikit_learn(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(UsageError, match=r'pip install -e "\.\[train\]"'):
    make(name)
