"""The flag: every method by its name, and what goes around it."""
