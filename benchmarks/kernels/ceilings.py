"""What this device can do at most: measured, never looked up."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.kernels.floor import Ceilings

REPETITIONS = 6


def measure_ceilings(device: torch.device) -> Ceilings:
    """The best of several large copies, sums and bf16 GEMMs on random numbers.

    Args:
        device: CPU (with the threads that torch uses now) or GPU.
    """
    size = 256 << 20 if device.type == "cpu" else 4 << 30
    bandwidth = _bandwidth(size, device)
    width = 2048 if device.type == "cpu" else 8192
    x, weight = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Ceilings(bandwidth, 2.0 * width**3 / _best_s(lambda: F.linear(x, weight), device))


def _bandwidth(size: int, device: torch.device) -> float:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _best_s(lambda: target.copy_(source), device)
    summed = size / _best_s(source.sum, device)  # a CPU's writes cost a read more
    return max(copied, summed)


def _best_s(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPETITIONS):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
