"""Many methods on many jobs, compared."""
