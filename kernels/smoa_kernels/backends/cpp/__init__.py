"""Deltas on CPUs with AVX2 or better, in C++."""

from smoa_kernels.backends.cpp.backend import BACKEND

__all__ = ["BACKEND"]
