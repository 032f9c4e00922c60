"""The delta as one would write it first, with `torch.bmm`: what an implementation has to beat.

Blocks of equal size only. Each function adds the delta of one slice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlainSlice:
    """One slice with its blocks of W and the factors of all adapters, in sorted order.

    Attributes:
        weight: [K, m, n] blocks of W.
        a: [S, R, K, n].
        b: [S, R, K, m], scaling included.
        cols: [H_in] int64, native column at each sorted position.
        inverse: [H_out] int64, sorted position of each native row.
        offset: first column of y.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    cols: Tensor
    inverse: Tensor
    offset: int


def expand(y: Tensor, x: Tensor, layer: PlainSlice, tokens: Tensor, slots: Tensor) -> None:
    """`sum_rho b_rho * (W_k (a_rho * x_k))`: a row per token and rank, one batched product for all adapters.

    Args:
        y: [T, H_out] of the layer, written in place; x: [T, H_in].
        layer: the slice.
        tokens: [U] int64, rows with an adapter; slots: [U] int64, theirs.
    """
    blocks, m, n = layer.weight.shape
    ranks = layer.a.shape[1]
    rows = x[tokens][:, layer.cols].view(-1, 1, blocks, n) * layer.a[slots]  # [U, R, K, n]
    u = torch.bmm(rows.view(-1, blocks, n).transpose(0, 1), layer.weight.transpose(1, 2))  # [K, U * R, m]
    delta = (u.transpose(0, 1).view(-1, ranks, blocks, m) * layer.b[slots]).sum(1)  # [U, K, m]
    _add(y, delta.view(len(tokens), -1), layer, tokens)


def modulate(y: Tensor, x: Tensor, layer: PlainSlice, groups: list[tuple[int, Tensor]]) -> None:
    """`(W_k * (B_k A_k)) x_k`, one adapter after the other, all its blocks in one batched product.

    Args:
        y: [T, H_out] of the layer, written in place; x: [T, H_in].
        layer: the slice.
        groups: (slot, [t] int64 its tokens).
    """
    blocks, _, n = layer.weight.shape
    for slot, tokens in groups:
        a, b = layer.a[slot].transpose(0, 1), layer.b[slot].transpose(0, 1)  # [K, R, n], [K, R, m]
        modulated = torch.bmm(b.transpose(1, 2), a) * layer.weight  # [K, m, n]
        rows = x[tokens][:, layer.cols].view(-1, blocks, n).transpose(0, 1)  # [K, t, n]
        delta = torch.bmm(rows, modulated.transpose(1, 2)).transpose(0, 1)  # [t, K, m]
        _add(y, delta.reshape(len(tokens), -1), layer, tokens)


def _add(y: Tensor, delta: Tensor, layer: PlainSlice, tokens: Tensor) -> None:
    y[tokens, layer.offset : layer.offset + len(layer.inverse)] += delta[:, layer.inverse]
