"""The floor: no implementation can take less than the bytes over the bandwidth or the FLOPs over the matrix rate.

Weights and activations are two bytes wide. A delta that is a kernel of its own reads x, reads and writes y, and reads
the diagonal blocks of W once; the single pass reads W once for base and delta together.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.kernels.cases import Case

ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Work:
    """What has to be moved and computed."""

    num_bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.num_bytes


@dataclass(frozen=True)
class Ceilings:
    """Of a device: bytes per second to and from memory, bf16 FLOPs per second of a large GEMM."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, work: Work) -> float:
        """The least time that this work can take."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)


def expand_flops(case: Case, tokens: int) -> float:
    """One adapter's tokens, each as r_k rows through the blocks."""
    return 2.0 * case.layer.numel * case.branch_rank / case.blocks * tokens


def modulate_flops(case: Case, tokens: int) -> float:
    """The modulated blocks of one adapter formed once, then a row per token."""
    return 2.0 * case.layer.numel / case.blocks * (tokens + case.branch_rank)


def resident_flops(case: Case, tokens: int) -> float:
    """A row per token through blocks that are there already."""
    return 2.0 * case.layer.numel / case.blocks * tokens


def base_work(case: Case) -> Work:
    """The base GEMM: W, x and y once."""
    layer, tokens = case.layer, case.tokens
    numbers = layer.numel + tokens * (layer.h_in + layer.h_out)
    return Work(ELEMENT_BYTES * numbers, 2.0 * layer.numel * tokens)


def expand_work(case: Case) -> Work:
    """The delta when every adapter expands."""
    return _delta_work(case, expand_flops)


def modulate_work(case: Case) -> Work:
    """The delta when every adapter modulates, all of them in one pass over the blocks."""
    return _delta_work(case, modulate_flops)


def delta_work(case: Case) -> Work:
    """The delta with each adapter on the way of fewer FLOPs."""
    return _delta_work(case, lambda case, tokens: min(expand_flops(case, tokens), modulate_flops(case, tokens)))


def resident_work(case: Case) -> Work:
    """The delta when every adapter has blocks of its own: those instead of the shared ones, and no factors."""
    layer, sizes = case.layer, case.group_sizes()
    blocks = layer.numel / case.blocks * len(sizes)
    flops = sum(resident_flops(case, tokens) for tokens in sizes)
    return Work(ELEMENT_BYTES * (blocks + sum(sizes) * (layer.h_in + 2 * layer.h_out)), flops)


def single_pass_work(case: Case) -> Work:
    """Base and delta from one read of W."""
    base = base_work(case)
    return Work(base.num_bytes + ELEMENT_BYTES * _factor_numbers(case), base.flops + delta_work(case).flops)


def _delta_work(case: Case, flops: Callable[[Case, int], float]) -> Work:
    layer, sizes = case.layer, case.group_sizes()
    if not sizes:
        return Work(0.0, 0.0)
    numbers = layer.numel / case.blocks + sum(sizes) * (layer.h_in + 2 * layer.h_out) + _factor_numbers(case)
    return Work(ELEMENT_BYTES * numbers, sum(flops(case, tokens) for tokens in sizes))


def _factor_numbers(case: Case) -> float:
    return float(
        len(case.group_sizes()) * case.branch_rank * (case.layer.h_in * len(case.layer.slices) + case.layer.h_out)
    )
