"""What the Triton kernels share: the tables that launches read, and products with one block.

Everything that changes from step to step or when a slot is filled is read from memory that stays where it is, so a CUDA
graph that was captured once serves every later mix of adapters. Launchers are in `launch`.
"""

import triton
import triton.language as tl

from smoa_kernels.blocks import tables
from smoa_kernels.blocks.tables import BlockRow, SliceRow, SlotRow, SortedRow, TileRow


def _fields(row: type, names: str) -> tuple[tl.constexpr, ...]:
    assert names.split() == list(row._fields), f"{row.__name__} has other fields"
    return tuple(tl.constexpr(i) for i in range(len(row._fields)))


# Constants of a kernel have to be constexpr.
SLICE_FIELDS, SLOT_FIELDS, BLOCK_FIELDS, TILE_FIELDS, SORTED_FIELDS = (
    tl.constexpr(len(row._fields)) for row in (SliceRow, SlotRow, BlockRow, TileRow, SortedRow)
)
SLICE_A, SLICE_B, SLICE_H_OUT, SLICE_OFFSET = _fields(SliceRow, "a b h_out offset")
(
    SLOT_PARTITION, SLOT_RANK, SLOT_WEIGHTS, SLOT_TABLE, SLOT_BLOCKS, SLOT_COLUMNS, SLOT_PADDED_COLS, SLOT_ROW_ORDER,
    SLOT_ROW_INVERSE, SLOT_LIVE_ROWS, SLOT_RESIDENT, SLOT_SCALES,
) = _fields(
    SlotRow,
    "partition rank weights table blocks columns padded_cols row_order row_inverse live_rows resident scales",
)  # fmt: skip
BLOCK_ROW, BLOCK_ROWS, BLOCK_COL, BLOCK_COLS, BLOCK_PADDED_COL, BLOCK_ELEMENT = _fields(
    BlockRow, "row rows col cols padded_col element"
)
TILE_SLOT, TILE_START, TILE_TOKENS = _fields(TileRow, "slot start tokens")
SORTED_WEIGHTS, SORTED_STRIDE, SORTED_COLUMNS, SORTED_ROW_ORDER, SORTED_TABLE, SORTED_BLOCKS = _fields(
    SortedRow, "weights stride columns row_order table blocks"
)
ALIGNMENT = tl.constexpr(tables.ALIGNMENT)
NO_PARTITION = tl.constexpr(2**62)


@triton.jit
def locate_slice(slices, tile, SLICES: tl.constexpr, MAX_BLOCKS: tl.constexpr, BI: tl.constexpr):
    """The slice that a tile number of a packed layer falls into, and the tile's number there.

    A slice has as many numbers as its rows may take tiles: a block's last tile may be cut short.
    """
    index = tl.full([], 0, tl.int64)
    for s in tl.static_range(SLICES - 1):
        tiles = tl.cdiv(tl.load(slices + s * SLICE_FIELDS + SLICE_H_OUT), BI) + MAX_BLOCKS
        beyond = (index == s) & (tile >= tiles)
        tile = tl.where(beyond, tile - tiles, tile)
        index = tl.where(beyond, s + 1, index)
    return index, tile


@triton.jit
def locate_block(table, num_blocks, tile, BI: tl.constexpr):
    """(block, its first row for this tile); block -1 when the partition has fewer tiles."""
    found = tl.full([], -1, tl.int64)
    start = tl.full([], 0, tl.int64)
    for k in range(num_blocks):
        tiles = tl.cdiv(tl.load(table + k * BLOCK_FIELDS + BLOCK_ROWS), BI)
        here = (tile >= 0) & (tile < tiles)
        found = tl.where(here, k, found)
        start = tl.where(here, tile * BI, start)
        tile -= tiles
    return found, start


@triton.jit
def position_slot(slots, order, token_to_slot, number, position, index, num_slots):
    """Of positions in `order`: token, slot, partition (-1 = no update of this slice, and from `number` on) and rank."""
    token = tl.load(order + position, mask=position < number, other=0).to(tl.int64)
    slot = tl.load(token_to_slot + token, mask=position < number, other=-1).to(tl.int64)
    entry = slots + (index * num_slots + slot) * SLOT_FIELDS
    partition = tl.load(entry + SLOT_PARTITION, mask=slot >= 0, other=-1)
    return token, slot, partition, tl.load(entry + SLOT_RANK, mask=partition >= 0, other=0)


@triton.jit
def weight_tile(weights, stride, i, j, rows, FP8: tl.constexpr, dtype: tl.constexpr):
    """W_k[i, j] transposed: [BJ, BI]. Rows are padded to the alignment, so whole vectors are masked together."""
    mask = (i < rows)[None, :] & (j < stride)[:, None]
    tile = tl.load(weights + i[None, :] * stride + j[:, None], mask=mask, other=0.0)
    return tile.to(dtype) if FP8 else tile


@triton.jit
def dot(a, b, acc, dtype: tl.constexpr):
    """acc + a b; float32 without the rounding to TF32."""
    if dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def rows_tile(rows, u, live, j, end, row_stride):
    """Prepared rows u at columns j, zeros where not live and from `end` on."""
    mask = live[:, None] & (j < end)[None, :]
    return tl.load(rows + u[:, None].to(tl.int64) * row_stride + j[None, :], mask=mask, other=0.0)


@triton.jit
def rows_times_block(
    rows, weights, u, live, i, num_rows, cols, row_stride, FP8: tl.constexpr, BU: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
    """[BU, BI] fp32: prepared rows u (zeros where not live) times rows i of a block of W."""
    dtype: tl.constexpr = rows.dtype.element_ty
    stride = tl.cdiv(cols, ALIGNMENT) * ALIGNMENT
    acc = tl.zeros([BU, BI], tl.float32)
    for start in range(0, stride, BJ):
        j = start + tl.arange(0, BJ)
        tile = weight_tile(weights, stride, i, j, num_rows, FP8, dtype)
        acc = dot(rows_tile(rows, u, live, j, stride, row_stride), tile, acc, dtype)
    return acc


@triton.jit
def block_weights(at, block, FP8: tl.constexpr, dtype: tl.constexpr):
    """Where a block of the partition of a slot's entry begins, [rows, columns padded to the alignment]."""
    weights = tl.load(at + SLOT_WEIGHTS).to(tl.pointer_type(tl.float8e4nv if FP8 else dtype))
    return tl.multiple_of(weights + tl.load(block + BLOCK_ELEMENT), ALIGNMENT)


@triton.jit
def row_scales(at, row, i, num_rows):
    """What rows i of a block of fp8 weights are multiplied with, [1, BI] fp32."""
    scales = tl.load(at + SLOT_SCALES).to(tl.pointer_type(tl.float32)) + row
    return tl.load(scales + i, mask=i < num_rows, other=0.0)[None, :]
