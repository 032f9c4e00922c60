"""What a slot holds."""

from dataclasses import dataclass

from torch import Tensor

from smoa_kernels.blocks.layout import BlockStore
from smoa_kernels.blocks.partition import Partition


@dataclass(frozen=True, eq=False)
class SlotSlice:
    """What one slot of one slice holds.

    Attributes:
        partition: its blocks.
        rank: live rank, rows of a and b that count; 0 = it has no factors.
        resident: blocks of dW in model dtype, None unless they are held.
    """

    partition: Partition
    rank: int
    resident: BlockStore | None = None

    @property
    def idle(self) -> bool:
        """Whether its delta is zero by construction."""
        return not self.partition.blocks or (self.rank == 0 and self.resident is None)


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
