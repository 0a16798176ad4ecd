"""The recipes for pods: what Kubernetes accepts, and what is started again."""

import os
import signal
import subprocess
import time

import jsonschema
import pages
import pytest
import yaml

PODS = pages.ROOT / "docs" / "pods"


def group(required=(), **properties):
  return {
    "type": "object",
    "properties": properties,
    "required": [*required],
    "additionalProperties": False,
  }


def some(items):
  return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = group(
  ("name", "image"),
  name=TEXT,
  image=TEXT,
  workingDir=TEXT,
  command=some(TEXT),
  args=some(TEXT),
  resources=group(limits={"type": "object", "additionalProperties": COUNT}),
)
POD = group(
  ("containers",),
  restartPolicy={"enum": ["Never"]},  # A podFailurePolicy asks for it.
  terminationGracePeriodSeconds=COUNT,
  nodeSelector=TEXTS,
  containers=some(CONTAINER),
)
EXIT_CODES = group(
  ("operator", "values"),
  containerName=TEXT,
  operator={"enum": ["In", "NotIn"]},
  values=some(COUNT),
)
POD_RULE = group(
  ("action",),
  action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
  onExitCodes=EXIT_CODES,
)
JOB = group(
  ("template",),
  parallelism=COUNT,
  completions=COUNT,
  backoffLimit=COUNT,
  podFailurePolicy=group(("rules",), rules=some(POD_RULE)),
  template=group(("spec",), spec=POD),
)
RULE = group(
  ("action", "name"),
  name={
    "type": "string",
    "pattern": "^[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_])?$",
  },
  action={
    "enum": [
      "FailJobSet",
      "RestartJobSet",
      "RestartJobSetAndIgnoreMaxRestarts",
    ]
  },
  onJobFailureReasons=some(
    {
      "enum": [
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
      ]
    }
  ),
)
# As far as the recipe uses it: v1alpha2, as of JobSet 0.9.
JOB_SET = group(
  ("apiVersion", "kind", "metadata", "spec"),
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=group(("name",), name=TEXT, annotations=TEXTS),
  spec=group(
    ("replicatedJobs",),
    failurePolicy=group(maxRestarts=COUNT, rules=some(RULE)),
    replicatedJobs=some(
      group(
        ("name", "template"),
        name=TEXT,
        replicas=COUNT,
        template=group(("spec",), spec=JOB),
      )
    ),
  ),
)


@pytest.fixture(scope="module")
def job_set():
  return yaml.safe_load((PODS / "jobset.yaml").read_text())


def container(job_set):
  job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
  return job["template"]["spec"]["containers"][0]


def test_the_job_set_is_one(job_set):
  jsonschema.validate(job_set, JOB_SET)
  job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container(job_set)["name"]
  # The pods of a slice, of 4 chips each.
  topology = job["template"]["spec"]["nodeSelector"]
  width, height = topology["cloud.google.com/gke-tpu-topology"].split("x")
  assert job["parallelism"] * 4 == int(width) * int(height)


@pytest.fixture
def stub(tmp_path, monkeypatch):
  """Returns a function that puts a program of a name first on the path."""

  def write(name, text):
    path = tmp_path / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)

  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  return write


def end(command, *, term=None, **environment):
  """Returns the exit status of a command that gets SIGTERM once a file is."""
  process = subprocess.Popen(command, env=os.environ | environment)
  if term is not None:
    while not term.exists():
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
  return process.wait(30)


# Saves for a moment when it is asked to stop.
STOPS = (
  "trap 'sleep 0.2; touch saved; exit 0' TERM; touch started; sleep 9 & wait"
)


@pytest.mark.parametrize("status", [0, 2, 75, 137])
def test_a_pod_ends_as_its_process(job_set, status):
  command = [*container(job_set)["command"], "bash", "-c", f"exit {status}"]
  assert end(command) == status


def test_a_pod_that_is_stopped_starts_again(job_set, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  command = [*container(job_set)["command"], "bash", "-c", STOPS]
  assert end(command, term=tmp_path / "started") == 75
  assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
  ("status", "restarts", "requeued"),
  [
    (0, 0, False),
    (2, 0, False),
    (75, 0, True),
    (137, 3, True),
    (75, 50, False),
  ],
)
def test_what_slurm_queues_again(stub, tmp_path, status, restarts, requeued):
  queued = tmp_path / "queued"
  stub("srun", f"exit {status}")
  stub("scontrol", f'[ "$*" = "requeue 7" ] && touch {queued}')
  found = end(
    ["bash", PODS / "train.sbatch"],
    SLURM_JOB_ID="7",
    SLURM_RESTART_COUNT=str(restarts),
  )
  assert queued.exists() == requeued
  assert found == (0 if requeued else status)


def test_slurm_queues_again_what_its_time_has_ended(
  stub, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  stub("srun", f"echo $$ > pid; {STOPS}")
  stub("scancel", '[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat pid)')
  stub("scontrol", "touch queued")
  command = ["bash", PODS / "train.sbatch"]
  assert end(command, term=tmp_path / "started", SLURM_JOB_ID="7") == 0
  assert (tmp_path / "saved").exists()
  assert (tmp_path / "queued").exists()


@pytest.mark.parametrize(("last", "status"), [(0, 0), (2, 2)])
def test_a_command_that_lost_a_process_runs_again(stub, tmp_path, last, status):
  runs = tmp_path / "runs"
  stub(
    "job", f"echo >> {runs}; [ $(wc -l < {runs}) = 3 ] && exit {last}; exit 75"
  )
  slept = tmp_path / "slept"
  stub("sleep", f"echo $1 >> {slept}")
  found = end([PODS / "restart.sh", "job"])
  assert (found, len(runs.read_text())) == (status, 3)
  assert slept.read_text() == "10\n10\n"
