"""What the GPU kernels read of a bank and of a plan: tables in device memory that never move.

A captured CUDA graph keeps the addresses; filling a slot or starting a step writes into the same memory. The rows are
those of `blocks.tables`.
"""

from collections.abc import Iterator

import numpy as np
import torch

from smoa_kernels.backends.triton.aligned import AlignedBlocks
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.partition import Partition
from smoa_kernels.blocks.tables import PASS_TOKENS, TILE_TOKENS, SliceRow, SlotRow, SortedRow, TileRow
from smoa_kernels.cost import CostModel
from smoa_kernels.errors import PlanError
from smoa_kernels.plan import StepPlan
from smoa_kernels.slots import SlotSlice

# Not measured: a tile is formed by one pass of the tensor cores over the rank, padded to 16, and serves 64 tokens.
TRITON_COST = CostModel(form=16.0, form_per_rank=0.0, resident=8.0)


class LayerTables:
    """The tables of one bank.

    Attributes:
        slices: [slices, fields of SliceRow] int64.
        slots: [slices, S + 1, fields of SlotRow] int64; the last slot is that of `LayerBank.hold_merged`.
        sorted: [slices, fields of SortedRow] int64, -1 where the weight of a slice is not whole.
        numbers: [PASS_TOKENS + 1] int32: 0, 1, ...: the tokens of one pass, and any count of them.
    """

    def __init__(self, bank: LayerBank) -> None:
        rows = [
            SliceRow(a.data_ptr(), b.data_ptr(), size, sum(bank.slices[:index]))
            for index, (a, b, size) in enumerate(zip(bank.a, bank.b, bank.slices, strict=True))
        ]
        shape = (len(rows), len(bank.slots), len(SlotRow._fields))
        self.slices = torch.tensor(rows, dtype=torch.int64, device=bank.device)
        self.slots = torch.full(shape, -1, dtype=torch.int64, device=bank.device)
        self.sorted = torch.full((len(rows), len(SortedRow._fields)), -1, dtype=torch.int64, device=bank.device)
        self.numbers = torch.arange(PASS_TOKENS + 1, dtype=torch.int32, device=bank.device)
        self._orders: dict[int, _Orders] = {}

    def write(self, bank: LayerBank) -> None:
        """Takes what the slots hold now."""
        whole = [bank.whole_partition(index) for index in range(len(bank.slices))]
        used = [entry.partition for slot in bank.slots for entry in slot if entry is not None]
        held = {partition.serial: partition for partition in (*used, *whole) if partition is not None}
        self._orders = {key: self._orders.get(key) or _Orders(partition) for key, partition in held.items()}
        table = np.full(self.slots.shape, -1, np.int64)
        for slot, entries in enumerate(bank.slots):
            for index, entry in enumerate(entries):
                if entry is not None and not entry.idle:
                    table[index, slot] = self._slot_row(entry)
        self.slots.copy_(torch.from_numpy(table))
        if any(whole):
            rows = [(-1,) * len(SortedRow._fields) if own is None else self._sorted_row(own) for own in whole]
            self.sorted.copy_(torch.tensor(rows, dtype=torch.int64))

    def _slot_row(self, entry: SlotSlice) -> SlotRow:
        store, orders = aligned_blocks(entry.partition.store), self._orders[entry.partition.serial]
        return SlotRow(
            partition=entry.partition.serial,
            rank=entry.rank,
            weights=store.weights.data_ptr(),
            table=store.table.data_ptr(),
            blocks=len(entry.partition.blocks),
            columns=orders.columns.data_ptr(),
            padded_cols=store.padded_cols,
            row_order=orders.rows.data_ptr(),
            row_inverse=orders.row_inverse.data_ptr(),
            live_rows=entry.partition.live_rows,
            resident=0 if entry.resident is None else aligned_blocks(entry.resident).weights.data_ptr(),
            scales=0 if store.scales is None else store.scales.data_ptr(),
        )

    def _sorted_row(self, partition: Partition) -> SortedRow:
        weight, orders = aligned_blocks(partition.store).sorted, self._orders[partition.serial]
        assert weight is not None
        return SortedRow(
            weights=weight.matrix.data_ptr(),
            stride=weight.matrix.shape[1],
            columns=orders.all_columns.data_ptr(),
            row_order=orders.rows.data_ptr(),
            table=weight.table.data_ptr(),
            blocks=len(weight.table),
        )


