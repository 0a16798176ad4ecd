"""Mechanic: the algorithm, as an optax transformation."""

from flax_mechanic.mechanic.transform import MechanicState as MechanicState
from flax_mechanic.mechanic.transform import mechanize as mechanize
