"""Deltas of a mixed batch of SMoA and HiRA adapters."""

from smoa_kernels.backend import Backend, available_implementations, default_implementation
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.fp8 import FP8, dequantized, picked
from smoa_kernels.blocks.source import WeightBlock
from smoa_kernels.cost import DEFAULT_COST, CostModel
from smoa_kernels.errors import ImplementationError, KernelError, PlanError, ShapeError, SlotError
from smoa_kernels.ops import can_be_one_pass, smoa_delta, smoa_linear
from smoa_kernels.plan import StepPlan
from smoa_kernels.residents import MergedBlock
from smoa_kernels.update import SliceUpdate

__all__ = [
    "DEFAULT_COST",
    "FP8",
    "Backend",
    "CostModel",
    "ImplementationError",
    "KernelError",
    "LayerBank",
    "MergedBlock",
    "PlanError",
    "ShapeError",
    "SliceUpdate",
    "SlotError",
    "StepPlan",
    "WeightBlock",
    "available_implementations",
    "can_be_one_pass",
    "default_implementation",
    "dequantized",
    "picked",
    "smoa_delta",
    "smoa_linear",
]
