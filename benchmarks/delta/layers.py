"""Copies of a random layer with all its adapters, laid out for every candidate."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.delta.cases import LayerShape
from benchmarks.harness import ops

DTYPE = torch.bfloat16
# As in a model, each call meets another layer's weights. The candidates together read several times this much between
# two uses of a copy: more than a last-level cache holds.
COLD_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
MOST_COPIES = 24


class PlainSlice(NamedTuple):
    """One slice in sorted order, with the factors of all adapters, for the plain ways."""

    weight: Tensor  # [K, m, n] blocks of W
    a: Tensor  # [S, R, K, n]
    b: Tensor  # [S, R, K, m], scaling included
    cols: Tensor  # [H_in] int64, native column at each sorted position
    inverse: Tensor  # [H_out] int64, sorted position of each native row
    offset: int  # first column of y


@dataclass(frozen=True, eq=False)
class LayerCopy:
    """One of several copies with the same numbers."""

    shape: LayerShape
    weight: Tensor  # [H_out, H_in], the slices one below the other
    updates: list[list[ops.SliceUpdate]]  # per slot, per slice; in float32
    banks: dict[str, ops.LayerBank]  # by implementation, with equal content

    @cached_property
    def slices(self) -> tuple[Tensor, ...]:
        """The weight of each slice."""
        return torch.split(self.weight, list(self.shape.slices))

    @cached_property
    def plain(self) -> list[PlainSlice]:
        """Per slice, for the plain ways; the same content again."""
        found, offset = [], 0
        for index, part in enumerate(self.slices):
            first = self.updates[0][index]
            blocks = int(first.row_block.max()) + 1
            rows, cols = (torch.argsort(ids, stable=True).to(part.device) for ids in (first.row_block, first.col_block))
            m, n = len(part) // blocks, self.shape.h_in // blocks
            weight = part[rows].view(blocks, m, self.shape.h_in)
            weight = torch.stack([weight[k][:, cols[k * n : (k + 1) * n]] for k in range(blocks)])
            a = torch.stack([update[index].a for update in self.updates]).to(part)[:, :, cols]
            b = torch.stack([update[index].b.T * update[index].scaling for update in self.updates]).to(part)[:, :, rows]
            a, b = a.view(*a.shape[:2], blocks, n), b.view(*b.shape[:2], blocks, m)
            found.append(PlainSlice(weight, a, b, cols, rows.argsort(), offset))
            offset += len(part)
        return found

    @cached_property
    def whole_bank(self) -> ops.LayerBank:
        """One that keeps its blocks inside the whole weight: for one pass, where the first implementation can."""
        return _bank(self.slices, self.updates, next(iter(self.banks)), whole=True)


def build_layers(
    shape: LayerShape,
    rank: int,
    blocks: int,
    *,
    slots: int,
    implementations: Sequence[str],
    device: torch.device,
    num_copies: int | None = None,
) -> list[LayerCopy]:
    """A layer with Gaussian weights of scale 1 / sqrt(H_in) and `slots` adapters of (r, K) = (rank, blocks), in a bank
    of each implementation. K divides its sizes; by default there are as many copies as keep the caches cold."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, shape.h_in, generator=generator) / shape.h_in**0.5 for size in shape.slices]
    cols = ops.random_blocks(shape.h_in, blocks, generator)
    rows = [ops.random_blocks(size, blocks, generator) for size in shape.slices]
    ranks = [rank // blocks] * blocks
    updates = [[ops.random_update(row, cols, ranks, generator) for row in rows] for _ in range(slots)]
    weight = torch.cat(weights).to(device, DTYPE)
    cold = max(2, min(MOST_COPIES, -(-COLD_BYTES[device.type] // weight.nbytes)))
    copies = [LayerCopy(shape, weight.clone(), updates, {}) for _ in range(num_copies or cold)]
    for copy in copies:
        copy.banks.update({name: _bank(copy.slices, updates, name) for name in implementations})
    return copies


def _bank(
    slices: Sequence[Tensor], updates: list[list[ops.SliceUpdate]], implementation: str, whole: bool = False
) -> ops.LayerBank:
    max_rank = updates[0][0].a.shape[0]
    bank = ops.LayerBank(
        a=[part.new_zeros(len(updates), max_rank, part.shape[1]) for part in slices],
        b=[part.new_zeros(len(updates), max_rank, len(part)) for part in slices],
        weight_block=lambda index, rows, cols: slices[index][rows][:, cols],
        implementation=implementation,
        whole=whole,
    )
    for slot, update in enumerate(updates):
        bank.set(slot, update)
    return bank
