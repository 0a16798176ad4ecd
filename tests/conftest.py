"""Eight devices on a CPU, and one compilation cache for the whole suite."""

import os
import pathlib

import pytest

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"

# Before jax is imported; subprocesses inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the suite's time is compiling; this saves a third of all.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture
def tpu_compiler():
  """Skips where TPUs cannot be compiled for.

  The compiler is a large wheel, for Linux alone, so the README's command for
  the tests, which is for every machine, leaves it out. CI installs it.
  """
  pytest.importorskip("libtpu", reason='pip install -e ".[tpu]"')


@pytest.fixture(scope="module")
def optimized():
  """Has a module's programs, and commands, compiled as users have them."""
  import jax  # After the environment is set.

  option = "jax_disable_most_optimizations"
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv(option.upper(), raising=False)
    before = jax.config.read(option)
    jax.config.update(option, False)
    yield
    jax.config.update(option, before)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
  """gs://test, emulated."""
  pytest.importorskip("gcp_storage_emulator")
  from train.faults import bucket

  folder = tmp_path_factory.mktemp("bucket")
  with pytest.MonkeyPatch.context() as patch, bucket.emulator(folder) as found:
    for name, value in found.environment.items():
      patch.setenv(name, value)
    yield found


from flax_mechanic.methods import registry  # noqa: E402  # The environment is set.

_TABLE = dict(registry.methods())


@pytest.fixture(autouse=True)
def table(monkeypatch):
  """Starts each test with the table as it is: examples and tests register."""
  monkeypatch.setattr(registry, "_TABLE", dict(_TABLE))


@pytest.fixture
def x64():
  import jax  # After the environment is set.

  with jax.enable_x64(True):
    yield
