"""The adapters of one (possibly packed) linear layer on one rank: slots of factors, and the blocks of W they use."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from smoa_kernels.backend import chosen
from smoa_kernels.blocks.partition import Partition
from smoa_kernels.blocks.source import PartitionSource, RowScale, WeightBlock
from smoa_kernels.cost import cost_model
from smoa_kernels.errors import ShapeError, SlotError
from smoa_kernels.residents import MergedBlock, merged_blocks, with_resident
from smoa_kernels.slots import SlotSlice
from smoa_kernels.update import SliceUpdate, check_storage, update_reasons

Value = TypeVar("Value")


class LayerBank:
    """Factors and base-weight blocks of one (possibly packed) linear layer on one rank.

    Args:
        a: per slice [S, R, H_in] contiguous storage, written by `set`: rows of a slot's A, columns in the sorted order
            of its partition.
        b: per slice [S, R, H_out_i] contiguous storage, likewise (B transposed). One dtype (fp32, bf16, fp16), one
            device.
        weight_block: fetches a block of the base weight; called once per block when a partition first appears.
        row_scale: for a base weight in fp8 (float8_e4m3fn, as `weight_block` then returns it): what each row of it is
            multiplied with. GPUs that know fp8 keep the blocks so, others in model dtype.
        retain_partitions: how many partitions that no slot uses are kept per slice, so that evicting an adapter and
            loading it again fetches nothing.
        whole: where the backend can: keep one partition of each slice inside the whole weight in its order, for steps
            whose adapters all have that one (see `can_be_one_pass`). As much memory as the weight.
        implementation: name of the backend that the blocks are laid out for and `smoa_delta` runs; None = the best one
            here. "torch" and "reference" still serve the bank, slower.

    Attributes:
        slices: H_out_i of each slice; h_out their sum; h_in, num_slots S, max_rank R.
        slots: per slot, per slice what it holds, None where there is no update. One more at the end, see `hold_merged`.
        merged: whether it holds blocks of `W - W'` for a merged adapter.
        version: grows with every change of a slot.
        cost: chooses the way of each adapter's tokens.
        fp8: whether the blocks are kept in fp8.
        backend: named `implementation`; attached: what it keeps beside the bank, None where it keeps nothing.

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
        row_scale: RowScale | None = None,
        retain_partitions: int = 4,
        whole: bool = False,
        implementation: str | None = None,
    ) -> None:
        check_storage(a, b)
        self.a, self.b = tuple(a), tuple(b)
        self.num_slots, self.max_rank, self.h_in = (int(size) for size in a[0].shape)
        self.slices = tuple(int(storage.shape[2]) for storage in b)
        self.h_out = sum(self.slices)
        self.dtype, self.device = a[0].dtype, a[0].device
        self.backend = chosen(self.device, self.dtype, implementation)
        self.implementation = self.backend.name
        self.cost = cost_model(self.implementation, self.device, self.dtype)
        self._empty: tuple[SlotSlice | None, ...] = (None,) * len(self.slices)
        self.merged = False
        self.slots: list[tuple[SlotSlice | None, ...]] = [self._empty] * (self.num_slots + 1)
        self.version = 0
        self._source = PartitionSource(
            num_slices=len(self.slices),
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
            weight_block=weight_block,
            row_scale=row_scale,
            retain=retain_partitions,
            whole=whole,
        )
        self.fp8 = self._source.fp8
        self._memo: dict[Hashable, tuple[int, Any]] = {}
        self.attached = self.backend.attach_bank(self)

    @property
    def partition_bytes(self) -> int:
        """Bytes of the weight blocks and orders of all partitions held, those kept without a user included."""
        return self._source.nbytes

    @property
    def num_partitions(self) -> int:
        """How many partitions are held, those kept without a user included."""
        return self._source.count

    def set(self, slot: int, updates: Sequence[SliceUpdate | None]) -> None:
        """Puts an adapter's updates into a slot, replacing what was there.

        An update that does not fit, or whose blocks cannot be had, leaves the slot as it was. A failure after that
        leaves it empty. It never holds a part.

        Args:
            slot: 0 .. num_slots - 1.
            updates: one per slice; None = the adapter leaves that slice alone.

        Raises:
            SlotError: no such slot.
            ShapeError: an update does not fit the layer; lists every reason.
        """
        self._check_slot(slot)
        reasons = update_reasons(updates, h_in=self.h_in, slices=self.slices, max_rank=self.max_rank)
        if reasons:
            raise ShapeError(f"the update of slot {slot}", reasons)
        held: list[SlotSlice | None] = []
        try:
            for index, update in enumerate(updates):
                held.append(None if update is None else self._hold(index, update))
        except BaseException:
            self._release(held, keep=False)
            raise
        try:
            self._vacate(slot)
            for index, (update, entry) in enumerate(zip(updates, held, strict=True)):
                if update is not None and entry is not None:
                    self._write(index, slot, update, entry.partition)
            self.slots[slot] = tuple(held)
            self._changed()
        except BaseException:
            self.slots[slot] = self._empty
            self._release(held, keep=False)
            self._wipe(slot)
            raise

    def clear(self, slot: int) -> None:
        """Empties a slot. Its tokens then get no delta; its storages are zero.

        Raises:
            SlotError: no such slot.
        """
        self._check_slot(slot)
        self._vacate(slot)
        self._changed()

    def own(self, slot: int, owner: Hashable) -> None:
        """Says whose updates a slot holds: partitions that no slot uses are kept for their owners to come back.

        Args:
            slot: 0 .. num_slots - 1.
            owner: of what the slot holds now.

        Raises:
            SlotError: no such slot.
        """
        self._check_slot(slot)
        for entry in self.slots[slot]:
            if entry is not None:
                entry.partition.owners.add(owner)

    def forget(self, owner: Hashable) -> None:
        """Drops what is kept for an owner who never comes back; slots are emptied by `clear`."""
        self._source.forget(owner)

    def _vacate(self, slot: int) -> None:
        held, self.slots[slot] = self.slots[slot], self._empty
        self._release(held)
        self._wipe(slot)

    def _wipe(self, slot: int) -> None:
        for storage in (*self.a, *self.b):
            storage[slot].zero_()

    def factors(self, index: int, slot: int) -> tuple[Tensor, Tensor]:
        """The live factors of a slot of one slice, in sorted order: a [r, H_in] and b [r, H_out], views."""
        entry = self.slots[slot][index]
        if entry is None or entry.rank == 0:
            return self.a[index][0, :0], self.b[index][0, :0]
        return self.a[index][slot, : entry.rank], self.b[index][slot, : entry.rank]

    def make_resident(self, slot: int) -> int:
        """Forms a slot's blocks of dW in model dtype and keeps them: its tokens then cost no more than a plain GEMM.

        Returns:
            Bytes held for it.

        Raises:
            SlotError: no such slot.
        """
        self._check_slot(slot)
        self.slots[slot] = tuple(
            entry and with_resident(entry, self.factors(index, slot), self._source.keep)
            for index, entry in enumerate(self.slots[slot])
        )
        self._changed()
        return self.resident_bytes(slot)

    def lacks_resident(self, slot: int) -> bool:
        """Whether `make_resident` would have something to form."""
        return any(entry is not None and not entry.idle and entry.resident is None for entry in self.slots[slot])

    def drop_resident(self, slot: int) -> None:
        """Gives the blocks of `make_resident` back.

        Raises:
            SlotError: no such slot.
        """
        self._check_slot(slot)
        self.slots[slot] = tuple(entry and replace(entry, resident=None) for entry in self.slots[slot])
        self._changed()

    def resident_bytes(self, slot: int) -> int:
        """Bytes of a slot's blocks of dW."""
        return sum(entry.resident.nbytes for entry in self.slots[slot] if entry is not None and entry.resident)

    def merged_blocks(self, slot: int) -> Iterator[MergedBlock]:
        """Every block of `W' = W + dW` of a slot, each formed when it is asked for.

        Raises:
            SlotError: no such slot.
        """
        self._check_slot(slot)
        for index, entry in enumerate(self.slots[slot]):
            if entry is not None and not entry.idle:
                yield from merged_blocks(index, entry, self.factors(index, slot))

    def hold_merged(self, slot: int, back: Sequence[Sequence[Tensor]]) -> None:
        """Prepares for the caller's base weight to hold `W' = W + dW` of a slot, in the blocks of `merged_blocks`.

        In a step whose plan says merged, the merged adapter's tokens then get nothing, and all others the difference
        back: the last element of `slots` holds blocks of `W - W'`. They do not depend on the slot any more.

        Args:
            slot: of the adapter.
            back: per slice `MergedBlock.back` of each block.

        Raises:
            SlotError: no such slot, or another one is held.
        """
        self._check_slot(slot)
        if self.merged:
            raise SlotError(f"an adapter is merged already; un-merge it before slot {slot} is merged.")
        self.slots[-1] = tuple(
            None if entry is None or entry.idle else SlotSlice(entry.partition, 0, self._source.keep(blocks))
            for entry, blocks in zip(self.slots[slot], back, strict=True)
        )
        self.merged = True
        self._changed()

    def drop_merged(self) -> None:
        """Gives back what `hold_merged` made; the caller's base weight is the original again."""
        self.slots[-1], self.merged = self._empty, False
        self._changed()

    @property
    def merged_bytes(self) -> int:
        """Bytes of the blocks of `hold_merged`."""
        return self.resident_bytes(-1)

    def _changed(self) -> None:
        self.version += 1
        self._memo.clear()
        if self.attached is not None:
            self.attached.write(self)

    def memo(self, key: Hashable, step: int, build: Callable[[], Value]) -> Value:
        """`build()`, remembered under `key` while neither the slots nor the step (a plan's version) change."""
        found = self._memo.get(key)
        if found is None or found[0] != step:
            found = self._memo[key] = (step, build())
        value: Value = found[1]
        return value

    def _hold(self, index: int, update: SliceUpdate) -> SlotSlice:
        return SlotSlice(self._source.acquire(index, update), int(update.a.shape[0]))

    def whole_partition(self, index: int) -> Partition | None:
        """The partition of a slice whose weight is whole."""
        return self._source.whole(index)

    def _write(self, index: int, slot: int, update: SliceUpdate, partition: Partition) -> None:
        rank = int(update.a.shape[0])
        a = update.a.detach().to(self.device, torch.float32)
        b = update.b.detach().to(self.device, torch.float32) * update.scaling
        self.a[index][slot, :rank] = a.index_select(1, partition.col_order).to(self.dtype)
        self.b[index][slot, :rank] = b.t().index_select(1, partition.row_order).to(self.dtype)

    def _release(self, entries: Sequence[SlotSlice | None], *, keep: bool = True) -> None:
        for index, entry in enumerate(entries):
            if entry is not None:
                self._source.release(index, entry.partition, keep=keep)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise SlotError(f"slot {slot} does not exist; this layer has slots 0 to {self.num_slots - 1}.")
