"""The command line: every mistake is one sentence, before anything compiles.

ml_collections parses the values of a config's fields. This module reads the
arguments, loads the config file and checks each name first, so that an error is
one sentence that says what to type instead.
"""

import difflib
import importlib.util
import inspect
import secrets
import shlex
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.flags
from flax import traverse_util
from ml_collections import ConfigDict, config_dict, config_flags

from flax_mechanic.checkpoints import storage
from flax_mechanic.errors import UsageError
from flax_mechanic.methods import stack

_EXAMPLES = {
  "config": "--config=configs/digits.py",
  "workdir": "--workdir=/tmp/digits",
  "coordinator": "--coordinator=10.0.0.1:1234",
  "num_processes": "--num_processes=2",
  "process_id": "--process_id=0",
  "topology": "--topology=v5e:16x16",
}


class Processes(NamedTuple):
  """This process's place among those of the job.

  Attributes:
    coordinator: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: this one's number, from 0.
  """

  coordinator: str
  num_processes: int
  process_id: int


class Arguments(NamedTuple):
  """The command line of `train.main`, parsed."""

  config: ConfigDict
  workdir: Any
  processes: Processes | None


def parse(argv: Sequence[str]) -> Arguments:
  """Reads the command line of `train.main`.

  Args:
    argv: the arguments after the program's name: `--workdir=DIR`, what `read`
      takes, and `--coordinator`, `--num_processes` and `--process_id`, all of
      them or none.

  Raises:
    UsageError: an argument that is missing, unknown or of the wrong type, a
      config file that cannot be used, or a directory that cannot be written.
  """
  config, given = read(argv, ["workdir"], Processes._fields)
  processes = _processes(given)
  check_workdir(given["workdir"])
  return Arguments(config, storage.path(given["workdir"]), processes)


def read(
  argv: Sequence[str], required: Sequence[str], optional: Sequence[str] = ()
) -> tuple[ConfigDict, dict[str, str]]:
  """Returns the config with its overrides, and the program's own flags.

  Args:
    argv: the arguments after the program's name, in any order: `--config=FILE`,
      `--config.FIELD=VALUE` and the program's own. The value may also be the
      next argument, and a bool is switched off by `--noconfig.FIELD` too.
    required: names of the program's own flags that must be given.
    optional: names of those that may be left out.

  Raises:
    UsageError: an argument that is missing, unknown, of the wrong type or
      without effect, or a config file that cannot be used.
  """
  given, overrides = split(argv, ["config", *required, *optional])
  config = load_config(_value(given, "config"))
  override(config, overrides)
  # One command line may hold the learning rates of several optimizers.
  rate = ".learning_rate"
  check_used(config, [f for f, _ in overrides if not f.endswith(rate)])
  return config, {
    name: _value(given, name)
    for name in (*required, *optional)
    if name in required or name in given
  }


def load_config(spec: str) -> ConfigDict:
  """Returns the config that a config file's `get_config` returns, locked.

  Args:
    spec: `FILE` or `FILE:VARIANT`; the variant is get_config's argument.

  Raises:
    UsageError: no such file, no `get_config`, or no such variant. The config
      file's own exceptions pass through.
  """
  name, _, variant = spec.partition(":")
  path = Path(name).expanduser()
  if not path.is_file():
    raise UsageError(
      f"--config={spec}: there is no file {name}{_nearest_config(path)}"
    )
  module_spec = importlib.util.spec_from_file_location("train_config", path)
  if module_spec is None or module_spec.loader is None:
    raise UsageError(f"--config={spec}: {name} is not a Python file")
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)

  if not callable(getattr(module, "get_config", None)):
    raise UsageError(f"--config={spec}: {name} has no function get_config")
  arguments = [variant] if variant else []
  try:
    inspect.signature(module.get_config).bind(*arguments)
  except TypeError:
    wrong = "has no variants" if variant else "needs a variant"
    fix = name if variant else f"{name}:VARIANT"
    raise UsageError(
      f"--config={spec}: {name} {wrong}; type --config={fix}"
    ) from None
  config = module.get_config(*arguments)
  if not isinstance(config, ConfigDict):
    raise UsageError(
      f"--config={spec}: get_config returned a {type(config).__name__}; it "
      "must return a ConfigDict"
    )
  if isinstance(config, config_dict.FrozenConfigDict):
    config = config.as_configdict()
  return config.lock()


