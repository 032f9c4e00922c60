"""Random layers, workloads and the dense formula: what tests and benchmarks compare with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smoa_kernels.backend import available_implementations
from smoa_kernels.backends.cpp.build import supported_instruction_sets
from smoa_kernels.bank import LayerBank
from smoa_kernels.residents import MergedBlock
from smoa_kernels.update import SliceUpdate

WORKLOADS = ("distinct", "uniform", "zipf", "identical", "skewed")
# Error allowed per dtype, as a share of each entry and of the root mean square of all entries.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def cpu_cases() -> list[tuple[str, torch.dtype, str | None]]:
    """(implementation, dtype, instruction set) of all that can serve on this CPU.

    The C++ kernel stands there once for each instruction set that serves the dtype, to be limited to it by
    SMOA_KERNELS_ISA; the others have None.
    """
    return [
        (name, dtype, instruction_set)
        for dtype in TOLERANCES
        for name in available_implementations("cpu", dtype)
        for instruction_set in (supported_instruction_sets(dtype) if name == "cpp" else (None,))
    ]


@dataclass(frozen=True)
class Layer:
    """A base layer and its bank.

    Attributes:
        weights: per slice [H_out_i, H_in].
        bank: its slots, all empty.
    """

    weights: tuple[Tensor, ...]
    bank: LayerBank


def random_layer(
    h_in: int,
    slices: Sequence[int],
    *,
    slots: int,
    max_rank: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    implementation: str | None = None,
) -> Layer:
    """A layer with Gaussian weights of scale 1 / sqrt(H_in) and empty slots, on the CPU."""
    weights = tuple(torch.randn(size, h_in, generator=generator).div(h_in**0.5).to(dtype) for size in slices)
    bank = LayerBank(
        a=[torch.zeros(slots, max_rank, h_in, dtype=dtype) for _ in slices],
        b=[torch.zeros(slots, max_rank, size, dtype=dtype) for size in slices],
        weight_block=lambda index, rows, cols: weights[index][rows][:, cols],
        implementation=implementation,
    )
    return Layer(weights, bank)


def random_blocks(size: int, num_blocks: int, generator: torch.Generator) -> Tensor:
    """Block ids of a random order cut as `tensor_split` does: [size] int16."""
    ids = torch.empty(size, dtype=torch.int16)
    for k, piece in enumerate(torch.randperm(size, generator=generator).tensor_split(num_blocks)):
        ids[piece] = k
    return ids


def random_update(
    row_block: Tensor, col_block: Tensor, ranks: Sequence[int], generator: torch.Generator, scaling: float = 1.0
) -> SliceUpdate:
    """An update with random factors.

    Args:
        row_block: [H_out] int16 block ids; col_block: [H_in].
        ranks: r_k of block id k.
        generator: source of the factors.
        scaling: of the update.
    """
    rank = max(ranks, default=0)
    live = torch.arange(rank)[:, None] < torch.tensor(ranks)  # [R, K]
    a = torch.randn(rank, len(col_block), generator=generator) * live[:, col_block.long()]
    b = torch.randn(rank, len(row_block), generator=generator) * live[:, row_block.long()]
    return SliceUpdate(a, b.t().contiguous(), row_block, col_block, scaling)


def merge_slot(bank: LayerBank, slot: int) -> list[MergedBlock]:
    """Lets a bank hold a slot as merged; the blocks that the caller's weight then has to hold."""
    blocks = list(bank.merged_blocks(slot))
    bank.hold_merged(slot, [[b.back for b in blocks if b.index == index] for index in range(len(bank.slices))])
    return blocks


def dense_delta(update: SliceUpdate, weight: Tensor) -> Tensor:
    """The update as a dense fp32 matrix [H_out, H_in], straight from its definition."""
    same = update.row_block[:, None] == update.col_block[None, :]
    return torch.where(same, update.scaling * (update.b.float() @ update.a.float()) * weight.float(), 0.0)


def workload(name: str, tokens: int, slots: int, seed: int = 0) -> NDArray[np.int64]:
    """Slot of each token.

    distinct: token t has slot t; uniform: any slot or none; zipf: few popular slots; identical: all slot 0;
    skewed: nearly all slot 0, one token each for the others, some without.
    """
    rng = np.random.default_rng(seed)
    match name:
        case "distinct":
            return np.arange(tokens) % slots
        case "uniform":
            return rng.integers(-1, slots, tokens)
        case "zipf":
            return (rng.zipf(1.5, tokens) - 1) % slots
        case "identical":
            return np.zeros(tokens, np.int64)
        case "skewed":
            chosen = np.where(rng.random(tokens) < 0.1, -1, 0)
            chosen[rng.permutation(tokens)[: slots - 1]] = np.arange(1, slots)[:tokens]
            return chosen
        case _:
            raise ValueError(f"workload {name!r} is unknown; allowed: {', '.join(WORKLOADS)}.")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Raises an AssertionError unless `actual` is `expected` within the tolerance of actual's dtype."""
    tolerance = TOLERANCES[actual.dtype]
    wanted = expected.double()
    scale = wanted.square().mean().sqrt().item() if wanted.numel() else 0.0
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=max(tolerance * scale, 1e-12))
