"""The adapters of one (possibly packed) linear layer on one rank: slots of factors, and the blocks of W they use."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from smoa_kernels.errors import ShapeError, SlotError
from smoa_kernels.implementations import default_implementation, require_implementation
from smoa_kernels.layout import PackedBlocks, PlainBlocks
from smoa_kernels.partition import Partition, PartitionCache, partition_digest, sort_blocks

# (slice_index, rows int64 [m], cols int64 [n]) -> W[rows][:, cols] of that slice, [m, n] in model dtype on the device.
# With rows and cols covering everything in native order it may return the weight itself.
WeightBlock = Callable[[int, Tensor, Tensor], Tensor]
Value = TypeVar("Value")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class SliceUpdate:
    """One slice's update in the layer's own coordinates.

    `dW[i, j] = scaling * [row_block[i] == col_block[j]] * (b @ a)[i, j] * W[i, j]`.

    Attributes:
        a: [R, H_in], any float dtype and device; rows at and above the rank of column j's block are zero at j.
        b: [H_out, R], likewise for rows.
        row_block: [H_out] int16 block ids; col_block: [H_in] int16. Ids without a counterpart contribute nothing.
        scaling: folded into b in fp32, before the cast to model dtype.
    """

    a: Tensor
    b: Tensor
    row_block: Tensor
    col_block: Tensor
    scaling: float


@dataclass(frozen=True)
class SlotSlice:
    """What one slot of one slice holds: its partition and its live rank (rows of a and b that count)."""

    partition: Partition
    rank: int


class LayerBank:
    """Factors and base-weight blocks of one (possibly packed) linear layer on one rank.

    Args:
        a: per slice [S, R, H_in] contiguous storage, written by `set`: rows of a slot's A, columns in the sorted order
            of its partition.
        b: per slice [S, R, H_out_i] contiguous storage, likewise (B transposed). One dtype (fp32, bf16, fp16), one
            device.
        weight_block: fetches a block of the base weight; called once per block when a partition first appears.
        retain_partitions: how many partitions that no slot uses are kept per slice, so that evicting an adapter and
            loading it again fetches nothing.
        implementation: which one the blocks are laid out for and `smoa_delta` runs; None = the best one here.
            Of the others, all but "cpp" still serve the bank, slower.

    Attributes:
        slices: H_out_i of each slice; h_out their sum; h_in, num_slots S, max_rank R.
        slots: per slot, per slice what it holds, None where there is no update.
        version: grows with every set and clear.

    Raises:
        ShapeError: the storages do not fit together.
        ImplementationError: the implementation asked for cannot run here.
    """

    def __init__(
        self,
        *,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        weight_block: WeightBlock,
        retain_partitions: int = 4,
        implementation: str | None = None,
    ) -> None:
        _check_storage(a, b)
        self.a, self.b = tuple(a), tuple(b)
        self.num_slots, self.max_rank, self.h_in = (int(size) for size in a[0].shape)
        self.slices = tuple(int(storage.shape[2]) for storage in b)
        self.h_out = sum(self.slices)
        self.dtype, self.device = a[0].dtype, a[0].device
        if implementation is not None:
            require_implementation(implementation, self.device, self.dtype)
        self.implementation = implementation or default_implementation(self.device, self.dtype)
        self.slots: list[tuple[SlotSlice | None, ...]] = [(None,) * len(self.slices)] * self.num_slots
        self.version = 0
        self._weight_block = weight_block
        self._partitions = tuple(PartitionCache(retain_partitions) for _ in self.slices)
        self._store: type[PlainBlocks] | type[PackedBlocks] = (
            PackedBlocks if self.implementation == "cpp" else PlainBlocks
        )
        self._memo: dict[Hashable, tuple[int, Any]] = {}

    @property
    def partition_bytes(self) -> int:
        """Bytes of the weight blocks and orders of all partitions held, those kept without a user included."""
        return sum(cache.nbytes for cache in self._partitions)

    def set(self, slot: int, updates: Sequence[SliceUpdate | None]) -> None:
        """Puts an adapter's updates into a slot, replacing what was there. Either all of it happens or none.

        Args:
            slot: 0 .. num_slots - 1.
            updates: one per slice; None = the adapter leaves that slice alone.

        Raises:
            SlotError: no such slot.
            ShapeError: an update does not fit the layer; lists every reason.
        """
        self._check_slot(slot)
        reasons = self._reasons(updates)
        if reasons:
            raise ShapeError(f"the update of slot {slot}", reasons)
        held: list[SlotSlice | None] = []
        try:
            for index, update in enumerate(updates):
                held.append(None if update is None else self._hold(index, update))
        except BaseException:
            self._release(held)
            raise
        self.clear(slot)
        for index, (update, entry) in enumerate(zip(updates, held, strict=True)):
            if update is not None and entry is not None:
                self._write(index, slot, update, entry.partition)
        self.slots[slot] = tuple(held)

    def clear(self, slot: int) -> None:
        """Empties a slot. Its tokens then get no delta; its storages are zero.

        Raises:
            SlotError: no such slot.
        """
        self._check_slot(slot)
        self._release(self.slots[slot])
        self.slots[slot] = (None,) * len(self.slices)
        for storage in (*self.a, *self.b):
            storage[slot].zero_()
        self.version += 1
        self._memo.clear()

    def memo(self, key: Hashable, step: int, build: Callable[[], Value]) -> Value:
        """`build()`, remembered under `key` while neither the slots nor the step (a plan's version) change."""
        found = self._memo.get(key)
        if found is None or found[0] != step:
            found = self._memo[key] = (step, build())
        value: Value = found[1]
        return value

    def _hold(self, index: int, update: SliceUpdate) -> SlotSlice:
        digest = partition_digest(update.row_block, update.col_block)
        partition = self._partitions[index].acquire(digest, lambda: self._build(index, digest, update))
        return SlotSlice(partition, int(update.a.shape[0]))

    def _build(self, index: int, digest: bytes, update: SliceUpdate) -> Partition:
        row_order, col_order, blocks = sort_blocks(update.row_block, update.col_block)
        row_order, col_order = row_order.to(self.device), col_order.to(self.device)
        weights = []
        for block in blocks:
            rows, cols = row_order[block.row_start : block.row_end], col_order[block.col_start : block.col_end]
            weight = self._weight_block(index, rows, cols)
            if weight.shape != (block.rows, block.cols) or weight.dtype != self.dtype or weight.device != self.device:
                found = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
                wanted = f"({block.rows}, {block.cols}) {self.dtype} on {self.device}"
                raise ShapeError(f"weight_block of slice {index}", [f"it returned {found}, asked for was {wanted}."])
            weights.append(weight)
        return Partition(digest, row_order, col_order, blocks, self._store(weights))

    def _write(self, index: int, slot: int, update: SliceUpdate, partition: Partition) -> None:
        rank = int(update.a.shape[0])
        a = update.a.detach().to(self.device, torch.float32)
        b = update.b.detach().to(self.device, torch.float32) * update.scaling
        self.a[index][slot, :rank] = a.index_select(1, partition.col_order).to(self.dtype)
        self.b[index][slot, :rank] = b.t().index_select(1, partition.row_order).to(self.dtype)

    def _release(self, entries: Sequence[SlotSlice | None]) -> None:
        for cache, entry in zip(self._partitions, entries, strict=False):
            if entry is not None:
                cache.release(entry.partition)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise SlotError(f"slot {slot} does not exist; this layer has slots 0 to {self.num_slots - 1}.")

    def _reasons(self, updates: Sequence[SliceUpdate | None]) -> list[str]:
        if len(updates) != len(self.slices):
            return [
                f"there are {len(updates)} updates; the layer has {len(self.slices)} slices, give None for the others."
            ]
        reasons = []
        for index, (update, h_out) in enumerate(zip(updates, self.slices, strict=True)):
            if update is not None:
                reasons += [f"slice {index}: {reason}" for reason in self._slice_reasons(update, h_out)]
        return reasons

    def _slice_reasons(self, update: SliceUpdate, h_out: int) -> list[str]:
        reasons = []
        if update.a.ndim != 2 or update.a.shape[1] != self.h_in:
            reasons.append(f"a is {tuple(update.a.shape)}; allowed is [rank, {self.h_in}].")
        if update.b.ndim != 2 or update.b.shape[0] != h_out:
            reasons.append(f"b is {tuple(update.b.shape)}; allowed is [{h_out}, rank].")
        if update.a.ndim == update.b.ndim == 2 and update.a.shape[0] != update.b.shape[1]:
            reasons.append(f"a has rank {update.a.shape[0]} and b has rank {update.b.shape[1]}; they must be equal.")
        if update.a.ndim == 2 and update.a.shape[0] > self.max_rank:
            reasons.append(
                f"rank {update.a.shape[0]} is above {self.max_rank}, the rank of the slots; make them larger."
            )
        for name, ids, size in (("row_block", update.row_block, h_out), ("col_block", update.col_block, self.h_in)):
            if ids.shape != (size,) or ids.dtype != torch.int16:
                reasons.append(f"{name} is {tuple(ids.shape)} {ids.dtype}; allowed is [{size}] torch.int16.")
        for name, factor in (("a", update.a), ("b", update.b)):
            if not factor.dtype.is_floating_point:
                reasons.append(f"{name} is {factor.dtype}; allowed is any floating-point dtype.")
        return reasons


def _check_storage(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    if not a or len(a) != len(b):
        raise ShapeError("the layer's storage", [f"there are {len(a)} a and {len(b)} b; give one of each per slice."])
    reasons = []
    first = a[0]
    for index, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        if a_i.ndim != 3 or a_i.shape != first.shape or min(a_i.shape) < 1:
            reasons.append(f"a[{index}] is {tuple(a_i.shape)}; allowed is one [S, R, H_in] for all slices.")
        if b_i.ndim != 3 or b_i.shape[:2] != first.shape[:2] or b_i.shape[2] < 1:
            reasons.append(f"b[{index}] is {tuple(b_i.shape)}; allowed is [S, R, H_out] with the S and R of a.")
        for name, storage in (("a", a_i), ("b", b_i)):
            if storage.dtype not in DTYPES or storage.dtype != first.dtype or storage.device != first.device:
                reasons.append(
                    f"{name}[{index}] is {storage.dtype} on {storage.device}; allowed is one of float32, bfloat16 and "
                    "float16, the same for all, on one device."
                )
            if not storage.is_contiguous():
                reasons.append(f"{name}[{index}] is not contiguous; give contiguous memory (a view of it is fine).")
    if reasons:
        raise ShapeError("the layer's storage", reasons)
