"""The delta's Triton kernels. Launchers are in `triton_ops`; pointers to what a slot holds come from its device tables.

Everything that changes from step to step or when a slot is filled is read from memory that stays where it is, so a CUDA
graph that was captured once serves every later mix of adapters.
"""

import triton
import triton.language as tl

# Fields of the tables that `device_tables` writes; constants of a kernel have to be constexpr.
SLICE_FIELDS = tl.constexpr(4)
SLICE_A, SLICE_B, SLICE_H_OUT, SLICE_OFFSET = (tl.constexpr(i) for i in range(4))
SLOT_FIELDS = tl.constexpr(12)
(
    SLOT_PARTITION,
    SLOT_RANK,
    SLOT_WEIGHTS,
    SLOT_TABLE,
    SLOT_BLOCKS,
    SLOT_COLUMNS,
    SLOT_PADDED_COLS,
    SLOT_ROW_ORDER,
    SLOT_ROW_INVERSE,
    SLOT_LIVE_ROWS,
    SLOT_RESIDENT,
    SLOT_SCALES,
) = (tl.constexpr(i) for i in range(12))
BLOCK_FIELDS = tl.constexpr(6)
BLOCK_ROW, BLOCK_ROWS, BLOCK_COL, BLOCK_COLS, BLOCK_PADDED_COL, BLOCK_ELEMENT = (tl.constexpr(i) for i in range(6))
TILE_FIELDS = tl.constexpr(3)
TILE_SLOT, TILE_START, TILE_COUNT = (tl.constexpr(i) for i in range(3))
ALIGNMENT = tl.constexpr(16)
NO_PARTITION = tl.constexpr(2**62)


@triton.jit
def _locate_slice(slices, tile, SLICES: tl.constexpr, MAX_BLOCKS: tl.constexpr, BI: tl.constexpr):
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
def _locate_block(table, num_blocks, tile, BI: tl.constexpr):
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
def _weight_tile(weights, stride, i, j, rows, FP8: tl.constexpr, dtype: tl.constexpr):
    """W_k[i, j] transposed: [BJ, BI]. Rows are padded to the alignment, so whole vectors are masked together."""
    mask = (i < rows)[None, :] & (j < stride)[:, None]
    tile = tl.load(weights + i[None, :] * stride + j[:, None], mask=mask, other=0.0)
    return tile.to(dtype) if FP8 else tile


