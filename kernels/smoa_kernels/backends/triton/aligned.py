"""Weight blocks for the GPU kernels: rows padded so that every load of a weight can be a vector load."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements: 16 bytes of the narrowest dtype (fp8).
ALIGNMENT = 16
# Fields of a row of `AlignedBlocks.table`.
TABLE_FIELDS = 6


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class AlignedBlocks:
    """Blocks one after the other in one buffer, each row-major with its columns zero-padded to the alignment.

    Running example, blocks of 2 x 20 and 1 x 5: row strides 32 and 16, so the second block starts at element 64 and
    its columns at padded column 32; 80 elements in all.

    Args:
        blocks: [m_k, n_k] each, on one device, of one dtype; may be fp8 (see `scales`).
        dtype: of the blocks that `block` returns.
        scales: for fp8 blocks, [m_k] fp32 per block: what each row of the stored numbers is multiplied with.

    Attributes:
        weights: flat.
        scales: [sum of m_k] fp32, None unless the blocks are fp8.
        table: [K, 6] int64 on the device: row_start, rows, col_start, cols, padded column start, first element.
        padded_cols: padded columns of all blocks.
    """

    def __init__(self, blocks: Sequence[Tensor], dtype: torch.dtype, scales: Sequence[Tensor] = ()) -> None:
        device = blocks[0].device if blocks else torch.device("cpu")
        rows = col = padded_col = element = 0
        table = []
        for m, n in (block.shape for block in blocks):
            table.append((rows, m, col, n, padded_col, element))
            rows, col, padded_col, element = rows + m, col + n, padded_col + aligned(n), element + m * aligned(n)
        self.padded_cols = padded_col
        self.weights = torch.zeros(element, dtype=blocks[0].dtype if blocks else dtype, device=device)
        self.scales = torch.cat(list(scales)) if scales else None
        self._dtype = dtype
        self._rows = table
        self.table = torch.tensor(table, dtype=torch.int64, device=device).view(-1, TABLE_FIELDS)
        for k, block in enumerate(blocks):
            self._stored(k).copy_(block)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weights.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def _stored(self, k: int) -> Tensor:
        _, m, _, n, _, element = self._rows[k]
        return self.weights[element : element + m * aligned(n)].view(m, aligned(n))[:, :n]

    def block(self, k: int) -> Tensor:
        """Block k as a plain [m_k, n_k] tensor in the model's dtype: a view, or a dequantized copy of fp8."""
        if self.scales is None:
            return self._stored(k)
        row, m = self._rows[k][:2]
        return (self._stored(k).float() * self.scales[row : row + m, None]).to(self._dtype)

    def padded_columns(self, col_order: Tensor) -> Tensor:
        """[padded_cols, 2] int32: native column and sorted position at each padded position, -1 in the padding.

        Args:
            col_order: [H_in] native column at each sorted position.
        """
        columns = torch.full((self.padded_cols, 2), -1, dtype=torch.int32, device=col_order.device)
        for _, _, col, n, padded_col, _ in self._rows:
            columns[padded_col : padded_col + n, 0] = col_order[col : col + n].int()
            columns[padded_col : padded_col + n, 1] = torch.arange(col, col + n, device=col_order.device)
        return columns
