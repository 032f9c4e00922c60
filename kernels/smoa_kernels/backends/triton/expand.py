"""Expand: each rank of each token is a row, multiplied with the blocks that all adapters share."""

import triton
import triton.language as tl

from smoa_kernels.backends.triton.common import (
    ALIGNMENT,
    BLOCK_COLS,
    BLOCK_FIELDS,
    BLOCK_PADDED_COL,
    BLOCK_ROW,
    BLOCK_ROWS,
    NO_PARTITION,
    SLICE_B,
    SLICE_FIELDS,
    SLICE_H_OUT,
    SLICE_OFFSET,
    SLOT_BLOCKS,
    SLOT_FIELDS,
    SLOT_ROW_ORDER,
    SLOT_TABLE,
    block_weights,
    locate_block,
    locate_slice,
    position_slot,
    row_scales,
    rows_times_block,
)


@triton.jit
def _expand_partition(
    y, rows, fields, slots, at, tile, order, token_to_slot, total, begin, base, current, index, y_stride, row_stride,
    max_rank, num_slots, FP8: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, RC: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Adds to y the deltas of those tokens of a tile that share the partition `current`, for one tile of its rows."""
    dtype: tl.constexpr = y.dtype.element_ty
    table = tl.load(at + SLOT_TABLE).to(tl.pointer_type(tl.int64))
    k, first = locate_block(table, tl.load(at + SLOT_BLOCKS), tile, BI)
    if k >= 0:
        block = table + k * BLOCK_FIELDS
        row, num_rows = tl.load(block + BLOCK_ROW), tl.load(block + BLOCK_ROWS)
        weights = block_weights(at, block, FP8, dtype)
        rows = tl.multiple_of(rows + tl.load(block + BLOCK_PADDED_COL), ALIGNMENT)
        h_out = tl.load(fields + SLICE_H_OUT)
        b = tl.load(fields + SLICE_B).to(tl.pointer_type(dtype)) + row
        i = first + tl.arange(0, BI)
        # Each row of the product is one rank of one token.
        u = tl.arange(0, BT * RC)
        _, slot, partition, rank = position_slot(slots, order, token_to_slot, total, begin + u // RC, index, num_slots)
        rank = tl.where(partition == current, rank, 0).to(tl.int32)
        slot = slot.to(tl.int32)
        delta = tl.zeros([BT, BI], tl.float32)
        for c in range(0, tl.max(rank), RC):
            rho = c + u % RC
            live = rho < rank
            place = ((begin - base).to(tl.int32) + u // RC) * RANKS + rho
            acc = rows_times_block(
                rows, weights, place, live, i, num_rows, tl.load(block + BLOCK_COLS), row_stride, FP8, BT * RC, BI, BJ
            )
            outer = tl.load(
                b + ((slot * max_rank + rho).to(tl.int64) * h_out)[:, None] + i[None, :],
                mask=live[:, None] & (i < num_rows)[None, :], other=0.0,
            )  # fmt: skip
            delta += tl.sum((acc * outer.to(tl.float32)).reshape(BT, RC, BI), 1)
        if FP8:
            delta *= row_scales(at, row, i, num_rows)
        token, _, partition, rank = position_slot(
            slots, order, token_to_slot, total, begin + tl.arange(0, BT), index, num_slots
        )
        native = tl.load(
            tl.load(at + SLOT_ROW_ORDER).to(tl.pointer_type(tl.int32)) + row + i, mask=i < num_rows, other=0
        )
        out = y + token[:, None] * y_stride + native[None, :]
        mask = ((partition == current) & (rank > 0))[:, None] & (i < num_rows)[None, :]
        tl.store(out, (tl.load(out, mask=mask, other=0.0).to(tl.float32) + delta).to(dtype), mask=mask)


@triton.jit
def expand_kernel(
    y, rows, slices, slots, order, token_to_slot, number, base, tokens, y_stride, row_stride, slice_stride,
    max_rank, num_slots, SLICES: tl.constexpr, MAX_BLOCKS: tl.constexpr, FP8: tl.constexpr, RANKS: tl.constexpr,
    BT: tl.constexpr, RC: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """y[t] += `sum_rho b_rho * (W_k (a_rho * x_k))` for each token in `order`, all slices of a packed layer at once.

    One program: BT tokens against BI rows of one block, whatever their adapters; tokens of different partitions take
    turns. Each element of y belongs to one program, so no sum depends on the order of execution.

    Args:
        y: [T, H_out] with `y_stride`; rows: as `prepare_kernel` wrote them for at most `tokens` positions of `order`
            from `base` on, which are those that are taken here.
        slices: [SLICES, SLICE_FIELDS] int64; slots: [SLICES, num_slots, SLOT_FIELDS] int64.
        order: int32 tokens that expand; token_to_slot: [T] int32; number: [1] int32, how many expand.
        MAX_BLOCKS: most blocks of a partition.
        FP8: the weights are float8_e4m3 with a scale per row.
        RANKS: rows prepared per token; BT, RC, BI, BJ: tokens, ranks, rows and columns of a tile.
            Grid: (tiles of rows, token tiles).
    """
    total = tl.minimum(tl.load(number), base + tokens)
    begin = base + tl.program_id(1) * BT
    if begin < total:
        index, tile = locate_slice(slices, tl.program_id(0).to(tl.int64), SLICES, MAX_BLOCKS, BI)
        fields = slices + index * SLICE_FIELDS
        _, slot, partition, rank = position_slot(
            slots, order, token_to_slot, total, begin + tl.arange(0, BT), index, num_slots
        )
        left = tl.where(rank > 0, partition, NO_PARTITION)
        current = tl.min(left)
        while current < NO_PARTITION:
            leader = tl.max(tl.where(left == current, slot, -1))
            _expand_partition(
                y + tl.load(fields + SLICE_OFFSET), rows + index * slice_stride, fields, slots,
                slots + (index * num_slots + leader) * SLOT_FIELDS, tile, order, token_to_slot, total, begin, base,
                current, index, y_stride, row_stride, max_rank, num_slots, FP8, RANKS, BT, RC, BI, BJ,
            )  # fmt: skip
            left = tl.where(left == current, NO_PARTITION, left)
            current = tl.min(left)
