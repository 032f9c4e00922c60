"""Deltas on CUDA GPUs, in Triton."""
