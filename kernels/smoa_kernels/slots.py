"""What a slot holds."""

from dataclasses import dataclass

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
