"""Whether an adapter's numbers stay finite where they are served: factors and scale, in the dtype of the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .model import ModuleUpdate

_CHUNK_ROWS = 1024  # of a product that has to be looked at number by number
_FLOAT32_MAX = torch.finfo(torch.float32).max


def overflow_reasons(modules: Mapping[str, ModuleUpdate], dtype: torch.dtype = torch.float32) -> list[str]:
    """Every factor that is not finite as it is served, and every update that is not in float32.

    A slot holds A, and B times the scale: both are brought to float32, and then rounded to the model's dtype.

    Args:
        modules: module -> update, finite as stored.
        dtype: of the model.
    """
    return [reason for name, update in modules.items() for reason in _module_reasons(name, update, dtype)]


def _module_reasons(name: str, update: ModuleUpdate, dtype: torch.dtype) -> list[str]:
    a, b = _largest(update.a), _largest(update.b)
    scaled = b.float() * update.scaling
    where = str(dtype).removeprefix("torch.")
    reasons = []
    if not bool(a.float().to(dtype).isfinite()):
        reasons.append(f"{name}: A holds {float(a):.3g}, which is not finite in {where}")
    if not bool(scaled.to(dtype).isfinite()):
        what = f"B holds {float(b):.3g}, times the scale {update.scaling:.3g}"
        reasons.append(f"{name}: {what} it is not finite in {where}")
    if not reasons and not _product_is_finite(update):
        reasons.append(f"{name}: the product B A times the scale {update.scaling:.3g} is not finite in float32")
    return reasons


def _largest(factor: Tensor) -> Tensor:
    """Largest absolute value, in the factor's dtype: rounding keeps the order, so one number speaks for all."""
    return factor.abs().amax() if factor.numel() else torch.zeros((), dtype=factor.dtype)


def _product_is_finite(update: ModuleUpdate) -> bool:
    if not (update.a.numel() and update.b.numel()):
        return True
    bound = update.b.abs().amax(0).double() @ update.a.abs().amax(1).double() * abs(update.scaling)
    if float(bound) < _FLOAT32_MAX / 2:
        return True
    a, b = update.a.float(), update.b.float() * update.scaling
    for rows in range(0, b.shape[0], _CHUNK_ROWS):
        part = slice(rows, rows + _CHUNK_ROWS)
        same = update.row_block[part, None] == update.col_block[None, :]
        if not bool((b[part] @ a)[same].isfinite().all()):
            return False
    return True
