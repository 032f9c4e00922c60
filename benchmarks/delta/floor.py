"""The floor: no implementation can take less than the bytes over the bandwidth or the FLOPs over the matrix rate.

Weights and activations are two bytes wide. A delta that is a kernel of its own reads x, reads and writes y, and reads
the diagonal blocks of W once; the single pass reads W once for base and delta together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.delta.cases import Case
from benchmarks.harness.timing import Budget, Call, measure

ELEMENT_BYTES = 2
SIX_TIMES = Budget(seconds_each=0.0, least=6, most=6)  # the best counts


@dataclass(frozen=True)
class Work:
    num_bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """Of a device: bytes per second to and from memory, bf16 FLOPs per second of a large GEMM."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, work: Work) -> float:
        """The least time that this work can take."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)


def works(case: Case) -> dict[str, Work]:
    """Of the base GEMM; where there are adapters, of the delta (each adapter on the way of fewer FLOPs, or all on one),
    and of the single pass."""
    layer, sizes, rank = case.layer, case.group_sizes(), case.branch_rank
    numbers = layer.numel + case.tokens * (layer.h_in + layer.h_out)
    base = Work(ELEMENT_BYTES * numbers, 2.0 * layer.numel * case.tokens)
    if not sizes:
        return {"base": base}
    blocks = layer.numel / case.blocks
    factors = len(sizes) * rank * (layer.h_in * len(layer.slices) + layer.h_out)
    delta_bytes = ELEMENT_BYTES * (blocks + sum(sizes) * (layer.h_in + 2 * layer.h_out) + factors)
    # r_k rows through the blocks for each token, or an adapter's blocks formed once and a row for each token.
    expand = [2.0 * blocks * rank * tokens for tokens in sizes]
    modulate = [2.0 * blocks * (tokens + rank) for tokens in sizes]
    delta = sum(map(min, expand, modulate))
    return {
        "base": base,
        "delta": Work(delta_bytes, delta),
        "expand": Work(delta_bytes, sum(expand)),
        "modulate": Work(delta_bytes, sum(modulate)),
        "single pass": Work(base.num_bytes + ELEMENT_BYTES * factors, base.flops + delta),
    }


def measure_ceilings(device: torch.device) -> Ceilings:
    """The best of several large copies, sums and bf16 GEMMs on random numbers, with the threads that torch uses now."""
    size, width = (256 << 20, 2048) if device.type == "cpu" else (4 << 30, 8192)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    x, weight = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    calls: dict[str, Call] = {"copy": lambda _: target.copy_(source), "sum": lambda _: source.sum()}
    times = measure(calls | {"gemm": lambda _: F.linear(x, weight)}, 1, device, SIX_TIMES)
    best = {name: found["lowest"] / 1e6 for name, found in times.items()}
    # A CPU's writes cost a read more: the sum may be the faster one.
    return Ceilings(max(2 * size / best["copy"], size / best["sum"]), 2.0 * width**3 / best["gemm"])
