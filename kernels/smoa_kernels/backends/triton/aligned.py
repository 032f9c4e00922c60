"""Weight blocks for the GPU kernels: rows padded so that every load of a weight can be a vector load."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smoa_kernels.blocks.fp8 import dequantized
from smoa_kernels.blocks.tables import BlockRow, aligned


class AlignedBlocks:
    """Blocks one after the other in one buffer, each row-major with its columns zero-padded to the alignment.

    Running example, blocks of 2 x 20 and 1 x 5: row strides 32 and 16, so the second block starts at element 64 and
    its columns at padded column 32; 80 elements in all.

    Args:
        blocks: [m_k, n_k] each, on one device, of one dtype; may be fp8 (see `scales`).
        dtype: of the blocks that `block` returns.
        scales: for fp8 blocks, [m_k] fp32 per block: what each row of the stored numbers is multiplied with.
        whole: the whole weight, in the bands of `Backend.pack`, to keep beside the blocks.

    Attributes:
        weights: flat.
        scales: [sum of m_k] fp32, None unless the blocks are fp8.
        table: [K, fields of BlockRow] int64 on the device.
        padded_cols: padded columns of all blocks.
        sorted: the whole weight; None unless it is kept.
    """

    def __init__(
        self,
        blocks: Sequence[Tensor],
        dtype: torch.dtype,
        scales: Sequence[Tensor] = (),
        whole: Sequence[Tensor] | None = None,
    ) -> None:
        device = blocks[0].device if blocks else torch.device("cpu")
        rows = col = padded_col = element = 0
        table = []
        for m, n in (block.shape for block in blocks):
            table.append(BlockRow(rows, m, col, n, padded_col, element))
            rows, col, padded_col, element = rows + m, col + n, padded_col + aligned(n), element + m * aligned(n)
        self.padded_cols = padded_col
        self.weights = torch.zeros(element, dtype=blocks[0].dtype if blocks else dtype, device=device)
        self.scales = torch.cat(list(scales)) if scales else None
        self._dtype = dtype
        self._rows = table
        self.table = torch.tensor(table, dtype=torch.int64, device=device).view(-1, len(BlockRow._fields))
        for k, block in enumerate(blocks):
            self._stored(k).copy_(block)
        self.sorted = None if whole is None else SortedWeight(whole, table)

    @property
    def whole(self) -> bool:
        """Whether the whole weight is kept too."""
        return self.sorted is not None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.weights.nbytes + scales + (0 if self.sorted is None else self.sorted.matrix.nbytes)

    def _stored(self, k: int) -> Tensor:
        row = self._rows[k]
        stride = aligned(row.cols)
        return self.weights[row.element : row.element + row.rows * stride].view(row.rows, stride)[:, : row.cols]

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in the model's dtype: a view, or a dequantized copy of fp8."""
        if self.scales is None:
            return self._stored(k)
        row = self._rows[k]
        return dequantized(self._stored(k), self.scales[row.row : row.row + row.rows], self._dtype)

    def padded_columns(self, col_order: Tensor) -> Tensor:
        """[padded_cols, 2] int32: native column and sorted position at each padded position, -1 in the padding.

        Args:
            col_order: [H_in] native column at each sorted position.
        """
        columns = torch.full((self.padded_cols, 2), -1, dtype=torch.int32, device=col_order.device)
        for row in self._rows:
            places, positions = _columns(row)
            columns[places, 0] = col_order[positions].int()
            columns[places, 1] = torch.arange(positions.start, positions.stop, device=col_order.device)
        return columns


class SortedWeight:
    """The whole weight of a slice in the order of its partition: rows sorted, columns at their padded places.

    Columns of no block stand behind those of the blocks, rows of no block last.

    Args:
        bands: as in `Backend.pack`.
        blocks: the rows of the blocks' table.

    Attributes:
        matrix: [H_out, padded H_in] in the dtype of the weight.
        table: [K + 1, fields of BlockRow] int64 on its device; the last row is that of the rows of no block.
    """

    def __init__(self, bands: Sequence[Tensor], blocks: Sequence[BlockRow]) -> None:
        rows, h_in = sum(len(band) for band in bands), bands[0].shape[1]
        live_rows, live = sum(block.rows for block in blocks), sum(block.cols for block in blocks)
        padded = sum(aligned(block.cols) for block in blocks)
        rest = BlockRow(live_rows, rows - live_rows, live, 0, 0, 0)
        self.matrix = bands[0].new_zeros(rows, padded + aligned(h_in - live))
        self.table = torch.tensor([*blocks, rest], dtype=torch.int64, device=bands[0].device)
        row = 0
        for band in bands:
            for part in (*blocks, BlockRow(0, 0, live, h_in - live, padded, 0)):
                places, positions = _columns(part)
                self.matrix[row : row + len(band), places] = band[:, positions]
            row += len(band)


def _columns(row: BlockRow) -> tuple[slice, slice]:
    """The columns of a block: where they stand when padded, and in sorted order."""
    return slice(row.padded_col, row.padded_col + row.cols), slice(row.col, row.col + row.cols)
