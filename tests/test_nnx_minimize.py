"""`Optimizer.minimize` does to NNX objects what `nnx.value_and_grad` does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_mechanic
from flax_mechanic import UsageError, mechanize
from tests.by_hand import build
from tests.optimizers import STEPS, learning_rate


class Model(nnx.Module):
  def __init__(self, rngs, norm=True):
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs) if norm else lambda x: x
    self.dropout = nnx.Dropout(0.5)
    self.head = nnx.Linear(8, 1, rngs=rngs)
    self.calls = 0

  def __call__(self, x, rngs):
    x = nnx.relu(self.norm(self.hidden(x)))
    return self.head(self.dropout(x, rngs=rngs))


class Probe(nnx.Module):
  """Shares a layer with a model."""

  def __init__(self, layer):
    self.layer = layer
    self.seen = nnx.BatchStat(jnp.zeros(()))


def batch(step, size=8):
  return jax.random.normal(jax.random.key(step), (size, 4))


def error(outputs):
  return jnp.mean((outputs - 1.0) ** 2)


def create(seed=0, norm=True):
  rngs = nnx.Rngs(seed)
  model = Model(rngs, norm)
  return {
    "model": model,
    "rngs": nnx.Rngs(seed),
    "metrics": nnx.MultiMetric(loss=nnx.metrics.Average("loss")),
    "other": Model(rngs, norm),
    "probe": Probe(model.head),
  }


def mnist(model, rngs, metrics, x):
  outputs = model(x, rngs)
  loss = error(outputs)
  metrics.update(loss=loss)
  return loss, outputs


def teacher(model, rngs, other, x):
  target = jax.lax.stop_gradient(other(x, rngs))
  other.head.bias[...] = 0.9 * other.head.bias[...] + 0.1
  return jnp.mean((model(x, rngs) - target) ** 2), None


def sown(model, rngs, other, x):
  del other
  outputs = model(x, rngs)
  model.sow(nnx.Intermediate, "outputs", outputs)
  model.head.sow(nnx.Intermediate, "nested", {"mean": jnp.mean(outputs)})
  return error(outputs), None


def captured(model, rngs, other, x):
  del other
  forward = nnx.capture(
    lambda model, x: sown(model, rngs, None, x)[0], nnx.Intermediate
  )
  return forward(model, x)


def restructured(model, rngs, other, x):
  model.calls += 1
  other.extra = nnx.Linear(1, 1, rngs=rngs)
  return error(model(x, rngs)), None


def rematerialized(model, rngs, metrics, x):
  outputs = nnx.remat(lambda model, rngs, x: model(x, rngs))(model, rngs, x)
  metrics.update(loss=error(outputs))
  return error(outputs), outputs


def step(objects, x, *, loss_fn, names, wrt=nnx.Param, argnums=0):
  """One step with our optimizer, or as flax's guides write it with theirs."""
  model, optimizer = objects["model"], objects["optimizer"]
  args = [objects[name] for name in names]
  if isinstance(optimizer, flax_mechanic.Optimizer):
    return optimizer.minimize(
      model, loss_fn, *args, x, has_aux=True, argnums=argnums
    )
  differentiated = nnx.DiffState(argnums, wrt)
  if not nnx.set_graph_mode.current_value():
    differentiated = argnums
  evaluate = nnx.value_and_grad(loss_fn, argnums=differentiated, has_aux=True)
  args.insert(argnums, model)
  output, grads = evaluate(*args, x)
  optimizer.update(model, grads)
  return output


def both(tx, create=create, wrt=nnx.Param):
  """Returns the objects of one job twice, with our optimizer and flax's."""
  for cls in (flax_mechanic.Optimizer, nnx.Optimizer):
    objects = create()
    yield objects | {"optimizer": cls(objects["model"], tx, wrt=wrt)}


