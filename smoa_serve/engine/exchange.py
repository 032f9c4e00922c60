"""Exchanging a served base weight for a merged one and back, between engine steps and in place."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from smoa_kernels import MergedBlock
from torch import Tensor

from smoa_serve.engine.weights import ServedWeight

# Vectors whose products stand for a packed weight. As many as cost about what one costs: the weight is read once.
PROBES = 32
SUMMED_AT_ONCE = 1 << 22  # numbers, whose sums take four times a bf16 weight's memory


class WeightExchange(ABC):
    """One layer's weight: original or merged. The address that the model reads stays, whichever it holds.

    Attributes:
        nbytes: held beside the original while a merged weight is staged.
        free: switching takes no time, so that every step may run on the weight that suits it.
    """

    nbytes: int = 0
    free: bool = False

    def stage(self, blocks: Iterable[tuple[Tensor, MergedBlock]]) -> Iterator[None]:
        """Makes the merged weight, in pieces of a few milliseconds. Until `switch` the served weight is only read.

        Args:
            blocks: of `W + dW`, each after its rows [m] in the whole layer, slices one below the other.
        """
        yield from self._open()
        yield
        for rows, block in blocks:
            self._put(rows, block)
            yield
        self._pack()
        yield

    def _open(self) -> Iterator[None]:
        """Prepares for `_put`, in pieces."""
        return iter(())

    @abstractmethod
    def _put(self, rows: Tensor, block: MergedBlock) -> None:
        """Takes one of the blocks of `stage`."""

    @abstractmethod
    def _pack(self) -> None:
        """Makes what was put ready to be switched to."""

    @abstractmethod
    def switch(self) -> None:
        """Original to merged, or back: what a step waits for. When it raises, the weight is as it was."""

    @abstractmethod
    def undo(self) -> None:
        """Gives the staged weight back; the original has to be served."""

    @abstractmethod
    def checksum(self) -> bytes:
        """Of the weight as it is served now. What it proves is said where it is made."""


class HandlerExchange(WeightExchange):
    """vLLM's oneDNN layers keep a weight packed behind a handler, whose address stands in a tensor that every call
    reads, compiled or not. A second handler holds the merged weight; the two addresses change places. The packed
    original is never written, so un-merging is exact, and a switch copies eight bytes.

    Args:
        layer: vLLM's linear layer.
        handler: its `CPUDNNLGEMMHandler`.
        weight: reads the served weight.
    """

    free = True

    def __init__(self, layer: Any, handler: Any, weight: ServedWeight) -> None:
        self._layer, self._handler, self._weight = layer, handler, weight
        self._merged: Tensor | None = None
        self._other: Any = None

    def _open(self) -> Iterator[None]:
        """See the base class. Holds another weight of the layer's full size."""
        yield from self._weight.recover()
        # A copy: an adapter that is read meanwhile takes its blocks from the original.
        self._merged = self._weight.whole().clone()

    def _put(self, rows: Tensor, block: MergedBlock) -> None:
        assert self._merged is not None
        self._merged[rows[:, None], block.cols] = block.after

    def _pack(self) -> None:
        from vllm import _custom_ops as ops

        assert self._merged is not None
        self._weight.close()
        self._other = ops.create_onednn_mm(self._merged.t(), 32)
        self.nbytes, self._merged = self._merged.nbytes, None

    def switch(self) -> None:
        """See the base class. The addresses are swapped, not copied: each object frees the one it holds in the end."""
        ours, theirs = self._handler.handler_tensor, self._other.handler_tensor
        served = ours.item()
        ours.copy_(theirs)
        theirs.fill_(served)

    def undo(self) -> None:
        """See the base class."""
        self._merged, self._other, self.nbytes = None, None, 0

    def checksum(self) -> bytes:
        """Of the handler's address and of its products with fixed vectors, as a packed weight cannot be read.

        Proves that the handler in place is the one that was there, which un-merging has to bring about, and that it
        multiplies alike. Not that every bit of its memory is the same: of 200 single flipped bits in 1024x896 numbers
        it saw 196 in bf16 and 195 in fp32, the rest being low bits that rounding hides. Recovering every bit takes a
        product with the whole identity matrix, seconds of all steps for a large model.
        """
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(PROBES, self._weight.columns, generator=generator).to(self._weight.dtype)
        products = _digest(self._layer.quant_method.apply(self._layer, probes, None))
        return int(self._handler.handler_tensor.item()).to_bytes(8, "little", signed=True) + products


class PlainExchange(WeightExchange):
    """A weight that stands in memory as it is: the diagonal blocks are written in place, and come back from the bank's
    own pristine blocks.

    Args:
        weight: [H_out, H_in] of the packed layer; written in place.
    """

    def __init__(self, weight: Tensor) -> None:
        self._served = weight
        self._blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._merged = False

    def _put(self, rows: Tensor, block: MergedBlock) -> None:
        """See the base class. Holds the block and a copy of the one it replaces."""
        self._blocks.append((rows, block.cols, self._served[rows[:, None], block.cols], block.after))
        self.nbytes += 2 * block.after.nbytes

    def _pack(self) -> None:
        """Nothing is left to do."""

    def switch(self) -> None:
        """See the base class."""
        try:
            self._write(merged=not self._merged)
        except BaseException:
            self._write(merged=self._merged)
            raise
        self._merged = not self._merged

    def _write(self, *, merged: bool) -> None:
        for rows, cols, old, new in self._blocks:
            self._served[rows[:, None], cols] = new if merged else old

    def undo(self) -> None:
        """See the base class."""
        assert not self._merged
        self._blocks, self.nbytes = [], 0

    def checksum(self) -> bytes:
        """Of every bit of the weight."""
        return _digest(self._served)


def exchange_of(layer: Any, weight: ServedWeight) -> WeightExchange | str:
    """How a layer's weight can be exchanged, or why it cannot.

    Args:
        layer: vLLM's linear layer.
        weight: reads its weight.
    """
    refusal = weight.merge_refusal()
    if refusal is not None:
        return refusal
    cells = getattr(getattr(layer, "cpu_linear", None), "__closure__", None) or ()
    handlers = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "handler_tensor")]
    if len(handlers) == 1:
        return HandlerExchange(layer, handlers[0], weight)
    plain = weight.plain()
    if plain is not None and not cells:
        return PlainExchange(plain)
    return "its weight is packed in a form that cannot be exchanged; keep the adapter resident instead"


def _digest(tensor: Tensor) -> bytes:
    if tensor.device.type == "cpu":
        flat = tensor.detach().contiguous().view(torch.uint8)
        return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()
    return _sums_of_bits(tensor)  # on the device, where a copy to hash would cost more


def _sums_of_bits(tensor: Tensor) -> bytes:
    """The sum of all 16-bit pieces and one weighted by their places, exact in int64."""
    bits = tensor.detach().contiguous().view(torch.int16).flatten()
    totals = [0, 0]
    for start in range(0, bits.numel(), SUMMED_AT_ONCE):
        part = bits[start : start + SUMMED_AT_ONCE].long()
        place = torch.arange(start, start + part.numel(), device=bits.device) % 65521 + 1
        totals[0] += int(part.sum())
        totals[1] += int((part * place).sum())
    return b"".join(total.to_bytes(8, "little", signed=True) for total in totals)
