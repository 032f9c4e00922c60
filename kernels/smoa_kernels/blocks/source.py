"""Partitions of one layer, made from its base weight at need and kept for the slots that use them."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from smoa_kernels.backend import Backend
from smoa_kernels.blocks.fp8 import FP8, dequantized
from smoa_kernels.blocks.layout import BlockStore
from smoa_kernels.blocks.partition import Block, Partition, PartitionCache, partition_digest, sort_blocks
from smoa_kernels.errors import ShapeError
from smoa_kernels.update import SliceUpdate

# (slice_index, rows int64 [m], cols int64 [n]) -> W[rows][:, cols] of that slice, [m, n] in model dtype on the device.
# With rows and cols covering everything in native order it may return the weight itself.
WeightBlock = Callable[[int, Tensor, Tensor], Tensor]
# (slice_index, rows int64 [m]) -> fp32 [m].
RowScale = Callable[[int, Tensor], Tensor]


class PartitionSource:
    """See `LayerBank`, whose arguments these are.

    Attributes:
        fp8: whether blocks are kept in fp8.
    """

    def __init__(
        self,
        *,
        num_slices: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        weight_block: WeightBlock,
        row_scale: RowScale | None,
        retain: int,
        whole: bool,
    ) -> None:
        self._dtype, self._device, self._backend = dtype, device, backend
        self._weight_block, self._row_scale = weight_block, row_scale
        self._caches = tuple(PartitionCache(retain) for _ in range(num_slices))
        self.fp8 = row_scale is not None and backend.reads_fp8(device)
        self._keeps_whole = whole and backend.keeps_whole and row_scale is None

    @property
    def nbytes(self) -> int:
        """Bytes of all partitions held, those kept without a user included."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def count(self) -> int:
        """How many partitions are held."""
        return sum(len(cache.held) for cache in self._caches)

    def whole(self, index: int) -> Partition | None:
        """The partition of a slice whose weight is whole."""
        return next((p for p in self._caches[index].held if p.store.whole), None)

    def acquire(self, index: int, update: SliceUpdate) -> Partition:
        """The partition of an update of a slice, with one more user.

        Raises:
            ShapeError: it has too many blocks for the backend, or the weight that is fetched is not what was asked for.
        """
        digest = partition_digest(update.row_block, update.col_block)
        return self._caches[index].acquire(digest, lambda: self._build(index, digest, update))

    def release(self, index: int, partition: Partition, *, keep: bool = True) -> None:
        """One user less; see `PartitionCache.release`."""
        self._caches[index].release(partition, keep=keep)

    def forget(self, owner: Hashable) -> None:
        """See `LayerBank.forget`."""
        for cache in self._caches:
            cache.forget(owner)

    def keep(self, blocks: Sequence[Tensor], scales: Sequence[Tensor] = ()) -> BlockStore:
        """Blocks as the backend reads them."""
        return self._backend.pack(blocks, self._dtype, scales)

    def _build(self, index: int, digest: bytes, update: SliceUpdate) -> Partition:
        row_order, col_order, blocks = sort_blocks(update.row_block, update.col_block)
        refusal = self._backend.why_not_blocks(len(blocks))
        if refusal is not None:
            raise ShapeError("the update", [f"slice {index}: {refusal}"])
        row_order, col_order = row_order.to(self._device), col_order.to(self._device)
        keep = self._whole_weight if self._keeps_whole and self.whole(index) is None else self._blocks
        return Partition(digest, row_order, col_order, blocks, keep(index, row_order, col_order, blocks))

    def _blocks(self, index: int, row_order: Tensor, col_order: Tensor, blocks: Sequence[Block]) -> BlockStore:
        rows = [row_order[block.row_start : block.row_end] for block in blocks]
        cols = [col_order[block.col_start : block.col_end] for block in blocks]
        weights = [self._fetch(index, *pair) for pair in zip(rows, cols, strict=True)]
        if self._row_scale is None:
            return self.keep(weights)
        scales = [self._row_scale(index, part).float() for part in rows]
        if self.fp8:
            return self.keep(weights, scales)
        return self.keep([dequantized(w, s, self._dtype) for w, s in zip(weights, scales, strict=True)])

    def _whole_weight(self, index: int, row_order: Tensor, col_order: Tensor, blocks: Sequence[Block]) -> BlockStore:
        ends = [block.row_end for block in blocks]
        bands = [
            self._fetch(index, row_order[start:end], col_order)
            for start, end in zip([0, *ends], [*ends, len(row_order)], strict=True)
        ]
        inside = [band[:, block.col_start : block.col_end] for band, block in zip(bands, blocks, strict=False)]
        return self._backend.pack(inside, self._dtype, whole=bands)

    def _fetch(self, index: int, rows: Tensor, cols: Tensor) -> Tensor:
        weight = self._weight_block(index, rows, cols)
        dtype = self._dtype if self._row_scale is None else FP8
        if weight.shape != (len(rows), len(cols)) or weight.dtype != dtype or weight.device != self._device:
            found = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
            wanted = f"({len(rows)}, {len(cols)}) {dtype} on {self._device}"
            raise ShapeError(f"weight_block of slice {index}", [f"it returned {found}, asked for was {wanted}."])
        return weight
