"""The update of one layer, block by block, with gradients and without a dense matrix of the layer's size.

Shape letters: T tokens; block k has m_k outputs, n_k inputs and rank r_k; R = max_k r_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Block:
    """Coordinates of one block that has an update.

    Attributes:
        rows: [m_k] int64, ascending.
        cols: [n_k] int64, ascending.
        rank: r_k.
    """

    rows: Tensor
    cols: Tensor
    rank: int

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A_k [r_k, n_k] and B_k [m_k, r_k] out of a [R, H_in] and b [H_out, R]."""
        return a[: self.rank].index_select(1, self.cols), b[:, : self.rank].index_select(0, self.rows)

    def weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W_k [m_k, n_k]."""
        return weight.index_select(0, self.rows).index_select(1, self.cols).to(dtype)

    def delta(self, a: Tensor, b: Tensor, weight: Tensor, scaling: float) -> Tensor:
        """The update [m_k, n_k], in the factors' dtype."""
        a_k, b_k = self.factors(a, b)
        return (b_k @ a_k).mul_(self.weight(weight, a.dtype)).mul_(scaling)


def blocks_of(row_block: Tensor, col_block: Tensor, ranks: Sequence[int]) -> tuple[Block, ...]:
    """The blocks that have a rank and coordinates.

    Args:
        row_block: [H_out], block id of each output coordinate.
        col_block: [H_in], likewise for inputs.
        ranks: r_k of each block.
    """
    row_ids, col_ids = row_block.long(), col_block.long()
    blocks = (
        Block((row_ids == k).nonzero().flatten(), (col_ids == k).nonzero().flatten(), rank)
        for k, rank in enumerate(ranks)
        if rank
    )
    return tuple(block for block in blocks if block.rows.numel() and block.cols.numel())


class _BlockUpdate(torch.autograd.Function):
    """Keeps x and the factors for the backward pass; W_k ⊙ (B_k A_k) is computed again there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, blocks: tuple[Block, ...], scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, weight)
        ctx.blocks, ctx.scaling = blocks, scaling
        y = x.new_zeros(x.shape[0], weight.shape[0])
        for block in blocks:
            delta = block.delta(a, b, weight, scaling).to(x.dtype)
            y.index_copy_(1, block.rows, x.index_select(1, block.cols) @ delta.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weight = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        grad_x = torch.zeros_like(x) if need_x else None
        grad_a = torch.zeros_like(a) if need_a else None
        grad_b = torch.zeros_like(b) if need_b else None
        for block in ctx.blocks:
            a_k, b_k = block.factors(a, b)
            weight_k = block.weight(weight, a.dtype).mul_(ctx.scaling)
            grad_k = grad.index_select(1, block.rows)  # [T, m_k]
            if grad_x is not None:
                delta = (b_k @ a_k).mul_(weight_k).to(x.dtype)
                grad_x.index_copy_(1, block.cols, grad_k @ delta)
            if need_a or need_b:
                product = (grad_k.t() @ x.index_select(1, block.cols)).to(a.dtype)  # of B_k A_k, [m_k, n_k]
                product.mul_(weight_k)
                if grad_a is not None:
                    grad_a[: block.rank].index_copy_(1, block.cols, b_k.t() @ product)
                if grad_b is not None:
                    grad_b[:, : block.rank].index_copy_(0, block.rows, product @ a_k.t())
        return grad_x, grad_a, grad_b, None, None, None


def block_update(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, blocks: tuple[Block, ...], scaling: float) -> Tensor:
    """The update's part of a layer's output.

    Semantics: `y = x dW^T`, `dW[i, j] = scaling * (b @ a)[i, j] * W[i, j]` where i and j share a block, else 0. The
    product is formed in the factors' dtype, the matrix product with x in x's. No gradient flows to `weight`.

    Args:
        x: [..., H_in].
        a: [R, H_in].
        b: [H_out, R].
        weight: [H_out, H_in], frozen; any strides.
        blocks: see `blocks_of`, on the same device.
        scaling: lora_alpha / r.

    Returns:
        [..., H_out], x's dtype.

    Source: arXiv 2605.21147, the branches of the update.
    """
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _BlockUpdate.apply(flat, a, b, weight, blocks, scaling)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])
