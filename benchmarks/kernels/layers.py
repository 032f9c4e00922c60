"""Copies of a random layer with all its adapters, laid out for every candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from smoa_kernels import LayerBank, SliceUpdate
from smoa_kernels.testing import random_blocks, random_update
from torch import Tensor

from benchmarks.kernels.cases import LayerShape
from benchmarks.kernels.plain import PlainSlice

# As in a model, each call meets another layer's weights. The candidates together read several times this much between
# two uses of a copy: more than a last-level cache holds.
COLD_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
MOST_COPIES = 24


@dataclass(frozen=True, eq=False)
class LayerCopy:
    """One copy.

    Attributes:
        weight: [H_out, H_in], the slices one below the other.
        banks: by implementation, with equal content.
        plain: per slice, for the plain ways; the same content again.
    """

    weight: Tensor
    banks: dict[str, LayerBank]
    plain: list[PlainSlice]


@dataclass(frozen=True, eq=False)
class LayerSet:
    """A layer's copies, all with the same numbers.

    Attributes:
        shape, rank, blocks: what was built.
        updates: per slot, per slice; in float32.
        copies: at least two.
    """

    shape: LayerShape
    rank: int
    blocks: int
    updates: list[list[SliceUpdate]]
    copies: list[LayerCopy]

    @cached_property
    def whole_banks(self) -> list[LayerBank]:
        """Of each copy one that keeps its blocks inside the whole weight: for one pass, where the backend can."""
        slices, best = list(self.shape.slices), next(iter(self.copies[0].banks))
        return [
            _bank(self.shape, torch.split(copy.weight, slices), self.updates, best, whole=True) for copy in self.copies
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.copies[0].weight.dtype

    @property
    def device(self) -> torch.device:
        """Of everything that is measured."""
        return self.copies[0].weight.device


def build_layers(
    shape: LayerShape,
    rank: int,
    blocks: int,
    *,
    slots: int,
    implementations: Sequence[str],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    num_copies: int | None = None,
) -> LayerSet:
    """A layer with Gaussian weights of scale 1 / sqrt(H_in) and `slots` adapters of (r, K) = (rank, blocks).

    Args:
        shape: the layer; K divides its sizes.
        rank: total rank; blocks: K.
        slots: adapters in every bank.
        implementations: one bank each.
        device: where it is measured.
        dtype: of weights, factors and activations.
        num_copies: None = as many as keep the caches cold.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, shape.h_in, generator=generator) / shape.h_in**0.5 for size in shape.slices]
    cols = random_blocks(shape.h_in, blocks, generator)
    rows = [random_blocks(size, blocks, generator) for size in shape.slices]
    ranks = [rank // blocks] * blocks
    updates = [[random_update(row, cols, ranks, generator) for row in rows] for _ in range(slots)]
    weight = torch.cat(weights).to(device, dtype)
    wanted = -(-COLD_BYTES[device.type] // weight.nbytes)
    copies = [
        _copy(shape, weight.clone(), updates, implementations)
        for _ in range(num_copies or max(2, min(MOST_COPIES, wanted)))
    ]
    return LayerSet(shape, rank, blocks, updates, copies)


def _copy(
    shape: LayerShape, weight: Tensor, updates: list[list[SliceUpdate]], implementations: Sequence[str]
) -> LayerCopy:
    parts = torch.split(weight, list(shape.slices))
    banks = {name: _bank(shape, parts, updates, name) for name in implementations}
    return LayerCopy(weight, banks, _plain(shape, parts, updates))


def _bank(
    shape: LayerShape,
    parts: Sequence[Tensor],
    updates: list[list[SliceUpdate]],
    implementation: str,
    whole: bool = False,
) -> LayerBank:
    max_rank = updates[0][0].a.shape[0]
    bank = LayerBank(
        a=[part.new_zeros(len(updates), max_rank, shape.h_in) for part in parts],
        b=[part.new_zeros(len(updates), max_rank, len(part)) for part in parts],
        weight_block=lambda index, rows, cols: parts[index][rows][:, cols],
        implementation=implementation,
        whole=whole,
    )
    for slot, update in enumerate(updates):
        bank.set(slot, update)
    return bank


def _plain(shape: LayerShape, parts: Sequence[Tensor], updates: list[list[SliceUpdate]]) -> list[PlainSlice]:
    slices, offset = [], 0
    for index, part in enumerate(parts):
        first = updates[0][index]
        blocks = int(first.row_block.max()) + 1
        rows, cols = (torch.argsort(ids, stable=True).to(part.device) for ids in (first.row_block, first.col_block))
        m, n = shape.slices[index] // blocks, shape.h_in // blocks
        weight = part[rows].view(blocks, m, shape.h_in)
        weight = torch.stack([weight[k][:, cols[k * n : (k + 1) * n]] for k in range(blocks)])
        a = torch.stack([update[index].a for update in updates]).to(part)[:, :, cols]
        b = torch.stack([update[index].b.T * update[index].scaling for update in updates]).to(part)[:, :, rows]
        slices.append(
            PlainSlice(
                weight, a.view(*a.shape[:2], blocks, n), b.view(*b.shape[:2], blocks, m), cols, rows.argsort(), offset
            )
        )
        offset += shape.slices[index]
    return slices
