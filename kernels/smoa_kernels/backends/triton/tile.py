"""Modulate and resident: tokens of one adapter times its own blocks, formed on the way or kept."""

import triton
import triton.language as tl

from smoa_kernels.backends.triton.common import (
    ALIGNMENT,
    BLOCK_COL,
    BLOCK_COLS,
    BLOCK_ELEMENT,
    BLOCK_FIELDS,
    BLOCK_PADDED_COL,
    BLOCK_ROW,
    BLOCK_ROWS,
    SLICE_A,
    SLICE_B,
    SLICE_FIELDS,
    SLICE_H_OUT,
    SLICE_OFFSET,
    SLOT_BLOCKS,
    SLOT_FIELDS,
    SLOT_PARTITION,
    SLOT_RANK,
    SLOT_RESIDENT,
    SLOT_TABLE,
    TILE_FIELDS,
    TILE_SLOT,
    TILE_START,
    TILE_TOKENS,
    block_weights,
    dot,
    locate_block,
    locate_slice,
    row_scales,
    rows_times_block,
    weight_tile,
)


@triton.jit
def _modulated(tile, a, b, rank, i, j, rows, cols, h_in, h_out, BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """`W_k * (B_k A_k)` of a transposed weight tile, [BJ, BI], rounded once to W's dtype."""
    dtype: tl.constexpr = a.dtype.element_ty
    product = tl.zeros([BJ, BI], tl.float32)
    for c in range(0, rank, BR):
        rho = c + tl.arange(0, BR)
        a_tile = tl.load(
            a + rho[None, :] * h_in + j[:, None], mask=(rho < rank)[None, :] & (j < cols)[:, None], other=0.0
        )
        b_tile = tl.load(
            b + rho[:, None] * h_out + i[None, :], mask=(rho < rank)[:, None] & (i < rows)[None, :], other=0.0
        )
        product = dot(a_tile, b_tile, product, dtype)
    return (tile.to(tl.float32) * product).to(dtype)


@triton.jit
def _tile_rows(
    rows, weights, a, b, rank, num_rows, cols, i, t, tokens, row_stride, h_in, h_out, FP8: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """[BT, BI] fp32: prepared rows times a tile of W_k, which is modulated when rank is above 0."""
    dtype: tl.constexpr = rows.dtype.element_ty
    stride = tl.cdiv(cols, ALIGNMENT) * ALIGNMENT
    acc = tl.zeros([BT, BI], tl.float32)
    for start in range(0, stride, BJ):
        j = start + tl.arange(0, BJ)
        tile = weight_tile(weights, stride, i, j, num_rows, FP8, dtype)
        if rank > 0:
            tile = _modulated(tile, a, b, rank, i, j, num_rows, cols, h_in, h_out, BR, BI, BJ)
        mask = (t < tokens)[:, None] & (j < stride)[None, :]
        acc = dot(
            tl.load(rows + t[:, None].to(tl.int64) * row_stride + j[None, :], mask=mask, other=0.0), tile, acc, dtype
        )
    return acc


@triton.jit
def _tile_block(
    delta, rows, at, fields, slot, tile, tokens, delta_stride, row_stride, h_in, max_rank, FP8: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The tokens of one tile against one tile of rows; resident blocks where there are any."""
    dtype: tl.constexpr = rows.dtype.element_ty
    table = tl.load(at + SLOT_TABLE).to(tl.pointer_type(tl.int64))
    k, first = locate_block(table, tl.load(at + SLOT_BLOCKS), tile, BI)
    if k >= 0:
        block = table + k * BLOCK_FIELDS
        row, num_rows = tl.load(block + BLOCK_ROW), tl.load(block + BLOCK_ROWS)
        cols = tl.load(block + BLOCK_COLS)
        rows = tl.multiple_of(rows + tl.load(block + BLOCK_PADDED_COL), ALIGNMENT)
        resident = tl.load(at + SLOT_RESIDENT)
        i, t = first + tl.arange(0, BI), tl.arange(0, BT)
        if resident != 0:
            updates = resident.to(tl.pointer_type(dtype)) + tl.load(block + BLOCK_ELEMENT)
            updates = tl.multiple_of(updates, ALIGNMENT)
            acc = rows_times_block(rows, updates, t, t < tokens, i, num_rows, cols, row_stride, False, BT, BI, BJ)
        else:
            weights = block_weights(at, block, FP8, dtype)
            h_out = tl.load(fields + SLICE_H_OUT)
            a = tl.load(fields + SLICE_A).to(tl.pointer_type(dtype)) + slot * max_rank * h_in
            b = tl.load(fields + SLICE_B).to(tl.pointer_type(dtype)) + slot * max_rank * h_out
            acc = _tile_rows(
                rows, weights, a + tl.load(block + BLOCK_COL), b + row, tl.load(at + SLOT_RANK), num_rows, cols, i, t,
                tokens, row_stride, h_in, h_out, FP8, BT, BR, BI, BJ,
            )  # fmt: skip
            if FP8:
                acc *= row_scales(at, row, i, num_rows)
        mask = (t < tokens)[:, None] & (i < num_rows)[None, :]
        tl.store(delta + t[:, None].to(tl.int64) * delta_stride + row + i[None, :], acc.to(dtype), mask=mask)


@triton.jit
def tile_kernel(
    delta, rows, slices, slots, tiles, number, base, first_tile, delta_stride, row_stride, slice_stride, h_in, max_rank,
    num_slots, SLICES: tl.constexpr, MAX_BLOCKS: tl.constexpr, FP8: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """delta[p] = `(W_k * (B_k A_k)) x_k`, or `dW_k x_k` of a slot with resident blocks, in sorted rows.

    The modulated tile is formed in registers on its way to the tensor cores; dW is never in memory. One program: the BT
    tokens of one tile, all of one slot, against BI rows of one block.

    Args:
        delta: [P, H_out] of the packed layer, sorted rows of each slice; rows: as `prepare_kernel` wrote them with
            RANKS = 0, both for positions from `base` on.
        tiles: [.., TILE_FIELDS] int32, used from `first_tile` on; number: [1] int32, how many there are.
        BR: ranks multiplied at a time. Others as in `expand_kernel`. Grid: (tiles of rows, tiles of tokens).
    """
    t = first_tile + tl.program_id(1)
    if t < tl.load(number):
        index, tile = locate_slice(slices, tl.program_id(0).to(tl.int64), SLICES, MAX_BLOCKS, BI)
        fields = slices + index * SLICE_FIELDS
        slot = tl.load(tiles + t * TILE_FIELDS + TILE_SLOT).to(tl.int64)
        at = slots + (index * num_slots + slot) * SLOT_FIELDS
        if tl.load(at + SLOT_PARTITION) >= 0:
            start = tl.load(tiles + t * TILE_FIELDS + TILE_START).to(tl.int64) - base
            _tile_block(
                delta + tl.load(fields + SLICE_OFFSET) + start * delta_stride,
                rows + index * slice_stride + start * row_stride, at, fields, slot, tile,
                tl.load(tiles + t * TILE_FIELDS + TILE_TOKENS), delta_stride, row_stride, h_in, max_rank, FP8, BT, BR,
                BI, BJ,
            )  # fmt: skip
