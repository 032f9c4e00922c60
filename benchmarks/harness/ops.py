"""The operations under measurement: the only imports of smoa_kernels in the benchmarks."""
# ruff: noqa: F401

from typing import Any

from smoa_kernels import LayerBank, SliceUpdate, StepPlan, available_implementations, smoa_delta
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT, CostModel, Way, cost_model, default_cost
from smoa_kernels.cpp_ops import smoa_delta_cpp, smoa_linear_cpp
from smoa_kernels.reference import smoa_delta_reference
from smoa_kernels.testing import TOLERANCES, WORKLOADS, random_blocks, random_update, workload
from smoa_kernels.torch_ops import smoa_delta_torch
from smoa_kernels.tuned import CostFileError, TunedCost, cost_file, device_name, store_costs


def gpu_single_pass() -> Any:
    """The module of the GPU's single pass; it needs Triton."""
    from smoa_kernels import single_pass

    return single_pass
