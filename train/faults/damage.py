"""What is done to the checkpoints of a run that has been killed."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_mechanic.checkpoints import record

# checkpoints, generator -> a phrase that says what was done.
Damage = Callable[[Path, np.random.Generator], str]

_JUNK: Sequence[Any] = (
  *(None, True, -1, 0, 2**31, 2**64, 0.5, 1e308, float("nan")),
  *("", "x", "\x1b[2J", "../..", [], {}, [[]], [-1], [2**40], {"a": 1}),
)


def flip(checkpoints: Path, rng: np.random.Generator) -> str:
  """Flips bits of a file."""
  path = _file(_step(checkpoints, rng), rng)
  data = bytearray(path.read_bytes())
  bits = rng.integers(8 * len(data), size=rng.choice([1, 1, 2, 8]))
  for bit in bits:
    data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)
  return f"bits {bits} of {path.relative_to(checkpoints)} flipped"


def cut(checkpoints: Path, rng: np.random.Generator) -> str:
  """Cuts off, empties, lengthens or deletes a file, or deletes a folder."""
  step = _step(checkpoints, rng)
  path = _file(step, rng)
  size = path.stat().st_size
  match rng.integers(5):
    case 0:
      size = int(rng.integers(size))
      os.truncate(path, size)
      what = f"cut to {size} bytes"
    case 1:
      os.truncate(path, 0)
      what = "emptied"
    case 2:
      with path.open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 5000))))
      what = "lengthened"
    case 3:
      path.unlink()
      what = "deleted"
    case _:
      folders = [each for each in step.rglob("*") if each.is_dir()]
      path = _pick(sorted(folders), rng)
      shutil.rmtree(path)
      what = "deleted"
  return f"{path.relative_to(checkpoints)} {what}"


def swap(checkpoints: Path, rng: np.random.Generator) -> str:
  """Swaps two steps, or a file or folder of theirs."""
  a, b = rng.permutation(np.array(_steps(checkpoints), object))[:2]
  if rng.integers(3):
    common = [
      path.relative_to(a)
      for path in sorted(a.rglob("*"))
      if (b / path.relative_to(a)).exists()
    ]
    path = _pick(common, rng)
    a, b = a / path, b / path
  aside = checkpoints / "aside"
  a.rename(aside)
  b.rename(a)
  aside.rename(b)
  return (
    " and ".join(str(each.relative_to(checkpoints)) for each in (a, b))
    + " swapped"
  )


def renumber(checkpoints: Path, rng: np.random.Generator) -> str:
  """Gives a step, or a copy of one, another number."""
  step = _pick(_steps(checkpoints), rng)
  names = ["0", "1", "31", "36", "37", "45", "1000", "2147483647", "2147483648"]
  names += ["007", f"0{step.name}", f"{step.name}0", f"+{step.name}", "-5"]
  new = checkpoints / _pick(names, rng)
  if rng.integers(2):
    shutil.copytree(step, new)
    return f"{step.name} copied to {new.name}"
  step.rename(new)
  return f"{step.name} renamed to {new.name}"


def tamper(checkpoints: Path, rng: np.random.Generator) -> str:
  """Changes a record, and seals it as if nothing were the matter."""
  step = _step(checkpoints, rng)
  path = step / "record" / "metadata"
  text = json.loads(path.read_text())["record"]
  fields, what = _changed(json.loads(text), rng)
  path.write_text(json.dumps(record.seal(fields)))
  return f"record of {step.name}: {what}"


def tamper_json(checkpoints: Path, rng: np.random.Generator) -> str:
  """Changes any of a step's files that is JSON, or puts JSON in its place."""
  step = _step(checkpoints, rng)
  path = _file(step, rng, _is_json)
  name = path.relative_to(checkpoints)
  texts = ["", "[]", "{}", "null", "1", '"x"', "[" * 10**5, "{" * 10, "\0"]
  if not rng.integers(3):
    text = _pick(texts, rng)
    path.write_text(text)
    return f"{name} is {text[:10]!r}"
  content, what = _changed(json.loads(path.read_text()), rng)
  path.write_text(json.dumps(content))
  return f"{name}: {what}"


