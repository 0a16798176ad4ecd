"""Comparisons of many methods on many jobs."""
