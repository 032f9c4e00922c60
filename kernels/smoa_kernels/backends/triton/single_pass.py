"""Kernels of the single pass: base product and deltas from one read of the weight."""

import triton
import triton.language as tl

from smoa_kernels.backends.triton.common import (
    ALIGNMENT,
    BLOCK_COLS,
    BLOCK_FIELDS,
    BLOCK_PADDED_COL,
    BLOCK_ROW,
    BLOCK_ROWS,
    SLICE_B,
    SLICE_FIELDS,
    SLICE_H_OUT,
    SLICE_OFFSET,
    SORTED_BLOCKS,
    SORTED_COLUMNS,
    SORTED_FIELDS,
    SORTED_ROW_ORDER,
    SORTED_STRIDE,
    SORTED_TABLE,
    SORTED_WEIGHTS,
    dot,
    locate_block,
    locate_slice,
    position_slot,
    rows_tile,
)


@triton.jit
def gather_kernel(rows, x, sorted_rows, row_stride, slice_stride, x_stride, BJ: tl.constexpr):
    """rows[slice, t] = x[t] with its columns where the sorted weight has them. Grid: (tiles of columns, T, SLICES)."""
    t, index = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    fields = sorted_rows + index * SORTED_FIELDS
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    inside = j < tl.load(fields + SORTED_STRIDE)
    native = tl.load(tl.load(fields + SORTED_COLUMNS).to(tl.pointer_type(tl.int32)) + j, mask=inside, other=-1)
    values = tl.load(x + t * x_stride + native, mask=native >= 0, other=0.0)
    tl.store(rows + index * slice_stride + t * row_stride + j, values, mask=inside)


@triton.jit
def single_pass_kernel(
    y, bias, rows, expanded, sorted_rows, slices, slots, order, token_to_slot, number, y_stride, row_stride,
    slice_stride, expanded_stride, expanded_slice_stride, max_rank, num_slots, SLICES: tl.constexpr,
    MAX_BLOCKS: tl.constexpr, BIAS: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
    """y[t] = W x_t + bias + `sum_rho b_rho * (W_k (a_rho * x_k))` for at most BT tokens, from one read of W.

    Args:
        y: [T, H_out], every element is written. bias: [H_out], read where BIAS.
        rows: as `gather_kernel` wrote it; expanded: as `prepare_kernel` wrote it for `order`, which lists all tokens.
        number: [1] int32, T. sorted_rows: [SLICES, SORTED_FIELDS] int64. Others as in `expand_kernel`.
            Grid: (tiles of rows,).
    """
    dtype: tl.constexpr = y.dtype.element_ty
    index, tile = locate_slice(slices, tl.program_id(0).to(tl.int64), SLICES, MAX_BLOCKS, BI)
    fields = sorted_rows + index * SORTED_FIELDS
    table = tl.load(fields + SORTED_TABLE).to(tl.pointer_type(tl.int64))
    k, first = locate_block(table, tl.load(fields + SORTED_BLOCKS), tile, BI)
    if k >= 0:
        total = tl.load(number)
        block = table + k * BLOCK_FIELDS
        row, num_rows = tl.load(block + BLOCK_ROW), tl.load(block + BLOCK_ROWS)
        begin = tl.load(block + BLOCK_PADDED_COL) // ALIGNMENT * ALIGNMENT
        end = begin + tl.cdiv(tl.load(block + BLOCK_COLS), ALIGNMENT) * ALIGNMENT
        stride = tl.load(fields + SORTED_STRIDE) // ALIGNMENT * ALIGNMENT
        i, t, u = first + tl.arange(0, BI), tl.arange(0, BT), tl.arange(0, BT * RANKS)
        weights = tl.multiple_of(tl.load(fields + SORTED_WEIGHTS).to(tl.pointer_type(dtype)), ALIGNMENT)
        weights += row * stride
        inputs = rows + index * slice_stride
        products = expanded + index * expanded_slice_stride
        _, slot, _, rank = position_slot(slots, order, token_to_slot, total, u // RANKS, index, num_slots)
        slot, rank = slot.to(tl.int32), rank.to(tl.int32)
        live, inside, present = u % RANKS < rank, i < num_rows, t < total
        native = tl.load(
            tl.load(fields + SORTED_ROW_ORDER).to(tl.pointer_type(tl.int32)) + row + i, mask=inside, other=0
        )
        base = tl.zeros([BT, BI], tl.float32)
        if BIAS:
            shift = bias + tl.load(slices + index * SLICE_FIELDS + SLICE_OFFSET)
            base += tl.load(shift + native, mask=inside, other=0.0).to(tl.float32)[None, :]
        update = tl.zeros([BT * RANKS, BI], tl.float32)
        for start in range(0, begin, BJ):
            j = start + tl.arange(0, BJ)
            w = tl.trans(rows_tile(weights, i, inside, j, begin, stride))
            base = dot(rows_tile(inputs, t, present, j, begin, row_stride), w, base, dtype)
        for start in range(begin, end, BJ):
            j = start + tl.arange(0, BJ)
            w = tl.trans(rows_tile(weights, i, inside, j, end, stride))
            base = dot(rows_tile(inputs, t, present, j, end, row_stride), w, base, dtype)
            update = dot(rows_tile(products, u, live, j, end, expanded_stride), w, update, dtype)
        for start in range(end, stride, BJ):
            j = start + tl.arange(0, BJ)
            w = tl.trans(rows_tile(weights, i, inside, j, stride, stride))
            base = dot(rows_tile(inputs, t, present, j, stride, row_stride), w, base, dtype)
        h_out = tl.load(slices + index * SLICE_FIELDS + SLICE_H_OUT)
        b = tl.load(slices + index * SLICE_FIELDS + SLICE_B).to(tl.pointer_type(dtype)) + row
        outer = tl.load(
            b + ((slot * max_rank + u % RANKS).to(tl.int64) * h_out)[:, None] + i[None, :],
            mask=live[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        base += tl.sum((update * outer.to(tl.float32)).reshape(BT, RANKS, BI), 1)
        out = y + tl.load(slices + index * SLICE_FIELDS + SLICE_OFFSET) + t[:, None].to(tl.int64) * y_stride
        tl.store(out + native[None, :], base.to(dtype), mask=present[:, None] & inside[None, :])