def damage_all(checkpoints: Path, rng: np.random.Generator) -> str:
  """Damages every step."""
  whats = []
  for step in _steps(checkpoints):
    match rng.integers(4):
      case 0:
        path = step / "record"
        shutil.rmtree(path)
      case 1:
        path = step / "state"
        shutil.rmtree(path)
      case 2:
        path = step / "record" / "metadata"
        os.truncate(path, path.stat().st_size // 2)
      case _:
        path = step / "state" / "manifest.ocdbt"
        path.write_bytes(rng.bytes(100))
    whats.append(str(path.relative_to(checkpoints)))
  return f"{', '.join(whats)} damaged"


def add(checkpoints: Path, rng: np.random.Generator) -> str:
  """Adds what no run has written."""
  names = ["36", "1000", "20261124123000", "36.orbax-checkpoint-tmp", "notes"]
  path = checkpoints / _pick(names, rng)
  match rng.integers(4):
    case 0:
      path.mkdir()
    case 1:
      path.mkdir()
      (path / "state").mkdir()
      (path / "notes").write_text("mine")
    case 2:
      path.write_text("mine")
    case _:
      path.symlink_to(_pick(_steps(checkpoints), rng).name)
  kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
  return f"{kind} {path.name} added"


def spoil_files(checkpoints: Path, rng: np.random.Generator) -> str:
  """Damages the files beside the checkpoints."""
  files = sorted(
    each for each in checkpoints.parent.iterdir() if each.is_file()
  )
  path = _pick(files, rng)
  size = path.stat().st_size
  match rng.integers(4):
    case 0:
      path.write_bytes(path.read_bytes()[: int(rng.integers(size))])
      what = "cut"
    case 1:
      path.unlink()
      what = "deleted"
    case 2:
      path.write_bytes(rng.bytes(size))
      what = "replaced by noise"
    case _:
      path.unlink()
      path.mkdir()
      what = "replaced by a folder"
  return f"{path.name.split('.')[0]} {what}"


def _changed(content: Any, rng: np.random.Generator) -> tuple[Any, str]:
  """Returns JSON with one part changed or left out, and what was done."""
  content = json.loads(json.dumps(content))
  parent, names = {"": content}, [""]
  root = parent
  while isinstance(parent[names[-1]], dict | list) and parent[names[-1]]:
    if len(names) > 1 and not rng.integers(4):
      break
    parent = parent[names[-1]]
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    names.append(_pick(keys, rng))
  where = ".".join(map(str, names[1:]))
  if not rng.integers(5) and len(names) > 1:
    del parent[names[-1]]
    return root[""], f"{where} left out"
  old = parent[names[-1]]
  values = [each for each in _JUNK if each != old]
  if isinstance(old, int | float):
    values += [old + 1, -old, 2 * old + 1] * 5
  elif isinstance(old, str) and old:
    values += [old[:-1], old[::-1] + "0", old.upper() + "_"] * 5
  parent[names[-1]] = _pick(values, rng)
  return root[""], f"{where} is {parent[names[-1]]!r} and was {old!r}"[:200]


def _steps(checkpoints: Path) -> list[Path]:
  return sorted(each for each in checkpoints.iterdir() if each.name.isdecimal())


def _step(checkpoints: Path, rng: np.random.Generator) -> Path:
  """Returns the newest step most of the time."""
  steps = _steps(checkpoints)
  return steps[-1] if rng.integers(4) else _pick(steps, rng)


def _file(
  folder: Path,
  rng: np.random.Generator,
  fits: Callable[[Path], bool] = lambda path: path.stat().st_size > 0,
) -> Path:
  files = [each for each in folder.rglob("*") if each.is_file() and fits(each)]
  return _pick(sorted(files), rng)


def _is_json(path: Path) -> bool:
  try:
    json.loads(path.read_bytes())
  except ValueError:
    return False
  return True


def _pick(choices: Sequence[Any], rng: np.random.Generator) -> Any:
  return choices[int(rng.integers(len(choices)))]
