"""Factors indexed by spectral position ↔ factors in the layer's own coordinates."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..base.fingerprint import WeightFingerprint
from ..base.spectral import block_pieces, even_ranks
from .config import PublishedConfig
from .keys import Slot, tensor_reasons
from .model import ModuleUpdate

Factors = Mapping[Slot, Tensor]


def canonical_update(
    factors: Factors,
    rows: Tensor,
    cols: Tensor,
    ranks: Sequence[int],
    scaling: float,
    *,
    base: WeightFingerprint | None = None,
    order_error: float = 0.0,
) -> ModuleUpdate:
    """Bring published factors into the layer's own coordinates.

    Args:
        factors: ("A", k) → [r_k, n_k], ("B", k) → [m_k, r_k], for blocks with r_k > 0.
        rows: [H_out] int64, position → output coordinate.
        cols: [H_in] int64, position → input coordinate.
        ranks: r_k of each block.
        scaling: lora_alpha / r.
        base: fingerprint of the base weight.
        order_error: expected relative error that comes from the order.
    """
    dtype = next((t.dtype for t in factors.values()), torch.float32)
    widest = max(ranks, default=0)
    a = torch.zeros(widest, cols.numel(), dtype=dtype)
    b = torch.zeros(rows.numel(), widest, dtype=dtype)
    row_block = torch.zeros(rows.numel(), dtype=torch.int16)
    col_block = torch.zeros(cols.numel(), dtype=torch.int16)
    pieces = zip(ranks, block_pieces(rows, len(ranks)), block_pieces(cols, len(ranks)), strict=True)
    for k, (rank, row_piece, col_piece) in enumerate(pieces):
        row_block[row_piece] = k
        col_block[col_piece] = k
        if rank:
            a[:rank, col_piece] = factors["A", k]
            b[row_piece, :rank] = factors["B", k]
    return ModuleUpdate(a, b, row_block, col_block, tuple(ranks), scaling, base, order_error)


def factor_reasons(name: str, factors: Factors, shape: tuple[int, int], ranks: Sequence[int]) -> list[str]:
    """Every way in which published factors do not fit a layer of shape (H_out, H_in) cut into len(ranks) blocks."""
    rows, cols = (piece_sizes(size, len(ranks)) for size in shape)
    expected: dict[Slot, tuple[int, int]] = {}
    for k, rank in enumerate(ranks):
        if rank:
            expected["A", k] = (rank, cols[k])
            expected["B", k] = (rows[k], rank)
    reasons = []
    for side, k in sorted(set(expected) | set(factors)):
        label = f"{name}.lora_{side}.{k}"
        if k >= len(ranks):
            reasons.append(f"{label} is there, but there are only {len(ranks)} blocks")
        elif (side, k) not in expected:
            reasons.append(f"{label} is there, but this block has rank 0")
        elif (side, k) not in factors:
            reasons.append(f"{label} is missing")
        else:
            reasons += tensor_reasons(label, factors[side, k], expected[side, k])
    if len({t.dtype for t in factors.values()}) > 1:
        reasons.append(f"{name}: the factors have several dtypes")
    return reasons


def piece_sizes(size: int, num_blocks: int) -> list[int]:
    """Sizes of the K pieces of `size` coordinates."""
    return [size // num_blocks + (k < size % num_blocks) for k in range(num_blocks)]


def branch_ranks(
    config: PublishedConfig, modules: Mapping[str, Factors], shapes: Mapping[str, tuple[int, int]]
) -> tuple[tuple[int, ...], list[str]]:
    """r_k of each block, by the configuration and, for what it leaves out, by the shapes of the factors.

    Args:
        config: published configuration.
        modules: module → factors.
        shapes: module → (H_out, H_in) of the base, for those of `modules` that the base has.

    Returns:
        The ranks, and why they cannot be told (then the ranks are empty).
    """
    if config.branch_ranks is not None:
        return tuple(config.branch_ranks), []
    if config.r is not None and config.num_blocks is not None:
        return even_ranks(config.r, config.num_blocks), []
    first = (factors.items() for factors in modules.values())
    found = {k: t.shape[0] for items in first for (side, k), t in items if side == "A" and t.dim() == 2}
    least = max(found, default=0) + 1
    largest = max((max(shape) for shape in shapes.values()), default=least)
    given = config.num_blocks
    possible = range(given, given + 1) if given else range(least, largest + 1)
    for name, shape in shapes.items():
        for slot, factor in modules[name].items():
            possible = _narrowed(possible, slot, factor, shape)
    if len(possible) != 1:
        what = f"{possible[0]} and {possible[1]} blocks fit" if possible else "no number of blocks fits"
        return (), [f"{what} the shapes of the factors; give r and num_blocks in the configuration"]
    ranks = tuple(found.get(k, 0) for k in range(possible[0]))
    if config.r is not None and sum(ranks) != config.r:
        return (), [f"the factors have a total rank of {sum(ranks)}, but r={config.r}"]
    return ranks, []


def _narrowed(counts: range, slot: Slot, factor: Tensor, shape: tuple[int, int]) -> range:
    """Those numbers of blocks K for which a factor has the length of its piece.

    Piece k of n coordinates has `n // K + (k < n % K)` of them. For one length these K lie side by side:
    where `n // K` is the length, `n % K <= k` holds from some K on, and where it is one less, `n % K > k` up to some K.
    """
    side, k = slot
    if factor.dim() != 2:
        return range(0)
    n, length = (shape[1], factor.shape[1]) if side == "A" else (shape[0], factor.shape[0])
    if length == 0:
        first, last = n + 1, counts.stop if k >= n else n
    elif length == 1:
        first, last = max(n // 2 + 1, n - k), counts.stop if k < n else n
    else:
        first = max(n // (length + 1) + 1, -((k - n) // length))
        last = max(n // length, min(n // (length - 1), -((k - n) // (length - 1)) - 1))
    return range(max(counts.start, first, k + 1), min(counts.stop, last + 1))
