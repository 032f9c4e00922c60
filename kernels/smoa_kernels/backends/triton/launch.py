"""The Triton kernels launched over the device tables of a bank and of a plan, with the tile sizes chosen for them."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from smoa_kernels.backends.triton.expand import expand_kernel
from smoa_kernels.backends.triton.rows import add_rows_kernel, prepare_kernel
from smoa_kernels.backends.triton.single_pass import gather_kernel, single_pass_kernel
from smoa_kernels.backends.triton.tables import LayerTables, StepTables
from smoa_kernels.backends.triton.tile import tile_kernel
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.tables import ALIGNMENT, MAX_BLOCKS, PASS_TOKENS, TILE_TOKENS, aligned
from smoa_kernels.errors import ShapeError
from smoa_kernels.plan import StepPlan

# Rows that are prepared at a time: bounds the scratch memory of a long prefill.
CHUNK_ROWS = 2048
COPY_TILE = 1024


@dataclass(frozen=True)
class Launch:
    """Tile sizes and resources of one kernel: constexpr arguments, warps and pipeline stages."""

    tile: dict[str, int]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**self.tile, "num_warps": self.num_warps, "num_stages": self.num_stages}


@cache
def expand_launch(max_rank: int, wide: bool) -> Launch:
    """Tile sizes of `expand_kernel`: 64 rows of the product, and few rows of W so that a short batch fills the GPU.

    Args:
        max_rank: of the slots; wide: four-byte elements.
    """
    ranks = min(triton.next_power_of_2(max_rank), 16)
    # At most 16 tokens: each holds addresses of y in registers.
    tile = {"BT": min(64 // ranks, 16), "RC": ranks, "BI": 32, "BJ": 32 if wide else 64}
    return Launch(tile, num_warps=8 if wide else 4, num_stages=3)


@cache
def tile_launch(max_rank: int, wide: bool) -> Launch:
    """Tile sizes of `tile_kernel`.

    Args:
        max_rank: of the slots; wide: four-byte elements.
    """
    ranks = min(max(triton.next_power_of_2(max_rank), 16), 32)
    if wide:
        return Launch({"BT": TILE_TOKENS, "BR": ranks, "BI": 32, "BJ": 32}, num_warps=8, num_stages=2)
    return Launch({"BT": TILE_TOKENS, "BR": ranks, "BI": 64, "BJ": 64}, num_warps=4, num_stages=3)


@cache
def single_pass_launch(ranks: int, wide: bool) -> Launch:
    """Tile sizes of `single_pass_kernel`: all ranks of all tokens in one tile, so that no weight is read twice.

    Args:
        ranks: of the slots, a power of two; wide: four-byte elements.
    """
    tile = {"BT": PASS_TOKENS, "BI": 16 if wide else 32, "BJ": 32 if wide else 64}
    return Launch(tile, num_warps=8 if ranks > 8 else 4, num_stages=3)


def rows_per_token(max_rank: int) -> int:
    """Rows that expanding takes per token: the ranks of the slots, in whole chunks of the kernel."""
    chunk = min(int(triton.next_power_of_2(max_rank)), 16)
    return -(-max_rank // chunk) * chunk


def scratch_bytes(bank: LayerBank, max_tokens: int) -> int:
    """Scratch memory that a bank needs of its plan; all layers share it.

    Args:
        bank: the layer; max_tokens: longest batch.
    """
    rows = min(CHUNK_ROWS, max_tokens * rows_per_token(bank.max_rank))
    return rows * (len(bank.slices) * _padded(bank) + bank.h_out) * bank.dtype.itemsize


def warm_up(bank: LayerBank, plan: StepPlan) -> None:
    """Compiles and loads a bank's kernels, which must not happen while a CUDA graph is captured; y stays as it is."""
    x = torch.zeros(1, bank.h_in, dtype=bank.dtype, device=bank.device)
    smoa_delta_triton(x.new_zeros(1, bank.h_out), x, bank, plan, everything=True)