def joined(argv: Sequence[str]) -> list[str]:
  """Returns the arguments, those after a flag without a value joined to it.

  Args:
    argv: such as `["--workdir", "DIR", "--config.seed=1"]`.
  """
  arguments: list[str] = []
  for argument in argv:
    before = arguments[-1] if arguments else ""
    is_value = before.startswith("--") and before != "--" and "=" not in before
    if is_value and not argument.startswith("--"):
      arguments[-1] += f"={argument}"
    else:
      arguments.append(argument)
  return arguments


def split(
  argv: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, str | None], list[tuple[str, str | None]]]:
  """Splits arguments into the program's flags and overrides of the config.

  Args:
    argv: the arguments, in any order.
    names: of the program's flags.

  Returns:
    The program's flags, name -> value, and pairs for `override`.

  Raises:
    UsageError: an argument that is neither.
  """
  given: dict[str, str | None] = {}
  overrides = []
  for argument in joined(argv):
    if not argument.startswith("--") or argument == "--":
      name = argument.lstrip("-").split("=")[0]
      known = name in names or name.startswith("config.")
      hint = f"did you mean --{argument.lstrip('-')}?"
      raise UsageError(
        f"{argument!r} is not a flag; "
        + (hint if known else "flags look like --config.num_steps=100")
      )
    name, equals, text = argument.removeprefix("--").partition("=")
    value = text if equals else None
    if name.startswith(("config.", "noconfig.")):
      overrides.append((name, value))
    elif name in names:
      given[name] = value
    else:
      head, dot, field = name.partition(".")
      near = difflib.get_close_matches(head, [*names, "help"], n=1)
      hint = near[0] + dot + field if near else f"config.{name}"
      raise UsageError(f"there is no flag --{name}; did you mean --{hint}?")
  return given, overrides


def override(
  config: ConfigDict, overrides: Sequence[tuple[str, str | None]]
) -> None:
  """Sets fields of `config` in place.

  Args:
    config: a locked config.
    overrides: pairs of a flag and its value, such as `("config.num_steps",
      "80")`; None for a flag without a value. A tuple collects the values of a
      repeated flag, and an empty one is (); for any other field the last value
      counts. The value "auto" of `config.learning_rate` is the config's, which
      is taken to be adamw's, times the optimizer's own `relative_rate`.

  Raises:
    UsageError: an unknown field, a group of fields, or a value of another type.
  """
  auto = ("config.learning_rate", "auto")
  rate = None
  if config.get("learning_rate") is not None and "optimizer" in config:
    rates = [each for each in overrides if each[0] == auto[0]]
    rate = config.learning_rate if rates[-1:] == [auto] else None
    overrides = [each for each in overrides if each != auto]
  given: dict[str, list[str]] = {}
  for flag, value in overrides:
    path = flag.removeprefix("no").removeprefix("config.")
    holder, key = _find(config, path)
    kind = holder.get_type(key)
    if issubclass(kind, ConfigDict):
      raise UsageError(
        f"--{flag} is a group of fields; set one of "
        + ", ".join(f"--{flag}.{name}" for name in holder[key])
      )
    if value is None and kind is not bool and not flag.startswith("no"):
      raise UsageError(
        f"--{flag} has no value; type {_example(path, holder[key], kind)}"
      )
    if holder[key] is None and value == "None":
      given.pop(path, None)
      continue
    if value == "" and issubclass(kind, tuple):
      given.pop(path, None)
      holder[key] = ()
      continue
    if kind is type(None):
      # ml_collections 1.1 has no parser for a field that is plainly None.
      with config.unlocked():
        holder[key] = config_dict.placeholder(object)
    argument = f"--{flag}" if value is None else f"--{flag}={value}"
    given.setdefault(path, []).append(argument)

  for path, arguments in given.items():
    holder, key = _find(config, path)
    holder[key] = _parsed(holder, key, path, arguments)
  if rate is not None:
    rate *= stack.relative_rate(stack.resolve(config.optimizer, config.opt))
    config.learning_rate = float(f"{rate:.6g}")


