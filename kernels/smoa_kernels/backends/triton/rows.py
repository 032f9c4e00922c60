"""Rows on their way in and out: sorted and padded for the products, and back into the layer's own order."""

import triton
import triton.language as tl

from smoa_kernels.backends.triton.common import (
    SLICE_A,
    SLICE_FIELDS,
    SLICE_H_OUT,
    SLICE_OFFSET,
    SLOT_COLUMNS,
    SLOT_FIELDS,
    SLOT_LIVE_ROWS,
    SLOT_PADDED_COLS,
    SLOT_ROW_INVERSE,
    position_slot,
)


@triton.jit
def prepare_kernel(
    rows, x, slices, slots, order, token_to_slot, number, base, row_stride, slice_stride, x_stride, h_in, max_rank,
    num_slots, RANKS: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """rows[slice, u] = x of a token, its columns at the padded positions of its partition, zeros between.

    With RANKS > 0 the token of row u is `order[base + u // RANKS]` and the row is multiplied with the token's a_rho,
    rho = u % RANKS (zeros above its rank); with RANKS = 0 the token is `order[base + u]`.

    Args:
        rows: [SLICES, U, padded] with `slice_stride` and `row_stride`; x: [T, H_in]; one dtype.
        order: int32 tokens; number: [1] int32, their number. Grid: (tiles of columns, U, SLICES).
    """
    u, index = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = base + (u // RANKS if RANKS > 0 else u)
    token, slot, partition, rank = position_slot(
        slots, order, token_to_slot, tl.load(number), position, index, num_slots
    )
    rho = u % RANKS if RANKS > 0 else u - u
    if (partition >= 0) & ((rho < rank) | (RANKS == 0)):
        at = slots + (index * num_slots + slot) * SLOT_FIELDS
        j = tl.program_id(0) * BJ + tl.arange(0, BJ)
        inside = j < tl.load(at + SLOT_PADDED_COLS)
        columns = tl.load(at + SLOT_COLUMNS).to(tl.pointer_type(tl.int32))
        native = tl.load(columns + 2 * j, mask=inside, other=-1)
        values = tl.load(x + token * x_stride + native, mask=native >= 0, other=0.0)
        if RANKS > 0:
            dtype: tl.constexpr = x.dtype.element_ty
            place = tl.load(columns + 2 * j + 1, mask=inside, other=-1)
            a = tl.load(slices + index * SLICE_FIELDS + SLICE_A).to(tl.pointer_type(dtype))
            a += (slot * max_rank + rho) * h_in
            values *= tl.load(a + place, mask=place >= 0, other=0.0)
        tl.store(rows + index * slice_stride + u * row_stride + j, values, mask=inside)


@triton.jit
def add_rows_kernel(
    y, delta, slices, slots, order, token_to_slot, number, base, y_stride, delta_stride, num_slots, BI: tl.constexpr
):  # fmt: skip
    """y of token `order[base + p]` += delta[p], from sorted to native rows; rows without a block are not written.

    Args:
        y: [T, H_out]; delta: as `tile_kernel` wrote it; order, number: as in `prepare_kernel`.
            Grid: (tiles of rows, P, SLICES).
    """
    p, index = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token, slot, partition, _ = position_slot(slots, order, token_to_slot, tl.load(number), base + p, index, num_slots)
    if partition >= 0:
        at = slots + (index * num_slots + slot) * SLOT_FIELDS
        fields = slices + index * SLICE_FIELDS
        offset = tl.load(fields + SLICE_OFFSET)
        i = tl.program_id(0) * BI + tl.arange(0, BI)
        inverse = tl.load(at + SLOT_ROW_INVERSE).to(tl.pointer_type(tl.int32))
        place = tl.load(inverse + i, mask=i < tl.load(fields + SLICE_H_OUT), other=2**30)
        live = place < tl.load(at + SLOT_LIVE_ROWS)
        update = tl.load(delta + p * delta_stride + offset + place, mask=live, other=0.0)
        out = y + token * y_stride + offset + i
        total = tl.load(out, mask=live, other=0.0).to(tl.float32) + update.to(tl.float32)
        tl.store(out, total.to(y.dtype.element_ty), mask=live)
