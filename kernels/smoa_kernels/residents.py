"""Blocks of dW that are formed and kept: those of a hot adapter, and those of a merged one on their way into W."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from smoa_kernels.blocks.layout import BlockStore
from smoa_kernels.slots import SlotSlice

Factors = tuple[Tensor, Tensor]  # a [r, H_in] and b [r, H_out] in the partition's order
Keep = Callable[[Sequence[Tensor]], BlockStore]


@dataclass(frozen=True, eq=False)
class MergedBlock:
    """One block of a weight with an adapter's update in it.

    Attributes:
        index: slice; rows [m] and cols [n]: native coordinates in it.
        update: dW, [m, n] fp32; before: W, [m, n] model dtype; after: their sum, added in fp32 and rounded once.
    """

    index: int
    rows: Tensor
    cols: Tensor
    update: Tensor
    before: Tensor
    after: Tensor

    @property
    def back(self) -> Tensor:
        """`W - W'`. Exact wherever both lie within a factor of two (Sterbenz); elsewhere rounded once."""
        return self.before - self.after


def delta_block(entry: SlotSlice, factors: Factors, k: int) -> Tensor:
    """`W_k * (B_k A_k)` of a slot that has factors, scaling included: [m_k, n_k] fp32."""
    block, (a, b) = entry.partition.blocks[k], factors
    rows, cols = slice(block.row_start, block.row_end), slice(block.col_start, block.col_end)
    return (b[:, rows].float().T @ a[:, cols].float()).mul_(entry.partition.store.block(k))


def with_resident(entry: SlotSlice, factors: Factors, keep: Keep) -> SlotSlice:
    """The same with its blocks of dW, in the dtype of the factors, formed unless they are held or would be zero."""
    if entry.resident is not None or entry.idle:
        return entry
    blocks = range(len(entry.partition.blocks))
    return replace(entry, resident=keep([delta_block(entry, factors, k).to(factors[0].dtype) for k in blocks]))


def merged_blocks(index: int, entry: SlotSlice, factors: Factors) -> Iterator[MergedBlock]:
    """Every block of `W' = W + dW` of slice `index`, each formed when it is asked for."""
    partition = entry.partition
    for k, block in enumerate(partition.blocks):
        update, before = delta_block(entry, factors, k), partition.store.block(k)
        yield MergedBlock(
            index=index,
            rows=partition.row_order[block.row_start : block.row_end],
            cols=partition.col_order[block.col_start : block.col_end],
            update=update,
            before=before,
            after=(update + before).to(factors[0].dtype),
        )