def _parsed(
  holder: ConfigDict, key: str, path: str, arguments: Sequence[str]
) -> Any:
  """Returns the new value of a field.

  Args:
    holder: the group that holds it.
    key: its name in the group.
    path: its name in the config.
    arguments: those that set it, such as ["--config.num_steps=80"].

  Raises:
    UsageError: they are of another type.
  """
  parser = absl.flags.FlagValues()
  kind = holder.get_type(key)
  # By itself, since the parser prints all that it is given, twice.
  alone = ConfigDict()
  alone[key] = config_dict.placeholder(kind)
  if holder[key] is not None:
    alone[key] = holder[key]
  words = [
    "",
    *(a.replace(f"config.{path}", f"config.{key}", 1) for a in arguments),
  ]
  try:
    config_flags.DEFINE_config_dict(
      "config", alone, flag_values=parser, sys_argv=words
    )
  except absl.flags.Error:
    raise UsageError(
      f"--config.{path} is a {kind.__name__}, which no flag can set; make it "
      "a number, a string or a tuple in the config file"
    ) from None
  try:
    parser(words)
  except (absl.flags.Error, ValueError):
    raise UsageError(
      f"{arguments[-1]}: config.{path} is of type {kind.__name__}; type "
      + _example(path, holder[key], kind)
    ) from None
  return alone[key]


def check_used(config: ConfigDict, flags: Sequence[str]) -> None:
  """Checks that the optimizer in use has the options that were given.

  Args:
    config: with its overrides.
    flags: those that were given, such as "config.opt.mechanic.base".

  Raises:
    UsageError: an option is another optimizer's, or the optimizer is unknown.
  """
  given = [
    (flag, flag.removeprefix("no").split(".")[2])
    for flag in flags
    if flag.removeprefix("no").startswith("config.opt.")
  ]
  if not given or "optimizer" not in config:
    return
  used = [row.name for row in stack.resolve(config.optimizer, config.opt)]
  for flag, name in given:
    if name not in used:
      raise UsageError(
        f"--{flag} has no effect on {' over '.join(used)}; leave it out, or "
        f"type --config.{_where_used(config, used, name)}={name}"
      )


def fields(config: ConfigDict) -> Iterator[str]:
  """Yields, for every field of a config, the flag that sets its value."""
  for path, value in _flat(config).items():
    yield shlex.quote(f"--config.{path}={value}")


def check_workdir(workdir: str) -> None:
  """Creates the working directory and writes to it.

  Raises:
    UsageError: it cannot be created or written to.
  """
  path = storage.path(workdir)
  if storage.is_bucket(path):
    probe = path / f".probe_{secrets.token_hex(8)}"
    try:
      probe.write_bytes(b"")
      probe.unlink(missing_ok=True)  # A request may be repeated.
    except Exception as error:  # Whatever a bucket's client raises.
      raise storage.failure(
        f"--workdir={workdir}", "cannot be written", error
      ) from error
    return
  check_writable(path, f"--workdir={workdir}")


def check_writable(folder: Path, given: str) -> None:
  """Creates a folder on a disk and writes to it.

  Args:
    folder: the folder.
    given: what the user typed.

  Raises:
    UsageError: it cannot be created or written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except FileExistsError as error:
    name = error.filename
    what = "no folder" if Path(name).exists() else "a link to nothing"
    raise UsageError(f"{given} cannot be written: {name} is {what}") from None
  except OSError as error:
    raise UsageError(f"{given} cannot be written: {error.strerror}") from None


def _where_used(config: ConfigDict, used: Sequence[str], name: str) -> str:
  """Returns the field that puts an optimizer to use: a base's, if it fits."""
  if len(used) == 1:
    return "optimizer"
  wrapper = used[-2]
  other_base = {**config.opt[wrapper], "base": name}
  try:
    with warnings.catch_warnings(action="ignore"):
      stack.resolve(config.optimizer, {**config.opt, wrapper: other_base})
  except UsageError:
    return "optimizer"
  return f"opt.{wrapper}.base"


