"""How a partition keeps its blocks of the base weight: as they are, or packed for the C++ kernel."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# One panel holds this many rows of W: a 512-bit register of fp32 accumulators.
PANEL_ROWS = 16


class BlockStore(Protocol):
    """The weight blocks of one partition."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in model dtype."""


class PlainBlocks:
    """Blocks as [m_k, n_k] tensors; equal-sized ones are views of one `stacked` [K, m, n] for a batched GEMM."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.stacked: Tensor | None = None
        self.blocks = list(blocks)
        if len(self.blocks) == 1:
            self.stacked = self.blocks[0].unsqueeze(0)  # a view: a K = 1 weight is never copied
        elif self.blocks and len({block.shape for block in self.blocks}) == 1:
            self.stacked = torch.stack(self.blocks)
            self.blocks = list(self.stacked.unbind(0))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(block.nbytes for block in self.blocks)

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in model dtype."""
        return self.blocks[k]
