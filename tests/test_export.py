"""`train.init_from` and `train.export`: the job's way in and out."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from test_faults import tamper
from test_train import make_config, metrics

from flax_mechanic import Checkpointer
from flax_mechanic.paths import by_path
from train import export, loop
from train.job import make_job


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """The --workdir of a run of adamw."""
  folder = tmp_path_factory.mktemp("source")
  loop.train(make_config(optimizer="adamw", learning_rate=1e-2), folder)
  return folder


def evaluate(job, state):
  losses = [job.eval_step(state, batch) for batch in job.eval_batches()]
  return float(np.mean([loss["eval/loss"] for loss in losses]))


@pytest.mark.parametrize(
  "axis_type", ["auto", pytest.param("explicit", marks=pytest.mark.slow)]
)
def test_a_run_starts_from_another_on_another_mesh(source, axis_type):
  config = make_config(
    mesh__data=2,
    mesh__fsdp=4,
    mesh__axis_type=axis_type,
    shard_optimizer_state=True,
    offload_optimizer_state=True,
  )
  job = make_job(config)
  with jax.set_mesh(job.mesh):
    state, notes = job.init_from(str(source), params_only=False)
    loss = evaluate(job, state)
    assert notes[1].startswith(
      "taken from its optimizer: count, mu, nu; restarts: "
    )
    jax.tree.map(
      lambda leaf, target: (
        (leaf.sharding == target.sharding and leaf.dtype == target.dtype)
        or pytest.fail(f"{leaf.sharding} is not {target.sharding}")
      ),
      state,
      job.target,
    )
    mu = state["optimizer"]["opt_state"]["base_optimizer_state"]["inner_state"]
    assert np.any(np.asarray(jax.tree.leaves(mu)[1]))
    for step in range(2):
      state, _ = job.train_step(state, job.train_batch(step))
    assert job.train_step._cache_size() == 1
  assert loss == pytest.approx(metrics(source)[-1]["eval/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_started_from_another_resumes(source, tmp_path, capsys):
  other = shutil.copytree(source, tmp_path / "other")
  fields = {"init_from": str(other), "num_steps": 10}
  loop.train(make_config(**fields), tmp_path / "run")
  output = capsys.readouterr().out
  assert f"starting from {other}/checkpoints/30\n" in output
  shutil.rmtree(other)
  loop.train(make_config(**fields | {"num_steps": 20}), tmp_path / "run")
  assert "at step 10" in capsys.readouterr().out
  assert metrics(tmp_path / "run")[-1]["step"] == 20


@pytest.mark.slow
def test_a_run_with_checkpoints_starts_from_no_other(source, tmp_path, capsys):
  def resume(run, num_steps, **fields):
    fields |= {"num_steps": num_steps, "schedule__warmup_steps": 0}
    loop.train(make_config(**fields), tmp_path / run)
    told = capsys.readouterr().out.splitlines()
    with Checkpointer(tmp_path / run / "checkpoints", read_only=True) as saved:
      config = saved.read(num_steps)["config"]
    beside = json.loads((tmp_path / run / "config.json").read_text())
    assert beside["init_from"] == config["init_from"]
    return config["init_from"], [each for each in told if "init_" in each]

  new = {"init_from": str(source), "init_params_only": True}
  assert resume("adopted", 2, **new) == (str(source), [])
  # Leaving it out changes nothing.
  assert resume("adopted", 3) == (str(source), [])
  assert resume("new", 2) == ("", [])
  origin, (note,) = resume("new", 3, **new)
  assert origin == ""
  assert note == (
    "config.init_from has no effect: the run resumes at step 2; to start from "
    "another run, take another --workdir"
  )


def test_only_parameters(source, tmp_path, capsys):
  fields = {"init_from": str(source), "init_params_only": True}
  loop.train(make_config(**fields, num_steps=10), tmp_path)
  assert "its optimizer" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("optimizer", "needed"),
  [
    ("mechanic", set()),
    # What these evaluate is not what they train.
    pytest.param("schedule_free", {"b1", "z"}, marks=pytest.mark.slow),
    pytest.param("dog", {"average"}, marks=pytest.mark.slow),
  ],
)
def test_a_plain_job_loads_what_is_exported(
  tmp_path, capsys, monkeypatch, optimizer, needed
):
  config = make_config(
    optimizer=optimizer,
    mesh__fsdp=8,
    mesh__data=1,
    num_steps=10,
    freeze=("hidden/0/k",),
    no_decay=("bias",),
  )
  loss = loop.train(config, tmp_path / "run")["eval/loss"]

  def no_expressions(fields):
    options = {"freeze": ["("], "no_decay": ["("], "opt.mechanic.groups": "("}
    fields["config"].update(options)

  # A run of somebody else's can hold one that takes forever.
  tamper(tmp_path / "run" / "checkpoints" / "10", no_expressions)
  read = set()
  restore = ocp.PyTreeCheckpointHandler.restore

  def spy(self, directory, args):
    leaves = by_path(args.item).items()
    read.update(path for path, leaf in leaves if leaf is not ocp.PLACEHOLDER)
    return restore(self, directory, args=args)

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", spy)
  out = tmp_path / "out"
  assert export.main([str(tmp_path / "run"), str(out)]) == 0
  monkeypatch.undo()
  fields = [path.split("/") for path in read if not path.startswith("model/")]
  assert {name for names in fields for name in needed.intersection(names)} == (
    needed
  )
  assert all(needed.intersection(names) for names in fields)

  task = make_job(config).task
  model = task.create_model(nnx.Rngs(1))
  state = nnx.state(model, nnx.Not(nnx.RngState))
  nnx.update(model, ocp.StandardCheckpointer().restore(out, state))
  model.eval()
  losses = [task.loss(model, batch)[0] for batch in task.eval_batches()]
  assert float(np.mean(losses)) == pytest.approx(loss, rel=1e-5)
  capsys.readouterr()
  assert export.main([str(tmp_path / "run"), str(out)]) == 2
  assert "exists already; name a new folder" in capsys.readouterr().err


def test_a_field_may_have_another_value_here(source, tmp_path, capsys):
  run = shutil.copytree(source, tmp_path / "run")
  tamper(
    run / "checkpoints" / "30",
    lambda saved: saved["config"].update({"task": "elsewhere"}),
  )
  out = tmp_path / "out"
  for field, words in (
    ("tsk=digits", "did you mean --config.task?"),
    ("task=digitz", "config.task='digitz'"),
  ):
    assert export.main([str(run), f"--config.{field}", str(out)]) == 2
    assert words in capsys.readouterr().err
  assert export.main([str(run), "--config.task", "digits", str(out)]) == 0
  assert capsys.readouterr().out == f"step 30 of {run} is in {out}\n"


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  for arguments, words in (
    ([], "type python -m train.export DIR OUT"),
    (["--out=out"], "there is no flag --out"),
    ([str(tmp_path), str(tmp_path / "out")], "holds no checkpoints; type"),
    ([str(tmp_path), str(tmp_path / "out[1]")], "for a part of a pattern"),
    ([str(tmp_path / "run"), f"{__file__}/out"], "out cannot be written: "),
  ):
    assert export.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_damage_is_said_and_the_step_before_is_exported(
  source, tmp_path, capsys
):
  run = shutil.copytree(source, tmp_path / "run")
  steps = run / "checkpoints"
  (steps / "30" / "record" / "metadata").write_text("{}")
  shutil.copytree(steps / "20", steps / "damaged_40")
  shutil.copytree(steps / "20", steps / "damaged_20")  # It was saved again.
  assert export.main([str(run), str(tmp_path / "out")]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "step 30 in" in lines[0]
  assert lines[1].startswith("step 40 is damaged and was set aside as")
  assert lines[2].startswith("step 20 of")


@pytest.mark.parametrize(
  "fields",
  [{"task": 5}, {"mesh.data": "x", "model": 3}],
)
def test_a_config_of_no_job(source, tmp_path, capsys, fields):
  run = shutil.copytree(source, tmp_path / "run")
  tamper(
    run / "checkpoints" / "30", lambda saved: saved["config"].update(fields)
  )
  assert export.main([str(run), str(tmp_path / "out")]) == 2
  assert capsys.readouterr().err.count("\n") == 1