def arrays(tree):
  """Returns path -> array of objects, of the optimizer its state alone."""
  tree = {
    name: node.opt_state if name == "optimizer" else node
    for name, node in tree.items()
  }
  leaves = jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(tree)))
  return {
    jax.tree_util.keystr(path): jax.random.key_data(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    else leaf
    for path, leaf in leaves
  }


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for path, leaf in actual.items():
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


LOSSES = {
  "mnist": (mnist, ["rngs", "metrics"]),
  "teacher": (teacher, ["rngs", "other"]),
  "sown": (sown, ["rngs", "other"]),
  "captured": (captured, ["rngs", "other"]),
  "restructured": (restructured, ["rngs", "other"]),
  "rematerialized": (rematerialized, ["rngs", "metrics"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_effects_that_flax_keeps(name):
  loss_fn, names = LOSSES[name]
  ours, theirs = both(optax.sgd(0.1, momentum=0.9))
  for i in range(2):
    outputs = [
      step(objects, batch(i), loss_fn=loss_fn, names=names)
      for objects in (ours, theirs)
    ]
    assert_same(*(dict(enumerate(jax.tree.leaves(o))) for o in outputs))
  assert_same(arrays(ours), arrays(theirs))
  assert ours["model"].calls == theirs["model"].calls


def test_variables_are_shared_between_the_model_and_an_argument():
  """Flax takes both as one argument only."""

  def loss_fn(model, probe, x):
    assert probe.layer is model.head
    probe.seen[...] += jnp.sum(probe.layer.kernel[...])
    regularizer = jnp.sum(probe.layer.kernel[...] ** 2)
    return error(model(x, nnx.Rngs(0))) + regularizer

  tx = optax.sgd(0.1, momentum=0.9)
  ours, theirs = create(), create()
  optimizer = flax_mechanic.Optimizer(ours["model"], tx)
  together = theirs["model"], theirs["probe"]
  reference = nnx.Optimizer(together, tx, wrt=nnx.Param)
  head = ours["model"].head
  for i in range(2):
    optimizer.minimize(ours["model"], loss_fn, ours["probe"], batch(i))
    grads = nnx.grad(lambda both, x: loss_fn(*both, x))(together, batch(i))
    reference.update(together, grads)
  assert_same(arrays(ours), arrays(theirs))
  assert ours["probe"].layer is head is ours["model"].head
  assert ours["probe"].seen[...] != 0


def in_jax_jit(step, objects, batches):
  graphdef, state = nnx.split(objects)

  @jax.jit
  def pure(state, x):
    objects = nnx.merge(graphdef, state)
    output = step(objects, x)
    return nnx.state(objects), output[0]

  losses = []
  for x in batches:
    state, loss = pure(state, x)
    losses.append(loss)
  nnx.update(objects, state)
  assert pure._cache_size() == 1
  return jnp.stack(losses)


def in_lax_scan(step, objects, batches):
  graphdef, state = nnx.split(objects)

  def pure(state, x):
    objects = nnx.merge(graphdef, state)
    loss, _ = step(objects, x)
    return nnx.state(objects), loss

  state, losses = jax.lax.scan(pure, state, batches)
  nnx.update(objects, state)
  return losses


def in_nnx_scan(step, objects, batches):
  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
  def scanned(objects, x):
    return objects, step(objects, x)[0]

  return scanned(objects, batches)[1]


def in_nnx_jit(step, objects, batches):
  jitted = nnx.jit(lambda objects, x: step(objects, x)[0])
  return jnp.stack([jitted(objects, x) for x in batches])


def on_shards(step, objects, batches):
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  graphdef, state = nnx.split(objects)

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(), P("data")),
    out_specs=(P(), P()),
    check_vma=False,
  )
  def pure(state, x):
    objects = nnx.merge(graphdef, state)
    loss, _ = step(objects, x)
    return nnx.state(objects), jax.lax.pmean(loss, "data")

  losses = []
  for x in batches:
    state, loss = pure(state, x)
    losses.append(loss)
  nnx.update(objects, state)
  return jnp.stack(losses)


@pytest.mark.parametrize(
  "run", [in_nnx_jit, in_jax_jit, in_lax_scan, in_nnx_scan, on_shards]
)
def test_minimize_is_flax_s_step_under(run):
  ours, theirs = both(optax.sgd(0.1, momentum=0.9))
  batches = jnp.stack([batch(i) for i in range(3)])
  mine = functools.partial(step, loss_fn=mnist, names=["rngs", "metrics"])
  losses = [run(mine, objects, batches) for objects in (ours, theirs)]
  np.testing.assert_array_equal(*losses)
  assert_same(arrays(ours), arrays(theirs))
  assert ours["rngs"].default.count[...] == 3
  assert ours["metrics"].loss.count[...] == 3


def jitted_vmap(f, **axes):
  return nnx.jit(nnx.vmap(f, **axes))


@pytest.mark.parametrize(
  "map_", [jitted_vmap, pytest.param(nnx.pmap, marks=pytest.mark.slow)]
)
def test_minimize_over_seeds_is_flax_s_step(map_):
  def make(cls, key):
    objects = create(key, norm=False)
    tx = mechanize(optax.adamw(1.0))
    return objects | {"optimizer": cls(objects["model"], tx, wrt=nnx.Param)}

  ran = []
  for cls in (flax_mechanic.Optimizer, nnx.Optimizer):
    objects = map_(functools.partial(make, cls))(
      jax.random.split(jax.random.key(0))
    )
    losses = map_(
      lambda objects, x: step(
        objects, x, loss_fn=mnist, names=["rngs", "metrics"]
      )[0],
      in_axes=(0, None),
    )(objects, batch(0))
    ran.append(arrays(objects) | {"losses": losses})
  assert_same(*ran)
  assert ran[0]["losses"][0] != ran[0]["losses"][1]


def with_lora():
  objects = create()
  objects["model"] = nnx.LoRA(
    4, 2, 1, base_module=nnx.Linear(4, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
  )
  return objects


@pytest.mark.parametrize(
  "wrt",
  [
    nnx.LoRAParam,
    (nnx.Param, nnx.LoRAParam),
    nnx.All(nnx.Param, nnx.PathContains("kernel")),
    lambda path, _: path[0] == "lora_b",
  ],
  ids=["lora", "kinds", "path", "function"],
)
def test_the_model_s_place_and_what_is_optimized(wrt):
  """The model comes second, and variables of `wrt` elsewhere stay."""

  def loss_fn(other, model, x):
    return error(model(x)) + jnp.sum(other.hidden.kernel[...]), None

  ours, theirs = both(optax.sgd(0.1, momentum=0.9), with_lora, wrt)
  before = arrays(ours)
  for i in range(2):
    for objects in (ours, theirs):
      step(
        objects, batch(i), loss_fn=loss_fn, names=["other"], wrt=wrt, argnums=1
      )
  after = arrays(ours)
  assert_same(after, arrays(theirs))
  changed = {p for p in after if not np.array_equal(after[p], before[p])}
  assert {p.split("]")[0] for p in changed} == {"['model'", "['optimizer'"}


def test_models_in_a_tuple_and_keyword_arguments():
  def loss_fn(models, x, *, rngs, scale):
    outputs = models[1](models[0](x), rngs) * scale
    return error(outputs), rngs

  def objects():
    rngs = nnx.Rngs(0)
    models = (nnx.Linear(4, 4, rngs=rngs), Model(rngs))
    return models, nnx.Rngs(1)

  tx = optax.sgd(0.1, momentum=0.9)
  (models, rngs), (expected, their_rngs) = objects(), objects()
  optimizer = flax_mechanic.Optimizer(models, tx, wrt=nnx.Param)
  loss, same = optimizer.minimize(
    models, loss_fn, batch(0), rngs=rngs, scale=2.0, has_aux=True
  )
  reference = nnx.Optimizer(expected, tx, wrt=nnx.Param)
  (value, _), grads = nnx.value_and_grad(
    lambda models, rngs: loss_fn(models, batch(0), rngs=rngs, scale=2.0),
    has_aux=True,
  )(expected, their_rngs)
  reference.update(expected, grads)
  assert same is rngs
  assert loss == value
  assert_same(
    arrays({"models": models, "rngs": rngs}),
    arrays({"models": expected, "rngs": their_rngs}),
  )


@pytest.mark.parametrize("name", ["mnist", "teacher"])
def test_minimize_is_flax_s_step_in_tree_mode(name):
  loss_fn, names = LOSSES[name]
  with nnx.set_graph_mode(False):
    ours, theirs = both(
      mechanize(optax.adamw(1.0)), lambda: create() | {"probe": ()}
    )
    run = nnx.jit(functools.partial(step, loss_fn=loss_fn, names=names))
    for i in range(2):
      for objects in (ours, theirs):
        run({n: objects[n] for n in [*names, "model", "optimizer"]}, batch(i))
    assert_same(arrays(ours), arrays(theirs))
  assert ours["rngs"].default.count[...] > 0


def test_what_a_loss_changes_by_closure_is_to_be_passed():
  objects, _ = both(optax.sgd(0.1))
  model, rngs, optimizer = (objects[n] for n in ("model", "rngs", "optimizer"))
  by_closure = {
    "rngs": lambda model, x: error(model(x, rngs)),
    "model": lambda _, x: error(model(x, nnx.Rngs(0))),
  }
  for loss_fn in by_closure.values():
    with pytest.raises(UsageError, match="pass the object to minimize"):
      optimizer.minimize(model, loss_fn, batch(0))
  with pytest.raises(UsageError, match="bound method"):
    optimizer.minimize(model, model.__call__, batch(0), rngs)


def job(optimizer):
  """The shape of flax's mnist example."""

  @nnx.jit
  def train(model, optimizer, metrics, rngs, x):
    def loss_fn(model, rngs, metrics, x):
      loss, outputs = mnist(model, rngs, metrics, x)
      return loss, (outputs, rngs.dropout.count[...])

    return optimizer.minimize(model, loss_fn, rngs, metrics, x, has_aux=True)

  objects = create(norm=False)
  objects["rngs"] = nnx.Rngs(params=0, dropout=1)
  model = objects["model"]
  optimizer = flax_mechanic.Optimizer(model, optimizer)
  step = functools.partial(
    train, model, optimizer, objects["metrics"], objects["rngs"]
  )
  return objects, optimizer, step


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_every_kind_of_step_takes_flax_s_mnist_job(name):
  rate = {"learning_rate": learning_rate(name)}
  objects, optimizer, step = job(build(name, **rate))
  total = 0
  for i in range(3):
    loss, (outputs, _) = step(batch(i))
    total += loss
    assert outputs.shape == (8, 1)
    # The loss of an example comes from an output of its own mask.
    np.testing.assert_allclose(loss, error(outputs), rtol=1e-5)
  assert objects["rngs"].dropout.count[...] == 3
  metrics = objects["metrics"].loss
  private = "per_example" in flax_mechanic.methods()[name].needs
  assert metrics.count[...] == (24 if private else 3)
  np.testing.assert_allclose(
    metrics.total[...], total * (8 if private else 1), rtol=1e-5
  )
  state = nnx.state(optimizer)["opt_state"]
  told, again = map(flax_mechanic.scalars, (optimizer.opt_state, state))
  assert told == again


def test_sam_keeps_the_effects_of_its_first_evaluation():
  objects, _, step = job(build("sam", opt__sam__rho=10.0))
  once = create(norm=False)
  expected = mnist(
    once["model"], nnx.Rngs(params=0, dropout=1), once["metrics"], batch(0)
  )
  loss, (outputs, _) = step(batch(0))
  np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
  np.testing.assert_allclose(outputs, expected[1], rtol=1e-5)
  assert_same(
    arrays({"metrics": objects["metrics"].loss.count}),
    arrays({"metrics": once["metrics"].loss.count}),
  )


def test_a_gradient_per_example_keeps_the_effects_of_the_first():
  objects, optimizer, _ = job(build("dpsgd"))

  def loss_fn(model, rngs, x):
    outputs = model(x, rngs)
    model.sow(nnx.Intermediate, "seen", x)
    return error(outputs), rngs.dropout()

  model, rngs = objects["model"], objects["rngs"]
  key = rngs.dropout.key[...]
  minimize = nnx.jit(
    lambda optimizer, model, rngs, x: optimizer.minimize(
      model, loss_fn, rngs, x, has_aux=True
    )
  )
  _, keys = minimize(optimizer, model, rngs, batch(0))
  np.testing.assert_array_equal(model.seen.get_value()[0], batch(0)[:1])
  assert rngs.dropout.key[...] == key
  assert rngs.dropout.count[...] == 2
  assert len(set(map(str, keys))) == 8


def test_welford_is_refused_per_example():
  objects, optimizer, _ = job(build("dpsgd"))
  with pytest.raises(UsageError, match="return its values in aux"):
    optimizer.minimize(
      objects["model"],
      lambda model, welford, x: error(model(x, nnx.Rngs(0))),
      nnx.metrics.Welford(),
      batch(0),
    )


def boxes(tree):
  is_variable = lambda node: isinstance(node, nnx.Variable)
  return jax.tree.leaves(tree, is_leaf=is_variable)


# What leaves parameters out of its state.
MASKING = {
  "mechanize": lambda: mechanize(optax.sgd(1.0)),
  "mechanic": lambda: build("mechanic"),
  "muon": lambda: build("muon"),
  "freeze": lambda: build("adamw", freeze=("head",)),
}


@pytest.mark.parametrize("name", MASKING)
@pytest.mark.parametrize("cls", [nnx.Optimizer, flax_mechanic.Optimizer])
def test_every_variable_of_the_state_holds_an_array(cls, name):
  masked = lambda node: isinstance(node, optax.MaskedNode)

  def train():
    model = create()["model"]
    model.head = nnx.Linear(8, 1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = cls(model, MASKING[name](), wrt=nnx.Param)
    for _ in range(2):
      assert all(map(jax.tree.leaves, boxes(optimizer.opt_state)))
      leaves = jax.tree.leaves(optimizer.opt_state, is_leaf=masked)
      assert any(map(masked, leaves))
      grads = nnx.grad(lambda model: error(model(batch(0), nnx.Rngs(0))))(model)
      optimizer.update(model, grads)

  jax.eval_shape(train)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "mechanic"))
    for name in MASKING
  ],
)
def test_variables_may_be_shown_to_init_and_update(name):
  params = nnx.state(create()["model"], nnx.Param)
  tx = MASKING[name]()
  ran = []
  for x in (params, nnx.as_pure(params)):
    state = tx.init(x)
    for _ in range(2):
      updates, new = tx.update(x, state, x)
      assert jax.tree.structure(new) == jax.tree.structure(state)
      x, state = optax.apply_updates(x, updates), new
    ran.append({"params": nnx.as_pure(x), "state": nnx.as_pure(state)})
  jax.tree.map(np.testing.assert_array_equal, *ran)


