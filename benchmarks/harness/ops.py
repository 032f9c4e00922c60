"""The operations under measurement: the only imports of smoa_kernels in the benchmarks."""
# ruff: noqa: F401

from smoa_kernels import LayerBank, SliceUpdate, StepPlan, available_implementations
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT, CostModel, Way, default_cost
from smoa_kernels.ops import can_be_one_pass, smoa_delta, smoa_linear
from smoa_kernels.testing import TOLERANCES, WORKLOADS, random_blocks, random_update, workload
from smoa_kernels.tuned import CostFileError, TunedCost, cost_file, device_name, store_costs
