"""Partitions: which coordinates of a layer belong together, and the blocks of W between them."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from smoa_kernels.blocks.layout import BlockStore


@dataclass(frozen=True)
class Block:
    """One block in sorted coordinates: rows [row_start, row_end) against columns [col_start, col_end)."""

    row_start: int
    row_end: int
    col_start: int
    col_end: int

    @property
    def rows(self) -> int:
        """m_k."""
        return self.row_end - self.row_start

    @property
    def cols(self) -> int:
        """n_k."""
        return self.col_end - self.col_start


@dataclass(eq=False)
class Partition:
    """One (row_block, col_block) pair of one slice, with its blocks of the base weight.

    Running example, row_block = [1, 0, 1, 7] and col_block = [0, 1, 0]: ids 0 and 1 occur on both sides, 7 does not.
    row_order = [1, 0, 2, 3] (id 0, id 1, then rows without a counterpart), col_order = [0, 2, 1], blocks
    [0:1, 0:2] and [1:3, 2:3].

    Attributes:
        digest: identity of the pair.
        row_order: [H_out] int64, native row at each sorted position; rows without a counterpart come last.
        col_order: [H_in] int64, likewise.
        row_inverse: [H_out] int64, sorted position of each native row.
        blocks: the blocks with rows and columns, which tile the prefixes [0, live_rows) and [0, live_cols).
        store: the weight blocks.
        users: how many slots use it now.
        owners: for whom it is kept when none does.
        serial: number of this object, unlike that of any other that this process has made.
        native_rows: row_order is the identity; native_cols likewise.
    """

    digest: bytes
    row_order: Tensor
    col_order: Tensor
    blocks: tuple[Block, ...]
    store: BlockStore
    users: int = 0
    owners: set[Hashable] = field(default_factory=set)
    serial: int = field(init=False, default_factory=count().__next__)
    row_inverse: Tensor = field(init=False)
    native_rows: bool = field(init=False)
    native_cols: bool = field(init=False)

    def __post_init__(self) -> None:
        self.row_inverse = torch.argsort(self.row_order)
        self.native_rows = is_identity(self.row_order)
        self.native_cols = is_identity(self.col_order)

    @property
    def live_rows(self) -> int:
        """Number of rows that any block covers."""
        return self.blocks[-1].row_end if self.blocks else 0

    @property
    def live_cols(self) -> int:
        """Number of columns that any block covers."""
        return self.blocks[-1].col_end if self.blocks else 0

    @property
    def block_numbers(self) -> int:
        """Numbers in all blocks."""
        return sum(block.rows * block.cols for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight blocks and the orders, of the whole weight where it is kept."""
        return self.store.nbytes + sum(t.nbytes for t in (self.row_order, self.col_order, self.row_inverse))


def is_identity(order: Tensor) -> bool:
    """Whether a permutation leaves everything in place."""
    return bool(torch.equal(order, torch.arange(order.numel(), device=order.device)))


def partition_digest(row_block: Tensor, col_block: Tensor) -> bytes:
    """Identity of a pair of block ids: equal content, equal digest."""
    h = hashlib.blake2b(digest_size=16)
    for ids in (row_block, col_block):
        h.update(ids.numel().to_bytes(8, "little"))
        h.update(ids.detach().to("cpu", torch.int16).contiguous().numpy().tobytes())
    return h.digest()


def sort_blocks(row_block: Tensor, col_block: Tensor) -> tuple[Tensor, Tensor, tuple[Block, ...]]:
    """Sorts coordinates so that each block is a contiguous rectangle.

    Args:
        row_block: [H_out] integer ids on any device.
        col_block: [H_in] integer ids.

    Returns:
        row_order [H_out] and col_order [H_in] (int64, CPU; stable, ids without a counterpart last), and the blocks.
    """
    rows, cols = row_block.detach().cpu().long(), col_block.detach().cpu().long()
    shared = sorted(set(rows.tolist()) & set(cols.tolist()))
    ids = torch.tensor(shared, dtype=torch.int64)
    blocks: list[Block] = []
    row, col = 0, 0
    for block_id in shared:
        m, n = int((rows == block_id).sum()), int((cols == block_id).sum())
        blocks.append(Block(row, row + m, col, col + n))
        row, col = row + m, col + n
    last = torch.iinfo(torch.int64).max
    row_order = torch.argsort(torch.where(torch.isin(rows, ids), rows, last), stable=True)
    col_order = torch.argsort(torch.where(torch.isin(cols, ids), cols, last), stable=True)
    return row_order, col_order, tuple(blocks)


class PartitionCache:
    """The partitions of one slice: shared by the slots that use them, and kept a while after the last one left.

    Args:
        retain: how many unused partitions to keep, least recently used first to go.
    """

    def __init__(self, retain: int) -> None:
        self._retain = retain
        self._held: OrderedDict[bytes, Partition] = OrderedDict()

    def acquire(self, digest: bytes, build: Callable[[], Partition]) -> Partition:
        """The partition of `digest`, built if it is not held; counts one more user."""
        partition = self._held.get(digest)
        if partition is None:
            partition = self._held[digest] = build()
        self._held.move_to_end(digest)
        partition.users += 1
        return partition

    def release(self, partition: Partition, *, keep: bool = True) -> None:
        """Counts one user less and drops the unused partitions above the limit; without `keep` this one too, unless it
        is kept for an owner."""
        partition.users -= 1
        if not keep and partition.users == 0 and not partition.owners:
            del self._held[partition.digest]
            return
        self._held.move_to_end(partition.digest)
        unused = [digest for digest, held in self._held.items() if held.users == 0]
        for digest in unused[: max(0, len(unused) - self._retain)]:
            del self._held[digest]

    def forget(self, owner: Hashable) -> None:
        """Drops the unused partitions that nobody else has owned: their owner never comes back."""
        for digest, partition in list(self._held.items()):
            if owner in partition.owners:
                partition.owners.discard(owner)
                if not partition.owners and partition.users == 0:
                    del self._held[digest]

    @property
    def held(self) -> tuple[Partition, ...]:
        """All partitions, used or not."""
        return tuple(self._held.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all partitions held, used or not."""
        return sum(partition.nbytes for partition in self._held.values())
