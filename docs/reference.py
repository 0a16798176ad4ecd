"""Writes the API reference, made of the docstrings, with pdoc.

  python docs/reference.py [FOLDER]

FOLDER  where flax_mechanic.html goes; by default runs/api
"""

import importlib
import sys
import typing
from pathlib import Path

import pdoc
import pdoc.render

# Unions of many types, which the reference calls by their names. In this order:
# flax has optax's in its annotations.
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
  import flax_mechanic  # After its annotations have their names.

  # Which room holds what is for those who work on it.
  flax_mechanic.__doc__ = (flax_mechanic.__doc__ or "").split("\n\n")[0]
  pdoc.render.configure(
    docformat="google",
    footer_text=f"flax_mechanic {flax_mechanic.__version__}",
    show_source=False,
  )
  pdoc.pdoc("flax_mechanic", output_directory=Path(folder))


if __name__ == "__main__":
  main(*sys.argv[1:])
