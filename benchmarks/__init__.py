"""Measurements: `python -m benchmarks QUESTION`."""
