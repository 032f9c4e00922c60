"""Deltas on CUDA GPUs, in Triton."""

from smoa_kernels.backends.triton.backend import BACKEND

__all__ = ["BACKEND"]
