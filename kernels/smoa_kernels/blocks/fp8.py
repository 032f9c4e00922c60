"""Base weights in fp8 with a scale per row: picking blocks of one, and what they stand for."""

import torch
from torch import Tensor

# The encoding that kernels may read as it is.
FP8 = torch.float8_e4m3fn


def picked(weight: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """weight[rows][:, cols] of an fp8 weight, for which indexing is not implemented: [m, n] fp8, a copy."""
    return weight.view(torch.uint8).index_select(0, rows).index_select(1, cols).view(weight.dtype)


def dequantized(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that [m, n] fp8 stands for, in `dtype`: the product in fp32, rounded once.

    Args:
        stored: [m, n] in any fp8 encoding.
        scale: [m] fp32, what each row is multiplied with.
        dtype: of the model.
    """
    return (stored.float() * scale[:, None]).to(dtype)
