"""The base weight of a wrapped layer, as it is served on this rank."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from smoa_kernels import FP8, dequantized, picked
from torch import Tensor

from smoa_serve.engine import quantized
from smoa_serve.errors import BaseModelError

# Columns recovered at a time: bounds the identity matrix and its product, and how long a step waits when a weight is
# recovered between steps.
CHUNK_COLUMNS = 256


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

    Attributes:
        original: a block in which the layer serves its original weight, whatever it serves outside.
    """

    def __init__(self, base_layer: Any, slice_sizes: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
        self._layer = base_layer
        self.columns = columns
        self._offsets = [sum(slice_sizes[:index]) for index in range(len(slice_sizes))]
        self._sizes = slice_sizes
        self.dtype = dtype
        self._recovered: Tensor | None = None
        self.original: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of the whole weight of this rank in the model's dtype."""
        return sum(self._sizes) * self.columns * self.dtype.itemsize

    def refusal(self) -> str | None:
        """Why this layer's weight cannot be read exactly, None when it can."""
        if not quantized.is_quantized(self._layer) or self.is_fp8:
            return None
        return self._why_not_recoverable

    @cached_property
    def is_fp8(self) -> bool:
        """Whether it lies in the open in fp8, with one scale per tensor or row."""
        return quantized.is_readable_fp8(self._layer, self.columns, self.dtype)

    @cached_property
    def _why_not_recoverable(self) -> str | None:
        return quantized.why_not_recoverable(self._layer, self.columns, self.dtype)

    def block(self, index: int, rows: Tensor, cols: Tensor) -> Tensor:
        """W[rows][:, cols] of slice `index`.

        Args:
            index: which packed slice.
            rows: int64 [m], rows of that slice on this rank.
            cols: int64 [n], input columns on this rank.

        Returns:
            [m, n] in the model's dtype, contiguous, on the device; a copy.
        """
        start = self._offsets[index]
        stored = quantized.quantized_weight(self._layer)
        if stored is not None and self.is_fp8:
            weight, scale = stored
            rows = rows + start
            return dequantized(picked(weight, rows, cols), scale.index_select(0, rows), self.dtype)
        weight = self._full()
        part = weight[start : start + self._sizes[index]]
        # Always a copy, of a whole weight too (HiRA): another adapter may be merged into the weight itself later.
        return part.index_select(0, rows).index_select(1, cols)

    @property
    def is_kernel_fp8(self) -> bool:
        """Whether it `is_fp8` in the encoding that the kernels read."""
        stored = quantized.quantized_weight(self._layer)
        return stored is not None and stored[0].dtype is FP8 and self.is_fp8

    def fp8_block(self, index: int, rows: Tensor, cols: Tensor) -> Tensor:
        """Like `block`, of a weight that `is_kernel_fp8`: as it is stored, [m, n] float8_e4m3fn; see `row_scale`."""
        stored = quantized.quantized_weight(self._layer)
        assert stored is not None
        return picked(stored[0], rows + self._offsets[index], cols)

    def row_scale(self, index: int, rows: Tensor) -> Tensor:
        """What each row of `fp8_block` is multiplied with, [m] fp32."""
        stored = quantized.quantized_weight(self._layer)
        assert stored is not None
        return stored[1].index_select(0, rows + self._offsets[index])

    def reset_original(self) -> None:
        """What the layer serves is its original weight again."""
        self.original = nullcontext

    def close(self) -> None:
        """Give the recovered matrix back."""
        self._recovered = None

    def merge_refusal(self) -> str | None:
        """Why nothing can be merged into this weight, None when it can."""
        if quantized.is_quantized(self._layer):
            return "its weight is quantized, and merging would round the update to its few levels"
        return None

    def plain(self) -> Tensor | None:
        """The weight as the layer multiplies with it, [H_out, H_in], where it lies in the open; else None."""
        weight = getattr(self._layer, "weight", None)
        shape = (sum(self._sizes), self.columns)
        if quantized.is_quantized(self._layer) or not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
            return None
        return weight.detach()

    def whole(self) -> Tensor:
        """The whole weight of this rank, [H_out, H_in] in the model's dtype; valid until `close`."""
        return self._full()

    def recover(self) -> Iterator[None]:
        """Does the work of `whole` in pieces of a few milliseconds."""
        if self._recovered is None and self._visible() is None:
            recovered = torch.empty(sum(self._sizes), self.columns, dtype=self.dtype, device=self._device)
            for start in range(0, self.columns, CHUNK_COLUMNS):
                self._recover(recovered, start)
                yield
            self._recovered = recovered

    def _full(self) -> Tensor:
        weight = self._visible()
        if weight is not None:
            return weight
        for _ in self.recover():
            pass
        assert self._recovered is not None
        return self._recovered

    def _visible(self) -> Tensor | None:
        # While something is merged, what lies in the open is not the original; its own blocks are recovered then.
        weight = self.plain()
        return weight if weight is not None and self.original is nullcontext else None

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._layer.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def _recover(self, recovered: Tensor, start: int) -> None:
        """Columns of the weight from `start` on, a chunk of them."""
        rows, columns = recovered.shape
        end = min(start + CHUNK_COLUMNS, columns)
        unit = torch.zeros(end - start, columns, dtype=self.dtype, device=self._device)
        unit[torch.arange(end - start), torch.arange(start, end)] = 1
        with self.original():
            product = self._layer.quant_method.apply(self._layer, unit, None)
        if product.shape != (end - start, rows):
            raise BaseModelError(
                f"a base layer of {rows}x{columns} gave {tuple(product.shape)} for {end - start} unit vectors"
            )
        recovered[:, start:end] = product.t()
