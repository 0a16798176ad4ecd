"""Checkpoints of whole runs, and of other jobs, on Orbax."""
