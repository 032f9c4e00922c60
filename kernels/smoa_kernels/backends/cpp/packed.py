"""Blocks of the base weight as the C++ kernel reads them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# One panel holds this many rows of W: a 512-bit register of fp32 accumulators (kLanes in csrc/vector.h).
PANEL_ROWS = 16
# Columns of bfloat16 in a tile of the tile unit (kAmxColumns in csrc/amx.h).
TILE_COLUMNS = 32


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
        cols = np.array([block.shape[1] for block in blocks], np.int64)
        padded = cols + -cols % self._group
        packed = _starts(padded)
        self.packed_cols = int(padded.sum())
        bands = [_filled(block, int(width)) for block, width in zip(blocks, padded, strict=True)]
        if whole is not None:
            ends = [*cols.tolist(), whole[0].shape[1] - int(cols.sum())]
            self.packed_cols += ends[-1]
            self.packed_cols += -self.packed_cols % (TILE_COLUMNS if self._group == 2 else 1)
            widths = [*padded.tolist(), self.packed_cols - int(padded.sum())]
            bands = [
                torch.cat([_filled(*part) for part in zip(torch.split(band, ends, dim=1), widths, strict=True)], dim=1)
                for band in whole
                if len(band)
            ]
        rows, count = [len(band) for band in bands], len(blocks)
        strides = np.array([PANEL_ROWS * band.shape[1] for band in bands], np.int64)
        panels = np.array([-(-size // PANEL_ROWS) for size in rows], np.int64)
        firsts = _starts(panels * strides)
        self.table: NDArray[np.int64] = np.zeros((len(bands), 9), np.int64)
        self.table[:, 0], self.table[:, 1] = _starts(np.array(rows, np.int64)), rows
        self.table[:count, 2:6] = np.stack([_starts(cols), cols, packed, padded], axis=1)
        self.table[:, 6], self.table[:, 7] = firsts, strides
        self.table[:count, 6] += PANEL_ROWS * packed if self.whole else 0
        self.table[:count, 8] = _starts(panels[:count] * PANEL_ROWS * padded)
        self.weights = torch.empty(int((panels * strides).sum()), dtype=dtype)
        self._bands = []
        for band, first, stride, number in zip(bands, firsts, strides, panels, strict=True):
            held = self.weights[first : first + number * stride]
            self._bands.append(held.view(number, stride // (PANEL_ROWS * self._group), PANEL_ROWS, self._group))
            tall = torch.nn.functional.pad(band, (0, 0, 0, int(number) * PANEL_ROWS - len(band)))
            self._bands[-1].copy_(tall.view(number, PANEL_ROWS, -1, self._group).transpose(1, 2))

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


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of some consecutive parts begins."""
    starts: NDArray[np.int64] = np.cumsum(sizes) - sizes
    return starts


def _filled(matrix: Tensor, width: int) -> Tensor:
    """With zero columns behind, `width` in all."""
    return torch.nn.functional.pad(matrix, (0, width - matrix.shape[1])).contiguous()
