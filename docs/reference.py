"""Writes the API reference from the docstrings, with pdoc.

  python docs/reference.py [FOLDER]

FOLDER  where to write flax_mechanic.html; by default runs/api
"""

import importlib
import sys
import typing
from pathlib import Path

import pdoc
import pdoc.render

# Unions of many types that the reference calls by name. Optax's come before
# flax, whose annotations contain them.
_UNIONS = {
  "jax.typing": ("ArrayLike", "DTypeLike"),
  "optax": ("Params", "Updates", "OptState"),
  "flax.nnx.filterlib": ("Filter",),
}


def main(folder: str = "runs/api") -> None:
  """Writes the reference into a folder."""
  for path, names in _UNIONS.items():
    module = importlib.import_module(path)
    for name in names:
      named = typing.NewType(name, object)
      named.__module__ = path
      setattr(module, name, named)
  import flax_mechanic  # Only now, so that its annotations use these names.

  for name in flax_mechanic.__all__:
    # pdoc sees only the names that have been loaded.
    setattr(flax_mechanic, name, getattr(flax_mechanic, name))
  # The list of folders is for those who work on the package.
  flax_mechanic.__doc__ = (flax_mechanic.__doc__ or "").split("\n\n")[0]
  pdoc.render.configure(
    docformat="google",
    footer_text=f"flax_mechanic {flax_mechanic.__version__}",
    show_source=False,
  )
  pdoc.pdoc("flax_mechanic", output_directory=Path(folder))


if __name__ == "__main__":
  main(*sys.argv[1:])
