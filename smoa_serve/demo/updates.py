"""Weight updates that can be trained in plain torch: SMoA, HiRA and LoRA, as their formulas are written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..adapter import ModuleUpdate, WeightFingerprint
from ..spectral import block_pieces, even_ranks


class TrainableUpdate(ABC):
    """The update of one frozen weight.

    Attributes:
        a: [R, H_in], trained.
        b: [H_out, R], trained; zero at first.
    """

    def __init__(self, rank: int, shape: tuple[int, int]) -> None:
        rows, cols = shape
        self.a = torch.empty(rank, cols)
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.b = torch.zeros(rows, rank)

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer changes."""
        return [self.a.requires_grad_(), self.b.requires_grad_()]

    @abstractmethod
    def dense(self, weight: Tensor) -> Tensor:
        """The update as a matrix [H_out, H_in], with gradients to the factors."""


class LoraUpdate(TrainableUpdate):
    """`dW = s · B A`."""

    def __init__(self, rank: int, alpha: float, shape: tuple[int, int]) -> None:
        super().__init__(rank, shape)
        self.scaling = alpha / rank

    def dense(self, weight: Tensor) -> Tensor:
        """See TrainableUpdate."""
        return self.scaling * (self.b @ self.a)


class SmoaUpdate(TrainableUpdate):
    """`dW = s · (B A) ⊙ W` where the block ids agree; with one block this is HiRA.

    Args:
        rank: total rank r.
        num_blocks: K.
        alpha: lora_alpha; s = alpha / r.
        rows: [H_out], the spectral order of the output coordinates.
        cols: [H_in], likewise for the inputs.
    """

    def __init__(self, rank: int, num_blocks: int, alpha: float, rows: Tensor, cols: Tensor) -> None:
        self.branch_ranks = even_ranks(rank, num_blocks)
        super().__init__(max(self.branch_ranks), (rows.numel(), cols.numel()))
        self.scaling = alpha / rank
        self.row_block = block_ids(rows, num_blocks)
        self.col_block = block_ids(cols, num_blocks)
        # Narrower branches leave the last rows of the shared factor unused: zero there, and never trained.
        ranks = torch.tensor(self.branch_ranks)
        used = torch.arange(self.a.shape[0])[:, None] < ranks[self.col_block.long()]
        self.a *= used
        self._used_rows = torch.arange(self.a.shape[0]) < ranks[self.row_block.long()][:, None]
        self._used_cols = used
        self._same_block = self.row_block[:, None] == self.col_block[None, :]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(a, b) with zeros where a branch has no rank."""
        return self.a * self._used_cols, self.b * self._used_rows

    def dense(self, weight: Tensor) -> Tensor:
        """See TrainableUpdate."""
        a, b = self.factors()
        return self.scaling * (b @ a) * (weight * self._same_block)

    def finished(self, base: WeightFingerprint) -> ModuleUpdate:
        """The trained update in canonical form."""
        a, b = (factor.detach().clone() for factor in self.factors())
        return ModuleUpdate(a, b, self.row_block, self.col_block, self.branch_ranks, self.scaling, base)


def block_ids(order: Tensor, num_blocks: int) -> Tensor:
    """[H] int16: the block of each coordinate, from the spectral order (position → coordinate)."""
    ids = torch.empty(order.numel(), dtype=torch.int16)
    for k, piece in enumerate(block_pieces(order, num_blocks)):
        ids[piece] = k
    return ids


def updated_weights(weights: Mapping[str, Tensor], updates: Mapping[str, TrainableUpdate]) -> dict[str, Tensor]:
    """Parameter name → W + dW, for `torch.func.functional_call`."""
    return {f"{name}.weight": weights[name] + update.dense(weights[name]) for name, update in updates.items()}