def _processes(given: dict[str, str]) -> Processes | None:
  missing = [name for name in Processes._fields if name not in given]
  if len(missing) == len(Processes._fields):
    return None
  if missing:
    raise UsageError(
      f"--{missing[0]} is missing; type {_EXAMPLES[missing[0]]}, or none of "
      + ", ".join(f"--{name}" for name in Processes._fields)
    )
  host, colon, port = given["coordinator"].rpartition(":")
  if not (host and colon and port.isdecimal()):
    raise UsageError(
      f"--coordinator={given['coordinator']} is not HOST:PORT; type "
      f"{_EXAMPLES['coordinator']}"
    )
  for name in ("num_processes", "process_id"):
    if not given[name].isdecimal():
      raise UsageError(
        f"--{name}={given[name]} is not a number; type {_EXAMPLES[name]}"
      )
  count, number = int(given["num_processes"]), int(given["process_id"])
  if number >= count:
    raise UsageError(
      f"--process_id={number} must be below --num_processes={count}; the first "
      "process is 0"
    )
  return Processes(given["coordinator"], count, number)


def _value(given: dict[str, str | None], name: str) -> str:
  value = given.get(name)
  if not value:
    state = "has no value" if name in given else "is missing"
    raise UsageError(f"--{name} {state}; type {_EXAMPLES[name]}")
  return value


def _nearest_config(path: Path) -> str:
  """Returns a hint at the config file that may have been meant."""
  folders = (Path("configs"), path.parent)
  files = {
    file.stem: str(file)
    for folder in folders
    for file in sorted(folder.glob("*.py"))
    if file.stem != "__init__"
  }
  near = difflib.get_close_matches(path.stem, files, n=1)
  if near:
    return f"; did you mean --config={files[near[0]]}?"
  return f"; there are {', '.join(files.values())}" if files else ""


def _find(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
  """Returns the group that holds a field, and the field's name in it."""
  *groups, key = path.split(".")
  holder = config
  for name in groups:
    holder = holder.get(name)
    if not isinstance(holder, ConfigDict):
      raise UsageError(_unknown(config, path))
  if key not in holder:
    raise UsageError(_unknown(config, path))
  return holder, key


def _unknown(config: ConfigDict, path: str) -> str:
  """Returns what to say of a field that the config does not have."""
  # Part by part: matched whole, a long correct beginning would outweigh a wrong
  # end.
  node, right, prefix = config, [], "config"
  for part in path.split("."):
    if not isinstance(node, ConfigDict):
      return f"there is no --config.{path}; {prefix} is one field, not a group"
    near = difflib.get_close_matches(part, list(node), n=1)
    if not near:
      break
    node, right = node[near[0]], [*right, near[0]]
    prefix = ".".join(["config", *right])
  else:
    return f"there is no --config.{path}; did you mean --{prefix}?"
  last = path.split(".")[-1]
  same = [each for each in _flat(config) if each.split(".")[-1] == last]
  if len(same) == 1:
    return f"there is no --config.{path}; did you mean --config.{same[0]}?"
  return f"there is no --config.{path}; {prefix} has {', '.join(node)}"


def _flat(config: ConfigDict) -> dict[str, Any]:
  """Returns the dotted path of every field, such as schedule.name -> value."""
  return traverse_util.flatten_dict(config.to_dict(), sep=".")


def _example(path: str, value: object, kind: type) -> str:
  """Returns a valid flag for the field, quoted for a shell."""
  if kind is bool:
    return f"--config.{path}=true or --config.{path}=false"
  if value is None or value == "":
    value = {int: 10, float: 0.1}.get(kind, "VALUE")
  return shlex.quote(f"--config.{path}={value}")
