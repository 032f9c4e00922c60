"""What the GPU kernels read of a bank and of a plan: tables in device memory that never move.

A captured CUDA graph keeps the addresses; filling a slot or starting a step writes into the same memory. The fields'
numbers are those of `triton_common`, which cannot be imported where Triton is missing.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smoa_kernels.backends.triton.aligned import AlignedBlocks
from smoa_kernels.blocks.partition import Partition
from smoa_kernels.cost import CostModel
from smoa_kernels.errors import PlanError
from smoa_kernels.slots import SlotSlice
from smoa_kernels.tokens import TokenGroup

SLICE_FIELDS, SLOT_FIELDS, TILE_FIELDS = 4, 12, 3
# Most blocks of one partition: the grid of a launch is fixed, and a block may end in a cut tile.
MAX_BLOCKS = 32
# Tokens of one adapter that share a tile of the modulating kernel.
TILE_TOKENS = 64


class LayerTables:
    """The tables of one bank.

    Args:
        a, b: per slice the storages of the factors, [S, R, H_in] and [S, R, H_out].

    Attributes:
        slices: [slices, SLICE_FIELDS] int64: addresses of a and b, H_out, first row in the packed output.
        slots: [slices, S + 1, SLOT_FIELDS] int64: see `_slot_row`; the last slot is that of `LayerBank.merge`.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        sizes = [int(storage.shape[2]) for storage in b]
        rows = [
            (one.data_ptr(), other.data_ptr(), size, sum(sizes[:index]))
            for index, (one, other, size) in enumerate(zip(a, b, sizes, strict=True))
        ]
        shape, device = (len(rows), int(a[0].shape[0]) + 1, SLOT_FIELDS), a[0].device
        self.slices = torch.tensor(rows, dtype=torch.int64, device=device)
        self.slots = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._orders: dict[int, _Orders] = {}

    def write(self, slots: Sequence[Sequence[SlotSlice | None]]) -> None:
        """Takes what the slots hold now.

        Args:
            slots: per slot, per slice.
        """
        held = {entry.partition.serial: entry.partition for slot in slots for entry in slot if entry is not None}
        self._orders = {key: self._orders.get(key) or _Orders(partition) for key, partition in held.items()}
        table = np.full(self.slots.shape, -1, np.int64)
        for slot, entries in enumerate(slots):
            for index, entry in enumerate(entries):
                if entry is not None and not entry.idle:
                    table[index, slot] = self._slot_row(entry)
        self.slots.copy_(torch.from_numpy(table))

    def _slot_row(self, entry: SlotSlice) -> tuple[int, ...]:
        store, orders = _aligned(entry.partition.store), self._orders[entry.partition.serial]
        return (
            entry.partition.serial,
            entry.rank,
            store.weights.data_ptr(),
            store.table.data_ptr(),
            len(entry.partition.blocks),
            orders.columns.data_ptr(),
            store.padded_cols,
            orders.rows.data_ptr(),
            orders.row_inverse.data_ptr(),
            entry.partition.live_rows,
            0 if entry.resident is None else _aligned(entry.resident).weights.data_ptr(),
            0 if store.scales is None else store.scales.data_ptr(),
        )


class _Orders:
    """A partition's orders as the kernels read them, int32."""

    def __init__(self, partition: Partition) -> None:
        self.columns = _aligned(partition.store).padded_columns(partition.col_order)
        self.rows = partition.row_order.int()
        self.row_inverse = partition.row_inverse.int()


def _aligned(store: object) -> AlignedBlocks:
    assert isinstance(store, AlignedBlocks), "a bank of the Triton implementation keeps aligned blocks"
    return store


class StepTables:
    """The tables of one plan: which tokens expand, and tiles of tokens of one slot that modulate or are resident.

    Args:
        max_tokens: longest batch.
        num_slots: slots of the plan.
        device: of the tables.

    Attributes:
        expand: [max_tokens] int32 tokens; num_expand their number.
        tiled: [max_tokens] int32 tokens, grouped by tile.
        tiles: [max_tiles, TILE_FIELDS] int32: slot, first position in `tiled`, tokens; num_tiles their number.
        counts: [3] int32: num_expand, num_tiles and num_tiled (tokens in tiles), for the kernels.
    """

    def __init__(self, max_tokens: int, num_slots: int, device: torch.device) -> None:
        max_tiles = tile_capacity(max_tokens, num_slots)
        layout = [4, max_tokens, max_tokens, max_tiles * TILE_FIELDS]
        self._num_slots = num_slots
        # One buffer, so that a step is one copy; pinned, so that the copy does not wait.
        self._host = torch.zeros(sum(layout), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(layout), dtype=torch.int32, device=device)
        self.counts, self.expand, self.tiled, tiles = torch.split(self._device, layout)
        self.tiles = tiles.view(max_tiles, TILE_FIELDS)
        self._counts, self._expand, self._tiled, self._tiles = (
            part.numpy() for part in torch.split(self._host, layout)
        )
        self.num_expand = self.num_tiles = self.num_tiled = 0
        self._starts: list[int] = []
        self._copied: torch.cuda.Event | None = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def write(
        self,
        groups: Sequence[TokenGroup],
        order: NDArray[np.int64],
        ranks: Sequence[int],
        residents: Sequence[bool],
        cost: CostModel,
    ) -> None:
        """Takes the groups of a step.

        Args:
            groups: tokens by slot; order: the tokens they are cut from.
            ranks: highest live rank of each slot in any layer; 0 = it has resident blocks only.
            residents: whether each slot has resident blocks.
            cost: chooses the way of each group.
        """
        if self._copied is not None:
            self._copied.synchronize()
        expand = tile = tiled = 0
        tiles = self._tiles.reshape(-1, TILE_FIELDS)
        for group in groups:
            tokens, count = order[group.start : group.end], group.count
            if cost.way(count, ranks[group.slot], residents[group.slot]) == "expand":
                self._expand[expand : expand + count] = tokens
                expand += count
                continue
            self._tiled[tiled : tiled + count] = tokens
            for start in range(0, count, TILE_TOKENS):
                tiles[tile] = group.slot, tiled + start, min(TILE_TOKENS, count - start)
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
