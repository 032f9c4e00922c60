"""How a partition keeps its blocks of the base weight: each backend packs them its own way, or takes them plain."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


class BlockStore(Protocol):
    """The weight blocks of one partition."""

    @property
    def whole(self) -> bool:
        """Whether it holds the whole weight in the partition's order, for `smoa_linear`."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in model dtype."""


class PlainBlocks:
    """Blocks as [m_k, n_k] tensors; equal-sized ones are views of one `stacked` [K, m, n] for a batched GEMM."""

    whole = False

    def __init__(self, blocks: Tensors) -> None:
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