class _Orders:
    """A partition's orders as the kernels read them, int32."""

    def __init__(self, partition: Partition) -> None:
        store = aligned_blocks(partition.store)
        self.columns = store.padded_columns(partition.col_order)
        self.rows = partition.row_order.int()
        self.row_inverse = partition.row_inverse.int()
        if store.sorted is not None:
            # Native column at each position of the sorted weight.
            self.all_columns = self.columns.new_full((store.sorted.matrix.shape[1],), -1)
            self.all_columns[: store.padded_cols] = self.columns[:, 0]
            rest = partition.col_order[partition.live_cols :].int()
            self.all_columns[store.padded_cols : store.padded_cols + len(rest)] = rest


def aligned_blocks(store: object) -> AlignedBlocks:
    """The store as what it has to be."""
    assert isinstance(store, AlignedBlocks), "a bank of the Triton implementation keeps aligned blocks"
    return store


class StepTables:
    """The tables of one plan: which tokens expand, and tiles of tokens of one slot that modulate or are resident.

    Attributes:
        expand: [max_tokens] int32 tokens; num_expand their number.
        tiled: [max_tokens] int32 tokens, grouped by tile.
        tiles: [max_tiles, fields of TileRow] int32; num_tiles their number.
        counts: [3] int32: num_expand, num_tiles and num_tiled (tokens in tiles), for the kernels.
    """

    def __init__(self, plan: StepPlan) -> None:
        device, fields = plan.device, len(TileRow._fields)
        max_tiles = tile_capacity(plan.max_tokens, plan.num_slots)
        layout = [4, plan.max_tokens, plan.max_tokens, max_tiles * fields]
        self._num_slots = plan.num_slots
        # One buffer, so that a step is one copy; pinned, so that the copy does not wait.
        self._host = torch.zeros(sum(layout), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(layout), dtype=torch.int32, device=device)
        self.counts, self.expand, self.tiled, tiles = torch.split(self._device, layout)
        self.tiles = tiles.view(max_tiles, fields)
        self._counts, self._expand, self._tiled, self._tiles = (
            part.numpy() for part in torch.split(self._host, layout)
        )
        self.num_expand = self.num_tiles = self.num_tiled = 0
        self._starts: list[int] = []
        self._copied: torch.cuda.Event | None = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def write(self, plan: StepPlan) -> None:
        """Takes the groups of a step, each with the way that the plan's ranks, residents and cost choose."""
        cost = plan.cost or TRITON_COST
        if self._copied is not None:
            self._copied.synchronize()
        expand = tile = tiled = 0
        tiles = self._tiles.reshape(-1, len(TileRow._fields))
        for group in plan.groups:
            tokens, count = plan.order[group.start : group.end], group.count
            if cost.way(count, plan.ranks[group.slot], plan.residents[group.slot]) == "expand":
                self._expand[expand : expand + count] = tokens
                expand += count
                continue
            self._tiled[tiled : tiled + count] = tokens
            for start in range(0, count, TILE_TOKENS):
                tiles[tile] = TileRow(group.slot, tiled + start, min(TILE_TOKENS, count - start))
                tile += 1
            tiled += count
        self.num_expand, self.num_tiles, self.num_tiled = expand, tile, tiled
        self._counts[:3] = expand, tile, tiled
        self._starts = tiles[:tile, 1].tolist()
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def whole(self, tokens: int) -> Iterator[tuple[range, int, int]]:
        """The one chunk that covers every step of at most so many tokens, for a launch that will be replayed.

        Yields:
            tiles, first position, positions.
        """
        yield range(tile_capacity(tokens, self._num_slots)), 0, tokens

    def chunks(self, positions: int) -> Iterator[tuple[range, int, int]]:
        """The step's tiles in chunks of at most so many positions of `tiled`.

        Yields:
            tiles, first position, positions.
        """
        ends = [*self._starts[1:], self.num_tiled] if self._starts else []
        first = 0
        for tile, end in enumerate(ends):
            if tile + 1 == len(ends) or ends[tile + 1] - self._starts[first] > positions:
                yield range(first, tile + 1), self._starts[first], end - self._starts[first]
                first = tile + 1


def tile_capacity(tokens: int, num_slots: int) -> int:
    """Most tiles that so many tokens of any slots can take."""
    if tokens < 1:
        raise PlanError(f"{tokens} tokens take no tiles.")
    return tokens // TILE_TOKENS + min(tokens, num_slots)
