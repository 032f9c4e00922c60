"""How a partition keeps its blocks of the base weight: as they are, or packed for the C++ kernel."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# One panel holds this many rows of W: a 512-bit register of fp32 accumulators (kLanes in csrc/vector.h).
PANEL_ROWS = 16
# Columns of bfloat16 in a tile of the tile unit (kAmxColumns in csrc/amx.h).
TILE_COLUMNS = 32


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

    Args:
        blocks: block k as a plain [m_k, n_k] tensor; one dtype.
        whole: the whole weight in sorted order, in bands: the rows of each block, then those of no block, with the
            columns of every block, then those of none. The blocks are kept where they lie in it, so that one pass over
            it makes base product and deltas. None = the blocks alone, one after the other.

    Attributes:
        weights: all panels, flat.
        table: [K, 9] int64: row_start, rows, col_start, cols, first padded column, padded columns, first element in
            `weights`, elements from panel to panel, first element if the blocks were alone. Where the weight is whole,
            one more for the rows of no block, without columns.
        packed_cols: padded columns of all blocks; of the whole weight where it is held.
        whole: whether it is.
    """

    def __init__(self, blocks: Sequence[Tensor], whole: Sequence[Tensor] | None = None) -> None:
        dtype = blocks[0].dtype if blocks else torch.bfloat16
        self.whole, self._group = whole is not None, 2 if dtype is torch.bfloat16 else 1
        cols = [block.shape[1] for block in blocks]
        padded = [self._padded(count) for count in cols]
        bands = [(block, block.shape[0]) for block in blocks]
        self.packed_cols = sum(padded)
        if whole is not None:
            live = self.packed_cols
            cols.append(whole[0].shape[1] - sum(cols))
            padded.append(self._padded(cols[-1]))
            if self._group == 2:  # rows of whole tiles of the tile unit
                padded[-1] += -(live + padded[-1]) % TILE_COLUMNS
            self.packed_cols = live + padded[-1]
            bands = [(self._pad_columns(band, cols), band.shape[0]) for band in whole]
        self.table: NDArray[np.int64] = np.zeros((len(bands), 9), np.int64)
        self._bands: list[Tensor] = []
        sizes = [self._panels(rows) * PANEL_ROWS * self._padded(band.shape[1]) for band, rows in bands]
        self.weights = torch.empty(sum(sizes), dtype=dtype)
        row = col = packed_col = alone = start = 0
        for k, ((band, rows), size) in enumerate(zip(bands, sizes, strict=True)):
            live_cols, live_padded = (cols[k], padded[k]) if k < len(blocks) else (0, 0)
            stride = PANEL_ROWS * self._padded(band.shape[1])
            inside = packed_col * PANEL_ROWS if self.whole and live_cols else 0
            self.table[k] = (
                row, rows, col, live_cols, packed_col if live_cols else 0, live_padded, start + inside, stride, alone
            )  # fmt: skip
            panels = self.weights[start : start + size].view(
                self._panels(rows), stride // (PANEL_ROWS * self._group), PANEL_ROWS, self._group
            )
            panels.copy_(self._pad(band).view(-1, PANEL_ROWS, *panels.shape[1::2]).transpose(1, 2))
            self._bands.append(panels)
            row, col, packed_col, start = row + rows, col + live_cols, packed_col + live_padded, start + size
            alone += self._panels(rows) * PANEL_ROWS * live_padded

    def _padded(self, cols: int) -> int:
        return cols + -cols % self._group

    @staticmethod
    def _panels(rows: int) -> int:
        return -(-rows // PANEL_ROWS)

    def _pad_columns(self, band: Tensor, cols: Sequence[int]) -> Tensor:
        parts = [self._pad(part, 1) for part in torch.split(band, list(cols), dim=1)]
        filled = band.new_zeros(len(band), self.packed_cols - sum(part.shape[1] for part in parts))
        return torch.cat([*parts, filled], dim=1)

    def _pad(self, block: Tensor, rows: int = PANEL_ROWS) -> Tensor:
        padding = (0, -block.shape[1] % self._group, 0, -block.shape[0] % rows)
        return torch.nn.functional.pad(block, padding).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weights.nbytes

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in model dtype: a copy."""
        _, rows, _, cols, packed_col, padded, *_ = self.table[k].tolist()
        first = packed_col // self._group if self.whole else 0
        panels = self._bands[k][:, first : first + padded // self._group]
        return panels.transpose(1, 2).flatten(0, 1).flatten(1)[:rows, :cols]
