"""What is put into a slot, and the checks of it and of the storage it goes into."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoa_kernels.errors import ShapeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class SliceUpdate:
    """One slice's update in the layer's own coordinates.

    `dW[i, j] = scaling * [row_block[i] == col_block[j]] * (b @ a)[i, j] * W[i, j]`.

    Attributes:
        a: [R, H_in], any float dtype and device; rows at and above the rank of column j's block are zero at j.
        b: [H_out, R], likewise for rows.
        row_block: [H_out] int16 block ids; col_block: [H_in] int16. Ids without a counterpart contribute nothing.
        scaling: folded into b in fp32, before the cast to model dtype.
    """

    a: Tensor
    b: Tensor
    row_block: Tensor
    col_block: Tensor
    scaling: float


def update_reasons(
    updates: Sequence[SliceUpdate | None], *, h_in: int, slices: Sequence[int], max_rank: int
) -> list[str]:
    """Every reason why updates do not fit a layer of these sizes; empty when they do."""
    if len(updates) != len(slices):
        return [f"there are {len(updates)} updates; the layer has {len(slices)} slices, give None for the others."]
    reasons = []
    for index, (update, h_out) in enumerate(zip(updates, slices, strict=True)):
        if update is not None:
            reasons += [f"slice {index}: {reason}" for reason in _slice_reasons(update, h_in, h_out, max_rank)]
    return reasons


def _slice_reasons(update: SliceUpdate, h_in: int, h_out: int, max_rank: int) -> list[str]:
    reasons = []
    if update.a.ndim != 2 or update.a.shape[1] != h_in:
        reasons.append(f"a is {tuple(update.a.shape)}; allowed is [rank, {h_in}].")
    if update.b.ndim != 2 or update.b.shape[0] != h_out:
        reasons.append(f"b is {tuple(update.b.shape)}; allowed is [{h_out}, rank].")
    if update.a.ndim == update.b.ndim == 2 and update.a.shape[0] != update.b.shape[1]:
        reasons.append(f"a has rank {update.a.shape[0]} and b has rank {update.b.shape[1]}; they must be equal.")
    if update.a.ndim == 2 and update.a.shape[0] > max_rank:
        reasons.append(f"rank {update.a.shape[0]} is above {max_rank}, the rank of the slots; make them larger.")
    for name, ids, size in (("row_block", update.row_block, h_out), ("col_block", update.col_block, h_in)):
        if ids.shape != (size,) or ids.dtype != torch.int16:
            reasons.append(f"{name} is {tuple(ids.shape)} {ids.dtype}; allowed is [{size}] torch.int16.")
    for name, factor in (("a", update.a), ("b", update.b)):
        if not factor.dtype.is_floating_point:
            reasons.append(f"{name} is {factor.dtype}; allowed is any floating-point dtype.")
    return reasons


def check_storage(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Refuses storages of a layer that do not fit together.

    Raises:
        ShapeError: with every reason.
    """
    if not a or len(a) != len(b):
        raise ShapeError("the layer's storage", [f"there are {len(a)} a and {len(b)} b; give one of each per slice."])
    reasons = []
    first = a[0]
    for index, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        if a_i.ndim != 3 or a_i.shape != first.shape or min(a_i.shape) < 1:
            reasons.append(f"a[{index}] is {tuple(a_i.shape)}; allowed is one [S, R, H_in] for all slices.")
        if b_i.ndim != 3 or b_i.shape[:2] != first.shape[:2] or b_i.shape[2] < 1:
            reasons.append(f"b[{index}] is {tuple(b_i.shape)}; allowed is [S, R, H_out] with the S and R of a.")
        for name, storage in (("a", a_i), ("b", b_i)):
            if storage.dtype not in DTYPES or storage.dtype != first.dtype or storage.device != first.device:
                reasons.append(
                    f"{name}[{index}] is {storage.dtype} on {storage.device}; allowed is one of float32, bfloat16 and "
                    "float16, the same for all, on one device."
                )
            if not storage.is_contiguous():
                reasons.append(f"{name}[{index}] is not contiguous; give contiguous memory (a view of it is fine).")
    if reasons:
        raise ShapeError("the layer's storage", reasons)
