"""How a partition keeps its blocks of the base weight: as they are, or packed for the C++ kernel."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# One panel holds this many rows of W: a 512-bit register of fp32 accumulators (kLanes in csrc/vector.h).
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


class PackedBlocks:
    """Blocks for the C++ kernel: panels of 16 rows with the columns in groups, [panels, groups, 16, G], zero-padded.

    G is 2 for bfloat16, whose pairs fill the lanes of a register, and 1 for other dtypes. Running example, a block of
    20 rows and 5 columns in bfloat16: 2 panels (the second with 12 zero rows), 3 groups (the last with a zero column),
    so 2 * 3 * 32 numbers; its columns are padded to 6 in every row that the kernel multiplies with it.

    Attributes:
        weights: all blocks one after the other, flat.
        table: [K, 7] int64: row_start, rows, col_start, cols, first padded column, padded columns, first element in
            `weights`.
        packed_cols: padded columns of all blocks.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        dtype = blocks[0].dtype if blocks else torch.bfloat16
        self._group = 2 if dtype is torch.bfloat16 else 1
        self.table: NDArray[np.int64] = np.zeros((len(blocks), 7), np.int64)
        row = col = packed_col = weight = 0
        for k, (rows, cols) in enumerate(block.shape for block in blocks):
            padded = cols + -cols % self._group
            self.table[k] = row, rows, col, cols, packed_col, padded, weight
            row, col, packed_col = row + rows, col + cols, packed_col + padded
            weight += (rows + -rows % PANEL_ROWS) * padded
        self.packed_cols = packed_col
        self.weights = torch.empty(weight, dtype=dtype)
        for k, block in enumerate(blocks):
            panels = self._panels(k)
            panels.copy_(self._pad(block).view(-1, PANEL_ROWS, panels.shape[1], self._group).transpose(1, 2))

    def _pad(self, block: Tensor) -> Tensor:
        rows, cols = block.shape
        return torch.nn.functional.pad(block, (0, -cols % self._group, 0, -rows % PANEL_ROWS)).contiguous()

    def _panels(self, k: int) -> Tensor:
        _, rows, _, _, _, padded, weight = self.table[k].tolist()
        panels = -(-rows // PANEL_ROWS)
        size = panels * PANEL_ROWS * padded
        return self.weights[weight : weight + size].view(panels, padded // self._group, PANEL_ROWS, self._group)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weights.nbytes

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in model dtype: a copy."""
        _, rows, _, cols, *_ = self.table[k].tolist()
        return self._panels(k).transpose(1, 2).flatten(0, 1).flatten(1)[:rows, :cols]
