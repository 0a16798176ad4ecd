"""Writes a run's files."""

from pathlib import Path

from flax_mechanic.errors import UsageError


def write(path: Path, data: bytes) -> None:
  """Creates or replaces a file, atomically.

  A link in its place is replaced and not followed: a run's folder may be
  somebody else's, and its links may point anywhere.

  Raises:
    UsageError: it cannot be written.
  """
  new = path.with_name(path.name + ".new")
  try:
    new.unlink(missing_ok=True)
    with new.open("xb") as file:
      file.write(data)
    new.replace(path)
  except OSError as error:
    raise UsageError(
      f"{path} cannot be written ({error.strerror}); make room, or move what "
      "is in its place, and give the same command again"
    ) from error
