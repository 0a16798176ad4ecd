"""Writes a run's files."""

from pathlib import Path


def write(path: Path, data: bytes) -> None:
  """Creates or replaces a file, atomically.

  A link in its place is replaced and not followed: a run's folder may be
  somebody else's, and its links may point anywhere.
  """
  new = path.with_name(path.name + ".new")
  new.unlink(missing_ok=True)
  with new.open("xb") as file:
    file.write(data)
  new.replace(path)