class Counting(flax_mechanic.Optimizer):
  """A model and its optimizer, the way of nnx.ModelAndOptimizer."""

  def __init__(self, model, tx):
    super().__init__(model, tx, wrt=nnx.Param)
    self.model = model
    self.seen = nnx.metrics.Average()

  def update(self, grads, /, **kwargs):
    return super().update(self.model, grads, **kwargs)

  def train(self, x):
    def loss_fn(model, seen, x):
      loss = error(model(x, nnx.Rngs(0)))
      seen.update(values=loss)
      return loss

    return self.minimize(self.model, loss_fn, self.seen, x)


def by_merge(optimizer, tmp_path):
  del tmp_path
  graphdef, state = nnx.split(optimizer)
  return nnx.merge(graphdef, nnx.as_pure(state))


def by_clone(optimizer, tmp_path):
  del tmp_path
  return nnx.clone(optimizer)


def by_update(optimizer, tmp_path):
  del tmp_path
  other = Counting(create(1)["model"], mechanize(optax.adamw(1.0)))
  nnx.update(other, nnx.state(optimizer))
  return other


def by_orbax(optimizer, tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  make = lambda: Counting(create(1)["model"], mechanize(optax.adamw(1.0)))
  abstract = nnx.eval_shape(make)
  graphdef, target = nnx.split(abstract)
  with checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", nnx.state(optimizer))
    checkpointer.wait_until_finished()
    return nnx.merge(graphdef, checkpointer.restore(tmp_path / "state", target))


@pytest.mark.parametrize("copy", [by_merge, by_clone, by_update, by_orbax])
def test_a_copy_trains_on(copy, tmp_path):
  optimizer = Counting(create()["model"], mechanize(optax.adamw(1.0)))
  train = nnx.jit(lambda optimizer, x: optimizer.train(x))
  train(optimizer, batch(0))
  copied = copy(optimizer, tmp_path)
  losses = [train(each, batch(1)) for each in (optimizer, copied)]
  assert losses[0] == losses[1]
  assert_same(*(arrays({"all": each}) for each in (optimizer, copied)))
  assert copied.step[...] == copied.seen.count[...] == 2
