"""Deltas of a mixed batch of SMoA and HiRA adapters."""

from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.source import WeightBlock
from smoa_kernels.errors import ImplementationError, KernelError, PlanError, ShapeError, SlotError
from smoa_kernels.ops import available_implementations, default_implementation, smoa_delta
from smoa_kernels.plan import StepPlan
from smoa_kernels.update import SliceUpdate

__all__ = [
    "ImplementationError",
    "KernelError",
    "LayerBank",
    "PlanError",
    "ShapeError",
    "SliceUpdate",
    "SlotError",
    "StepPlan",
    "WeightBlock",
    "available_implementations",
    "default_implementation",
    "smoa_delta",
]
