"""Base product and deltas from one read of the weight: for decode, where reading the weight is all the time there is.

It needs the whole weight in the sorted order of one partition, which all slots of the step have to share; K and the
ranks are free only as far as they leave the partition the same.
"""

import torch
import triton
from torch import Tensor

from smoa_kernels.backends.triton.aligned import ALIGNMENT, AlignedBlocks, aligned
from smoa_kernels.backends.triton.rows import prepare_kernel
from smoa_kernels.backends.triton.single_pass import gather_kernel, single_pass_kernel
from smoa_kernels.backends.triton.tables import MAX_BLOCKS
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.partition import Block, Partition
from smoa_kernels.errors import ShapeError
from smoa_kernels.plan import StepPlan

# Tokens of one step: beyond, the product is no longer bound by reading the weight.
MAX_TOKENS = 16
COPY_TILE = 1024


class SortedLayer:
    """The whole weight of a (packed) layer in the sorted order of one partition per slice.

    Columns stand at the partition's padded positions, those without a block behind them; rows in sorted order, those
    without a block last. As much memory as the weight itself: a server would keep it instead of the native weight.

    Args:
        weights: per slice [H_out_i, H_in], in the dtype of the bank and on its device.
        bank: of the same layer.
        slot: whose partitions are taken.

    Raises:
        ShapeError: the slot leaves a slice alone, or the weights do not fit the bank.
    """

    def __init__(self, weights: list[Tensor], bank: LayerBank, slot: int) -> None:
        held = [entry for entry in bank.slots[slot] if entry is not None]
        shapes = [tuple(weight.shape) for weight in weights]
        if len(held) != len(bank.slices) or shapes != [(size, bank.h_in) for size in bank.slices]:
            reason = f"slot {slot} fills {len(held)} of {len(bank.slices)} slices and the weights are {shapes}"
            raise ShapeError("the sorted layer", [f"{reason}; give the layer's weights and a slot that fills all."])
        self.partitions = [entry.partition for entry in held]
        self.padded_cols = aligned(bank.h_in) + ALIGNMENT * (max(len(p.blocks) for p in self.partitions) + 1)
        self._parts = [_sorted(weight, p) for weight, p in zip(weights, self.partitions, strict=True)]
        rows = [tuple(part.data_ptr() if isinstance(part, Tensor) else part for part in parts) for parts in self._parts]
        self.table = torch.tensor(rows, dtype=torch.int64, device=bank.device)
        self.tokens = torch.arange(MAX_TOKENS, dtype=torch.int32, device=bank.device)
        self.counts = torch.arange(MAX_TOKENS + 1, dtype=torch.int32, device=bank.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the sorted weights."""
        return sum(parts[0].nbytes for parts in self._parts)


def _sorted(weight: Tensor, partition: Partition) -> tuple[Tensor, int, Tensor, Tensor, Tensor, int]:
    """The fields of one slice: sorted weight, its row stride, native column at each padded position, row order, block
    table with a last block for the rows without one, number of blocks."""
    layout = AlignedBlocks([weight.new_empty(block.rows, block.cols) for block in partition.blocks], weight.dtype)
    live, device = partition.live_cols, weight.device
    stride = layout.padded_cols + aligned(weight.shape[1] - live)
    columns = torch.full((stride,), -1, dtype=torch.int32, device=device)
    columns[: layout.padded_cols] = layout.padded_columns(partition.col_order)[:, 0]
    columns[layout.padded_cols : layout.padded_cols + weight.shape[1] - live] = partition.col_order[live:].int()
    matrix = weight[partition.row_order].index_select(1, columns.clamp(min=0)) * (columns >= 0)
    end = Block(partition.live_rows, weight.shape[0], live, live)
    last = torch.tensor([[end.row_start, end.rows, live, 0, 0, 0]], dtype=torch.int64, device=device)
    table = torch.cat([layout.table, last])
    return matrix.contiguous(), stride, columns, partition.row_order.int(), table, len(table)


def smoa_linear(x: Tensor, layer: SortedLayer, bank: LayerBank, plan: StepPlan) -> Tensor:
    """The layer's output with the deltas of its tokens' adapters, from one read of the weight.

    Args:
        x: [T, H_in] model dtype, T = plan.num_tokens, at most MAX_TOKENS.
        layer: the sorted weight; bank: of the same layer; plan: the step.

    Returns:
        [T, H_out] model dtype.

    Raises:
        ShapeError: the step is too long, or a slot of it has another partition than the sorted weight, is resident
            only, or its ranks do not fit a tile.
    """
    _check(x, layer, bank, plan)
    assert bank.tables is not None
    tokens, slices = x.shape[0], len(bank.slices)
    ranks = triton.next_power_of_2(bank.max_rank)
    y = x.new_empty(tokens, bank.h_out)
    memory = plan.scratch((1 + ranks) * tokens * slices * layer.padded_cols * x.itemsize).view(x.dtype)
    size = slices * tokens * layer.padded_cols
    rows = memory[:size].view(slices, tokens, layer.padded_cols)
    expanded = memory[size : size * (1 + ranks)].view(slices, tokens * ranks, layer.padded_cols)
    number, copies = layer.counts[tokens : tokens + 1], triton.cdiv(layer.padded_cols, COPY_TILE)
    gather_kernel[(copies, tokens, slices)](
        rows, x, layer.table, rows.stride(1), rows.stride(0), x.stride(0), BJ=COPY_TILE
    )
    prepare_kernel[(copies, tokens * ranks, slices)](
        expanded, x, bank.tables.slices, bank.tables.slots, layer.tokens, plan.token_to_slot, number, 0,
        expanded.stride(1), expanded.stride(0), x.stride(0), bank.h_in, bank.max_rank, len(bank.slots), RANKS=ranks,
        BJ=COPY_TILE,
    )  # fmt: skip
    options = single_pass_launch(ranks, x.itemsize == 4)
    tiles = sum(triton.cdiv(size, options["BI"]) + MAX_BLOCKS + 1 for size in bank.slices)
    single_pass_kernel[(tiles,)](
        y, rows, expanded, layer.table, bank.tables.slices, bank.tables.slots, layer.tokens, plan.token_to_slot, number,
        y.stride(0), rows.stride(1), rows.stride(0), expanded.stride(1), expanded.stride(0), bank.max_rank,
        len(bank.slots), SLICES=slices, MAX_BLOCKS=MAX_BLOCKS + 1, RANKS=ranks, **options,
    )  # fmt: skip
    return y


def single_pass_launch(ranks: int, wide: bool) -> dict[str, int]:
    """Tile sizes, warps and stages: all ranks of all tokens in one tile, so that no weight is read twice.

    Args:
        ranks: of the slots, a power of two; wide: four-byte elements.
    """
    columns = 32 if wide else 64
    return {
        "BT": MAX_TOKENS,
        "BI": 16 if wide else 32,
        "BJ": columns,
        "num_warps": 8 if ranks > 8 else 4,
        "num_stages": 3,
    }


def _check(x: Tensor, layer: SortedLayer, bank: LayerBank, plan: StepPlan) -> None:
    reasons = []
    if bank.tables is None or bank.fp8 or bank.max_rank > MAX_TOKENS:
        reasons.append("the bank must be one of the Triton kernels, not fp8, with slots of rank 16 at most.")
    if not x.shape[0] == plan.num_tokens <= MAX_TOKENS or x.shape[1:] != (bank.h_in,):
        reasons.append(
            f"x is {tuple(x.shape)}; allowed is [{plan.num_tokens}, {bank.h_in}], at most {MAX_TOKENS} tokens."
        )
    if plan.merged:
        reasons.append("an adapter is merged; un-merge it first.")
    for group in plan.groups:
        for index, entry in enumerate(bank.slots[group.slot]):
            if entry is not None and not entry.idle and entry.partition is not layer.partitions[index]:
                reasons.append(f"slot {group.slot} has another partition than the sorted weight in slice {index}.")
    if reasons:
        raise ShapeError("the single pass", reasons)
