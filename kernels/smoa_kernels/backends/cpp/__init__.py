"""Deltas on CPUs with AVX2 or better, in C++."""
