"""The base weight of a wrapped layer, as it is served on this rank."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smoa_serve.engine import quantized
from smoa_serve.errors import BaseModelError

# Columns recovered at a time: bounds the identity matrix and its product.
CHUNK_COLUMNS = 2048


class ServedWeight:
    """Reads blocks of one rank's part of a linear layer's weight.

    vLLM's CPU layers repack the weight and drop the original, and quantized layers hold it in other forms; it is
    recovered by multiplying unit vectors, which is exact (one product per output, the rest zeros). The recovered matrix
    lives until `close`. An fp8 weight that lies in the open is dequantized block by block instead.

    Args:
        base_layer: vLLM's linear layer.
        slice_sizes: rows of each packed slice on this rank.
        columns: input columns on this rank.
        dtype: the model's dtype.
    """

    def __init__(self, base_layer: Any, slice_sizes: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
        self._layer = base_layer
        self._columns = columns
        self._offsets = [sum(slice_sizes[:index]) for index in range(len(slice_sizes))]
        self._sizes = slice_sizes
        self._dtype = dtype
        self._recovered: Tensor | None = None

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of the whole weight of this rank in the model's dtype."""
        return sum(self._sizes) * self._columns * self._dtype.itemsize

    def refusal(self) -> str | None:
        """Why this layer's weight cannot be read exactly, None when it can."""
        if not quantized.is_quantized(self._layer) or self._is_fp8:
            return None
        return self._why_not_recoverable

    @cached_property
    def _is_fp8(self) -> bool:
        return quantized.is_readable_fp8(self._layer, self._columns, self._dtype)

    @cached_property
    def _why_not_recoverable(self) -> str | None:
        return quantized.why_not_recoverable(self._layer, self._columns, self._dtype)

    def block(self, index: int, rows: Tensor, cols: Tensor) -> Tensor:
        """W[rows][:, cols] of slice `index`.

        Args:
            index: which packed slice.
            rows: int64 [m], rows of that slice on this rank.
            cols: int64 [n], input columns on this rank.

        Returns:
            [m, n] in the model's dtype, contiguous, on the device.
        """
        start = self._offsets[index]
        stored = quantized.quantized_weight(self._layer)
        if stored is not None and self._is_fp8:
            return quantized.dequantized(*stored, rows + start, cols, self._dtype)
        weight = self._full()
        part = weight[start : start + self._sizes[index]]
        # A whole weight in its own order (HiRA) needs no copy.
        picked = part if _is_all(rows, part.shape[0]) else part.index_select(0, rows)
        return picked if _is_all(cols, part.shape[1]) else picked.index_select(1, cols)

    def close(self) -> None:
        """Give the recovered matrix back."""
        self._recovered = None

    def _full(self) -> Tensor:
        rows, columns = sum(self._sizes), self._columns
        if not quantized.is_quantized(self._layer):
            weight = getattr(self._layer, "weight", None)
            if isinstance(weight, Tensor) and tuple(weight.shape) == (rows, columns) and weight.device.type != "cpu":
                return weight.detach()
        if self._recovered is None:
            self._recovered = self._recover(rows, columns)
        return self._recovered

    @torch.inference_mode()
    def _recover(self, rows: int, columns: int) -> Tensor:
        device = next((p.device for p in self._layer.parameters()), torch.device("cpu"))
        recovered = torch.empty(rows, columns, dtype=self._dtype, device=device)
        for start in range(0, columns, CHUNK_COLUMNS):
            end = min(start + CHUNK_COLUMNS, columns)
            unit = torch.zeros(end - start, columns, dtype=self._dtype, device=device)
            unit[torch.arange(end - start), torch.arange(start, end)] = 1
            product = self._layer.quant_method.apply(self._layer, unit, None)
            if product.shape != (end - start, rows):
                raise BaseModelError(
                    f"a base layer of {rows}x{columns} gave {tuple(product.shape)} for {end - start} unit vectors"
                )
            recovered[:, start:end] = product.t()
        return recovered


def _is_all(index: Tensor, size: int) -> bool:
    """Whether an index takes everything in order."""
    return index.numel() == size and bool(torch.equal(index, torch.arange(size, device=index.device)))