def smoa_delta_triton(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan, everything: bool = False) -> None:
    """Adds each token's delta to y. Args as in `ops.smoa_delta`; the plan's tables say which way each token goes.

    Args:
        everything: launch all kernels for as many tokens as x has rows, whatever the plan holds now: what a CUDA graph
            has to capture, and does.
    """
    layer, step = _tables(bank), plan.attached(StepTables)
    everything = everything or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if everything and x.shape[0] > CHUNK_ROWS:
        raise ShapeError(
            "the graph", [f"it is for {x.shape[0]} tokens; scratch memory is held for {CHUNK_ROWS} at most."]
        )
    tokens = x.shape[0] if everything else step.num_expand
    together = max(1, CHUNK_ROWS // rows_per_token(bank.max_rank))
    for base in range(0, tokens, together):
        _expand(y, x, bank, layer, plan, base, min(together, tokens - base))
    for tiles, base, count in step.whole(x.shape[0]) if everything else step.chunks(CHUNK_ROWS):
        _tiles(y, x, bank, layer, plan, tiles, base, count)


def _tables(bank: LayerBank) -> LayerTables:
    if not isinstance(bank.attached, LayerTables):
        raise ShapeError("the bank", ["it was not made for the Triton kernels; make it with implementation='triton'."])
    return bank.attached


def _expand(y: Tensor, x: Tensor, bank: LayerBank, layer: LayerTables, plan: StepPlan, base: int, tokens: int) -> None:
    """The tokens from `base` on: their rows are prepared, then multiplied with the blocks and added to y."""
    step, ranks = plan.attached(StepTables), rows_per_token(bank.max_rank)
    number = step.counts[:1]
    rows = _scratch(bank, plan, tokens * ranks)[0]
    _prepare(rows, x, bank, layer, plan, step.expand, number, base, ranks)
    launch = expand_launch(bank.max_rank, bank.dtype.itemsize == 4)
    grid = (_row_tiles(bank, launch.tile["BI"]), triton.cdiv(tokens, launch.tile["BT"]))
    expand_kernel[grid](
        y, rows, layer.slices, layer.slots, step.expand, plan.token_to_slot, number, base, tokens, y.stride(0),
        rows.stride(1), rows.stride(0), bank.max_rank, len(bank.slots), SLICES=len(bank.slices),
        MAX_BLOCKS=MAX_BLOCKS, FP8=bank.fp8, RANKS=ranks, **launch.options(),
    )  # fmt: skip


def _tiles(
    y: Tensor, x: Tensor, bank: LayerBank, layer: LayerTables, plan: StepPlan, tiles: range, base: int, count: int
) -> None:
    """Some tiles, whose tokens stand at `count` positions from `base` on: prepared rows, products in sorted rows, and
    those onto y."""
    step = plan.attached(StepTables)
    number = step.counts[2:3]
    rows, delta = _scratch(bank, plan, count)
    _prepare(rows, x, bank, layer, plan, step.tiled, number, base, 0)
    launch = tile_launch(bank.max_rank, bank.dtype.itemsize == 4)
    tile_kernel[(_row_tiles(bank, launch.tile["BI"]), len(tiles))](
        delta, rows, layer.slices, layer.slots, step.tiles, step.counts[1:2], base, tiles.start, delta.stride(0),
        rows.stride(1), rows.stride(0), bank.h_in, bank.max_rank, len(bank.slots), SLICES=len(bank.slices),
        MAX_BLOCKS=MAX_BLOCKS, FP8=bank.fp8, **launch.options(),
    )  # fmt: skip
    add_rows_kernel[(triton.cdiv(max(bank.slices), COPY_TILE), count, len(bank.slices))](
        y, delta, layer.slices, layer.slots, step.tiled, plan.token_to_slot, number, base, y.stride(0), delta.stride(0),
        len(bank.slots), BI=COPY_TILE,
    )  # fmt: skip


def _prepare(
    rows: Tensor, x: Tensor, bank: LayerBank, layer: LayerTables, plan: StepPlan, order: Tensor, number: Tensor,
    base: int, ranks: int,
) -> None:  # fmt: skip
    prepare_kernel[(triton.cdiv(rows.shape[2], COPY_TILE), rows.shape[1], rows.shape[0])](
        rows, x, layer.slices, layer.slots, order, plan.token_to_slot, number, base, rows.stride(1), rows.stride(0),
        x.stride(0), bank.h_in, bank.max_rank, len(bank.slots), RANKS=ranks, BJ=COPY_TILE,
    )  # fmt: skip


def _scratch(bank: LayerBank, plan: StepPlan, rows: int) -> tuple[Tensor, Tensor]:
    """(prepared rows [SLICES, rows, padded], delta [rows, H_out]) in the plan's scratch memory."""
    shape = (len(bank.slices), rows, _padded(bank))
    size = shape[0] * shape[1] * shape[2]
    total = size + rows * bank.h_out
    flat = plan.scratch(total * bank.dtype.itemsize)[: total * bank.dtype.itemsize].view(bank.dtype)
    return flat[:size].view(shape), flat[size:].view(rows, bank.h_out)


def _padded(bank: LayerBank) -> int:
    return aligned(bank.h_in) + ALIGNMENT * MAX_BLOCKS


def _row_tiles(bank: LayerBank, rows: int) -> int:
    """Tiles of rows that every partition fits into, over all slices; `common.locate_slice` counts the same way."""
    return sum(triton.cdiv(size, rows) + MAX_BLOCKS for size in bank.slices)


def smoa_linear_triton(x: Tensor, bank: LayerBank, plan: StepPlan, bias: Tensor | None = None) -> Tensor:
    """The layer's output, deltas included. Args as in `ops.smoa_linear`; tokens without an adapter get none."""
    layer, tokens, slices = _tables(bank), x.shape[0], len(bank.slices)
    ranks, padded = triton.next_power_of_2(bank.max_rank), _padded(bank) + ALIGNMENT
    y = x.new_empty(tokens, bank.h_out)
    size = slices * tokens * padded
    memory = plan.scratch((1 + ranks) * size * x.itemsize)[: (1 + ranks) * size * x.itemsize].view(x.dtype)
    rows = memory[:size].view(slices, tokens, padded)
    expanded = memory[size:].view(slices, tokens * ranks, padded)
    number, copies = layer.numbers[tokens : tokens + 1], triton.cdiv(padded, COPY_TILE)
    gather_kernel[(copies, tokens, slices)](
        rows, x, layer.sorted, rows.stride(1), rows.stride(0), x.stride(0), BJ=COPY_TILE
    )
    _prepare(expanded, x, bank, layer, plan, layer.numbers, number, 0, ranks)
    launch = single_pass_launch(ranks, x.itemsize == 4)
    tiles = sum(triton.cdiv(size, launch.tile["BI"]) + MAX_BLOCKS + 1 for size in bank.slices)
    single_pass_kernel[(tiles,)](
        y, y if bias is None else bias, rows, expanded, layer.sorted, layer.slices, layer.slots, layer.numbers,
        plan.token_to_slot, number, y.stride(0), rows.stride(1), rows.stride(0), expanded.stride(1), expanded.stride(0),
        bank.max_rank, len(bank.slots), SLICES=slices, MAX_BLOCKS=MAX_BLOCKS + 1, BIAS=bias is not None, RANKS=ranks,
        **launch.options(),
    )  # fmt: skip
    return y
