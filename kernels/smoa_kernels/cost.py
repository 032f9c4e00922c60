"""Which way serves an adapter group: expand, modulate or resident. All are exact; the constants decide about speed.

The unit is one token's row through the blocks' GEMM. Expand takes a row per token and rank, modulate forms W * BA once
and then takes a row per token, resident reads the adapter's own blocks of dW and takes a row per token.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from smoa_kernels.backend import backends
from smoa_kernels.tuned import CostFileError, TunedCost, cost_file, device_name, read_costs

logger = logging.getLogger(__name__)

Way = Literal["expand", "modulate", "resident"]


@dataclass(frozen=True)
class CostModel:
    """Fixed costs of a group, in GEMM rows.

    Attributes:
        form: of forming the modulated blocks: the part that does not depend on the rank (passes over the block, launch
            overhead).
        form_per_rank: of forming them: the part per live rank of the adapter.
        resident: of reading an adapter's own blocks instead of those that all adapters share.
        beside: what a group costs in one pass with the base product, as a share of what it costs apart.
    """

    form: float
    form_per_rank: float
    resident: float
    beside: float = 1.0

    def way(self, tokens: int, rank: int, has_resident: bool) -> Way:
        """The cheapest way for `tokens` tokens of one adapter of this live rank.

        Args:
            tokens: tokens of the adapter in the step.
            rank: live rank; 0 = only its resident blocks count.
            has_resident: whether blocks of dW are held for it.
        """
        if has_resident and rank == 0:
            return "resident"
        if has_resident and tokens + self.resident < self.rows(tokens, rank):
            return "resident"
        return "modulate" if self._modulate(tokens, rank) < tokens * rank else "expand"

    def rows(self, tokens: float, rank: int) -> float:
        """What the cheaper of expand and modulate costs."""
        return min(tokens * rank, self._modulate(tokens, rank))

    def _modulate(self, tokens: float, rank: int) -> float:
        return tokens + self.form + self.form_per_rank * rank


# Of plain torch operations, by `python -m benchmarks tune` on two AVX512-BF16 cores: bf16, layers from 896 to 4864,
# K = 2 to 8, r_k = 2 to 16.
DEFAULT_COST = CostModel(form=60.0, form_per_rank=3.0, resident=7.0)
# For tests and measurements: one way for every group. Resident needs the group's blocks, others then expand.
ALWAYS_EXPAND = CostModel(form=float("inf"), form_per_rank=0.0, resident=float("inf"))
ALWAYS_MODULATE = CostModel(form=float("-inf"), form_per_rank=0.0, resident=float("inf"))
ALWAYS_RESIDENT = CostModel(form=float("inf"), form_per_rank=0.0, resident=float("-inf"))


def cost_model(implementation: str, device: torch.device, dtype: torch.dtype) -> CostModel:
    """The constants of a backend on this device: those measured here, else its own.

    Args:
        implementation: name of the backend.
        device: where it runs; on a CPU the number of threads that torch uses now counts too.
        dtype: of the model.

    Returns:
        The same object for the life of the process: a file that changes later is not read again. One that cannot be
        read is named once in the log, and the defaults hold.
    """
    return _cost_model(implementation, device, dtype, torch.get_num_threads() if device.type == "cpu" else None)


@cache
def _cost_model(implementation: str, device: torch.device, dtype: torch.dtype, threads: int | None) -> CostModel:
    wanted = (device_name(device), implementation, str(dtype).removeprefix("torch."), threads)
    for cost in _stored():
        if cost.key == wanted:
            beside = default_cost(implementation, device, dtype).beside  # not measured by `tune`
            return CostModel(cost.form, cost.form_per_rank, cost.resident, beside)
    return default_cost(implementation, device, dtype)


def default_cost(implementation: str, device: torch.device, dtype: torch.dtype) -> CostModel:
    """The constants where nothing was measured."""
    return backends()[implementation].cost(device, dtype)


@cache
def _stored() -> tuple[TunedCost, ...]:
    try:
        return tuple(read_costs(cost_file()))
    except CostFileError as error:
        logger.error("%s", error)
        return ()
