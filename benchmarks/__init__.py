"""Measurements: `python -m benchmarks <what>`."""
