"""What is lost of an update when it is rounded into a weight: in bfloat16 every change below 2**-9 of a weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_SHOWN = 5  # layers that a refusal names


@dataclass
class Lost:
    """Of one layer, summed over its parts.

    Attributes:
        removed_square: squared norm of what rounding removes.
        update_square: squared norm of the update.
    """

    removed_square: float = 0.0
    update_square: float = 0.0

    def add(self, update: Tensor, kept: Tensor) -> None:
        """One part: the update in float32, and what the rounded weight holds of it."""
        self.update_square += float(update.square().sum())
        self.removed_square += float((update - kept).square().sum())

    @property
    def share(self) -> float:
        """Norm of what is removed over the norm of the update."""
        if not math.isfinite(self.removed_square):
            return math.nan
        return (self.removed_square / self.update_square) ** 0.5 if self.update_square else 0.0


def too_much_lost(lost: Mapping[str, float], allowed: float | None, remedy: str) -> list[str]:
    """Why rounding forbids a merge, with the worst layers; empty when it does not.

    A loss that is no number (NaN or Inf) always does: the merged weight is none either.

    Args:
        lost: layer -> share of its update that is lost.
        allowed: largest share; None = any that is a number.
        remedy: what to do instead.
    """
    broken = [name for name, share in lost.items() if not math.isfinite(share)]
    if broken:
        others = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        what = f"the merged weights of {len(broken)} of {len(lost)} layers would not be finite (NaN or Inf)"
        return [f"{what}: {', '.join(broken[:_SHOWN])}{others}; {remedy}"]
    if allowed is None:
        return []
    over = sorted(((share, name) for name, share in lost.items() if not share <= allowed), reverse=True)
    if not over:
        return []
    return [
        f"rounding to the weights' dtype would remove more than {allowed:.1%} of the update in {len(over)} of "
        f"{len(lost)} layers; {remedy}",
        *(f"{name} would lose {share:.1%}" for share, name in over[:_SHOWN]),
    ]
