"""Spectral order of a weight: as the published code derives it (float32 SVD), and in float64 as a check.

The order is not stored in published adapter files although their factors are indexed by it: how well it is determined
decides how exactly such an adapter can be served.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENERGY_FLOOR = 1.1920929e-7  # below this a coordinate has no energy worth a score; the published constant


@dataclass(frozen=True, eq=False)
class SpectralOrder:
    """The order of one weight's coordinates, and the same from float64.

    Attributes:
        rows: [H_out] int64, position → output coordinate, from the float32 SVD: what training used.
        cols: [H_in] int64, likewise for input coordinates.
        rows64: [H_out] int64, from float64.
        cols64: [H_in] int64, from float64.
    """

    rows: Tensor
    cols: Tensor
    rows64: Tensor
    cols64: Tensor

    @property
    def misplaced_rows(self) -> float:
        """f_r: share of row positions on which float32 and float64 disagree."""
        return _misplaced(self.rows, self.rows64)

    @property
    def misplaced_cols(self) -> float:
        """f_c: share of column positions on which float32 and float64 disagree."""
        return _misplaced(self.cols, self.cols64)

    @property
    def order_error(self) -> float:
        """Expected relative error of an update that is served by a recomputed order: sqrt(2 (f_r + f_c))."""
        return math.sqrt(2 * (self.misplaced_rows + self.misplaced_cols))


def spectral_order(weight: Tensor, *, check_device: str = "cpu") -> SpectralOrder:
    """Both orders of a weight.

    Args:
        weight: [H_out, H_in], in the dtype it had when the adapter was created.
        check_device: where the float64 side runs. The float32 side always runs on the CPU, as at training: another
            library would give another order.

    Source: arXiv 2605.21147; the float64 side from the Gram matrix, identical to a float64 SVD up to 14336 × 4096.
    """
    rows, cols = scores_float32(weight)
    rows64, cols64 = scores_float64(weight, device=check_device)
    return SpectralOrder(
        torch.argsort(rows), torch.argsort(cols), torch.argsort(rows64).cpu(), torch.argsort(cols64).cpu()
    )


def scores_float32(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral scores as published: thin float32 SVD on the CPU.

    Args:
        weight: [H_out, H_in].

    Returns:
        [H_out] and [H_in] float32.
    """
    u, sigma, vh = torch.linalg.svd(weight.detach().cpu().float(), full_matrices=False)
    return _scores(u.pow(2) * sigma.pow(2)), _scores(vh.t().pow(2) * sigma.pow(2))


def scores_float64(weight: Tensor, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Spectral scores from a float64 eigendecomposition of the Gram matrix on the smaller side.

    Args:
        weight: [H_out, H_in].
        device: where to compute.

    Returns:
        [H_out] and [H_in] float64, on `device`.
    """
    w = weight.detach().to(device=device, dtype=torch.float64)
    wide = w.shape[0] < w.shape[1]
    tall = w.t() if wide else w  # [large, small]
    lam, v = torch.linalg.eigh(tall.t() @ tall)  # ascending
    lam, v = lam.flip(0).clamp_min(0), v.flip(1)
    small = _scores(v.pow(2) * lam)
    large = _scores((tall @ v).pow(2))
    return (small, large) if wide else (large, small)


def even_ranks(rank: int, num_blocks: int) -> tuple[int, ...]:
    """`rank` split over blocks as evenly as possible; the first blocks get the remainder."""
    return tuple(rank // num_blocks + (k < rank % num_blocks) for k in range(num_blocks))


def block_pieces(order: Tensor, num_blocks: int) -> Sequence[Tensor]:
    """An order cut into K ordered pieces whose sizes differ by at most one, larger first."""
    return torch.tensor_split(order, num_blocks)


def _scores(energy: Tensor) -> Tensor:
    """Energy-weighted mean index of the singular direction; energy [n, directions] → [n]."""
    index = torch.arange(energy.shape[1], dtype=energy.dtype, device=energy.device)
    # This order of operations gives the published scores bit for bit.
    return (energy * index).sum(1) / energy.sum(1).clamp_min(ENERGY_FLOOR)


def _misplaced(order: Tensor, reference: Tensor) -> float:
    return float((order != reference).double().mean()) if order.numel() else 0.0
