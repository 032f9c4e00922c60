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
        return torch.split(self.weight, list(self.shape.slices))

    @cached_property
    def plain(self) -> list[PlainSlice]:
        """Per slice, for the plain ways; the same content again."""
        bank, found, offset = next(iter(self.banks.values())), [], 0
        for entry, sorted_a, sorted_b in zip(bank.slots[0], bank.a, bank.b, strict=True):
            assert entry is not None, "every adapter changes every slice"
            part = entry.partition
            weight = torch.stack([part.store.block(k) for k in range(len(part.blocks))])
            a, b = (factors.unflatten(2, (len(weight), -1)).clone() for factors in (sorted_a, sorted_b))
            found.append(PlainSlice(weight, a, b, part.col_order, part.row_inverse, offset))
            offset += sorted_b.shape[2]
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
