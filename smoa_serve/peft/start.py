"""Where an adapter starts: the spectral blocks of a weight and the first numbers of its factors."""

import logging
import math

import torch
from torch import Tensor, nn

from ..base.orders import OrderCache, Positions
from ..base.spectral import block_pieces, scores_float32, scores_float64

logger = logging.getLogger(__name__)

CACHED_FROM = 512  # smaller side; below it an order is computed in less time than it is worth keeping


def spectral_pieces(
    weight: Tensor, num_blocks: int, order: str, digest: str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Ordered coordinates of each block, rows and columns, on the CPU.

    Args:
        weight: [H_out, H_in].
        num_blocks: K.
        order: "gram": float64 scores, ties by coordinate; "published": float32 SVD on the CPU.
        digest: sha256 (hex) of the weight's bytes; large weights are then looked up in the order cache. Processes that
            start together wait for the one that computes.
    """
    if digest is None or min(weight.shape) < CACHED_FROM:
        positions = _positions(weight, order)
    else:
        layout = "n" if weight.is_contiguous() else "t"
        dtype = str(weight.dtype).removeprefix("torch.")
        key = f"{digest}-{dtype}-{weight.shape[0]}x{weight.shape[1]}{layout}-{order}"
        try:
            positions = OrderCache().get_positions(key, lambda: _positions(weight, order))
        except OSError as error:
            logger.warning("The order cache cannot be used, the order is computed without it: %s", error)
            positions = _positions(weight, order)
    rows, cols = (list(block_pieces(each, num_blocks)) for each in positions)
    return rows, cols


def _positions(weight: Tensor, order: str) -> Positions:
    """Position → coordinate, rows and columns."""
    if order == "published":
        rows, cols = (torch.argsort(scores) for scores in scores_float32(weight))
    else:
        device = weight.device if weight.device.type == "cuda" else "cpu"  # not every accelerator has float64
        rows, cols = (torch.argsort(s.cpu(), stable=True) for s in scores_float64(weight, device=str(device)))
    return rows, cols


def initial_factors(
    rows: list[Tensor], cols: list[Tensor], ranks: tuple[int, ...], *, random_b: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors of a new adapter: each branch's A kaiming-uniform as published, B zero (or drawn likewise).

    Returns:
        a [R, H_in] and b [H_out, R], float32.
    """
    widest = max(ranks, default=0)
    a = torch.zeros(widest, sum(piece.numel() for piece in cols))
    b = torch.zeros(sum(piece.numel() for piece in rows), widest)
    for row_piece, col_piece, rank in zip(rows, cols, ranks, strict=True):
        if rank and col_piece.numel():
            a[:rank, col_piece] = nn.init.kaiming_uniform_(torch.empty(rank, col_piece.numel()), a=math.sqrt(5))
            if random_b:
                b[row_piece, :rank] = nn.init.kaiming_uniform_(torch.empty(row_piece.numel(), rank), a=math.sqrt(5))
    return a, b


def block_ids(pieces: list[Tensor]) -> Tensor:
    """Block id of each coordinate, from the coordinates of each block."""
    ids = torch.zeros(sum(piece.numel() for piece in pieces), dtype=torch.int32)
    for k, piece in enumerate(pieces):
        ids[piece] = k
    return ids.to(id_dtype(len(pieces)))


def id_dtype(num_blocks: int) -> torch.dtype:
    """As in the portable format."""
    return torch.uint8 if num_blocks <= 256 else torch.uint16


def belongs(a: Tensor, b: Tensor, row_block: Tensor, col_block: Tensor, ranks: list[int]) -> bool:
    """Whether factors and block ids are those of branches of these ranks: as many blocks, nothing beyond a rank."""
    row_ids, col_ids = row_block.long(), col_block.long()
    for ids in (row_ids, col_ids):
        if ids.numel() and int(ids.max()) != min(len(ranks), ids.numel()) - 1:
            return False
    widths, index = torch.tensor(ranks, device=a.device), torch.arange(a.shape[0], device=a.device)
    beyond_a = index[:, None] >= widths[col_ids]
    beyond_b = index >= widths[row_ids][:, None]
    return not bool((beyond_a & (a != 0)).any() or (beyond_b & (b != 0)).any())
