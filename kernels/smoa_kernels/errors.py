"""Errors of the kernels. Each message says what was found, what is allowed and what to do; reasons are collected."""

from collections.abc import Sequence


class KernelError(Exception):
    """Base of all errors that this package raises on purpose."""


class ShapeError(KernelError, ValueError):
    """A tensor has a shape, dtype, device or layout that the layer cannot take.

    Args:
        what: the object that was refused.
        reasons: every reason found, one sentence each.
    """

    def __init__(self, what: str, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(f"{what} was refused:" + "".join(f"\n  - {reason}" for reason in self.reasons))


class SlotError(KernelError, ValueError):
    """A slot number lies outside the bank."""


class PlanError(KernelError, ValueError):
    """The token-to-slot map of a step does not fit the plan."""


class ImplementationError(KernelError, ValueError):
    """The implementation that was asked for does not exist or cannot run here."""