@triton.jit
def _dot(a, b, acc, dtype: tl.constexpr):
    if dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _position_slot(slots, order, token_to_slot, number, position, index, num_slots):
    """Of positions in `order`: token, slot, partition (-1 = no update of this slice, and from `number` on) and rank."""
    token = tl.load(order + position, mask=position < number, other=0).to(tl.int64)
    slot = tl.load(token_to_slot + token, mask=position < number, other=-1).to(tl.int64)
    entry = slots + (index * num_slots + slot) * SLOT_FIELDS
    partition = tl.load(entry + SLOT_PARTITION, mask=slot >= 0, other=-1)
    return token, slot, partition, tl.load(entry + SLOT_RANK, mask=partition >= 0, other=0)


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
    token, slot, partition, rank = _position_slot(
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
def _rows_tile(rows, u, live, j, end, row_stride):
    """Prepared rows u at columns j, zeros where not live and from `end` on."""
    mask = live[:, None] & (j < end)[None, :]
    return tl.load(rows + u[:, None].to(tl.int64) * row_stride + j[None, :], mask=mask, other=0.0)


@triton.jit
def _rows_times_block(
    rows, weights, u, live, i, num_rows, cols, row_stride, FP8: tl.constexpr, BU: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
    """[BU, BI] fp32: prepared rows u (zeros where not live) times rows i of a block of W."""
    dtype: tl.constexpr = rows.dtype.element_ty
    stride = tl.cdiv(cols, ALIGNMENT) * ALIGNMENT
    acc = tl.zeros([BU, BI], tl.float32)
    for start in range(0, stride, BJ):
        j = start + tl.arange(0, BJ)
        tile = _weight_tile(weights, stride, i, j, num_rows, FP8, dtype)
        acc = _dot(_rows_tile(rows, u, live, j, stride, row_stride), tile, acc, dtype)
    return acc


@triton.jit
def _expand_partition(
    y, rows, fields, slots, at, tile, order, token_to_slot, total, begin, base, current, index, y_stride, row_stride,
    h_in, max_rank, num_slots, FP8: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, RC: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Adds to y the deltas of those tokens of a tile that share the partition `current`, for one tile of its rows."""
    dtype: tl.constexpr = y.dtype.element_ty
    table = tl.load(at + SLOT_TABLE).to(tl.pointer_type(tl.int64))
    k, first = _locate_block(table, tl.load(at + SLOT_BLOCKS), tile, BI)
    if k >= 0:
        block = table + k * BLOCK_FIELDS
        row, num_rows = tl.load(block + BLOCK_ROW), tl.load(block + BLOCK_ROWS)
        weights = tl.load(at + SLOT_WEIGHTS).to(tl.pointer_type(tl.float8e4nv if FP8 else dtype))
        weights = tl.multiple_of(weights + tl.load(block + BLOCK_ELEMENT), ALIGNMENT)
        rows = tl.multiple_of(rows + tl.load(block + BLOCK_PADDED_COL), ALIGNMENT)
        h_out = tl.load(fields + SLICE_H_OUT)
        b = tl.load(fields + SLICE_B).to(tl.pointer_type(dtype)) + row
        i = first + tl.arange(0, BI)
        # Each row of the product is one rank of one token.
        u = tl.arange(0, BT * RC)
        _, slot, partition, rank = _position_slot(slots, order, token_to_slot, total, begin + u // RC, index, num_slots)
        rank = tl.where(partition == current, rank, 0).to(tl.int32)
        slot = slot.to(tl.int32)
        delta = tl.zeros([BT, BI], tl.float32)
        for c in range(0, tl.max(rank), RC):
            rho = c + u % RC
            live = rho < rank
            place = ((begin - base).to(tl.int32) + u // RC) * RANKS + rho
            acc = _rows_times_block(
                rows, weights, place, live, i, num_rows, tl.load(block + BLOCK_COLS), row_stride, FP8, BT * RC, BI, BJ
            )
            outer = tl.load(
                b + ((slot * max_rank + rho).to(tl.int64) * h_out)[:, None] + i[None, :],
                mask=live[:, None] & (i < num_rows)[None, :], other=0.0,
            )  # fmt: skip
            delta += tl.sum((acc * outer.to(tl.float32)).reshape(BT, RC, BI), 1)
        if FP8:
            scales = tl.load(at + SLOT_SCALES).to(tl.pointer_type(tl.float32)) + row
            delta *= tl.load(scales + i, mask=i < num_rows, other=0.0)[None, :]
        token, _, partition, rank = _position_slot(
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
    y, rows, slices, slots, order, token_to_slot, number, base, tokens, y_stride, row_stride, slice_stride, h_in,
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
        index, tile = _locate_slice(slices, tl.program_id(0).to(tl.int64), SLICES, MAX_BLOCKS, BI)
        fields = slices + index * SLICE_FIELDS
        _, slot, partition, rank = _position_slot(
            slots, order, token_to_slot, total, begin + tl.arange(0, BT), index, num_slots
        )
        left = tl.where(rank > 0, partition, NO_PARTITION)
        current = tl.min(left)
        while current < NO_PARTITION:
            leader = tl.max(tl.where(left == current, slot, -1))
            _expand_partition(
                y + tl.load(fields + SLICE_OFFSET), rows + index * slice_stride, fields, slots,
                slots + (index * num_slots + leader) * SLOT_FIELDS, tile, order, token_to_slot, total, begin, base,
                current, index, y_stride, row_stride, h_in, max_rank, num_slots, FP8, RANKS, BT, RC, BI, BJ,
            )  # fmt: skip
            left = tl.where(left == current, NO_PARTITION, left)
            current = tl.min(left)


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
        product = _dot(a_tile, b_tile, product, dtype)
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
        tile = _weight_tile(weights, stride, i, j, num_rows, FP8, dtype)
        if rank > 0:
            tile = _modulated(tile, a, b, rank, i, j, num_rows, cols, h_in, h_out, BR, BI, BJ)
        mask = (t < tokens)[:, None] & (j < stride)[None, :]
        acc = _dot(
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
    k, first = _locate_block(table, tl.load(at + SLOT_BLOCKS), tile, BI)
    if k >= 0:
        block = table + k * BLOCK_FIELDS
        row, element = tl.load(block + BLOCK_ROW), tl.load(block + BLOCK_ELEMENT)
        num_rows, cols = tl.load(block + BLOCK_ROWS), tl.load(block + BLOCK_COLS)
        rows = tl.multiple_of(rows + tl.load(block + BLOCK_PADDED_COL), ALIGNMENT)
        resident = tl.load(at + SLOT_RESIDENT)
        i, t = first + tl.arange(0, BI), tl.arange(0, BT)
        if resident != 0:
            updates = tl.multiple_of(resident.to(tl.pointer_type(dtype)) + element, ALIGNMENT)
            acc = _rows_times_block(rows, updates, t, t < tokens, i, num_rows, cols, row_stride, False, BT, BI, BJ)
        else:
            weights = tl.load(at + SLOT_WEIGHTS).to(tl.pointer_type(tl.float8e4nv if FP8 else dtype))
            weights = tl.multiple_of(weights + element, ALIGNMENT)
            h_out = tl.load(fields + SLICE_H_OUT)
            a = tl.load(fields + SLICE_A).to(tl.pointer_type(dtype)) + slot * max_rank * h_in
            b = tl.load(fields + SLICE_B).to(tl.pointer_type(dtype)) + slot * max_rank * h_out
            acc = _tile_rows(
                rows, weights, a + tl.load(block + BLOCK_COL), b + row, tl.load(at + SLOT_RANK), num_rows, cols, i, t,
                tokens, row_stride, h_in, h_out, FP8, BT, BR, BI, BJ,
            )  # fmt: skip
            if FP8:
                scales = tl.load(at + SLOT_SCALES).to(tl.pointer_type(tl.float32)) + row
                acc *= tl.load(scales + i, mask=i < num_rows, other=0.0)[None, :]
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
        index, tile = _locate_slice(slices, tl.program_id(0).to(tl.int64), SLICES, MAX_BLOCKS, BI)
        fields = slices + index * SLICE_FIELDS
        slot = tl.load(tiles + t * TILE_FIELDS + TILE_SLOT).to(tl.int64)
        at = slots + (index * num_slots + slot) * SLOT_FIELDS
        if tl.load(at + SLOT_PARTITION) >= 0:
            start = tl.load(tiles + t * TILE_FIELDS + TILE_START).to(tl.int64) - base
            _tile_block(
                delta + tl.load(fields + SLICE_OFFSET) + start * delta_stride,
                rows + index * slice_stride + start * row_stride, at, fields, slot, tile,
                tl.load(tiles + t * TILE_FIELDS + TILE_COUNT), delta_stride, row_stride, h_in, max_rank, FP8, BT, BR,
                BI, BJ,
            )  # fmt: skip


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
    token, slot, partition, _ = _position_slot(slots, order, token_to_slot, tl.load(number), base + p, index, num_slots)
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
