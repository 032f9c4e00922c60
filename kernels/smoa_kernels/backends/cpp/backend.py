"""The C++ kernel as a backend."""

import torch

from smoa_kernels.backend import Backend
from smoa_kernels.backends.cpp import build
from smoa_kernels.backends.cpp.launch import smoa_delta_cpp, smoa_linear_cpp
from smoa_kernels.backends.cpp.packed import PackedBlocks
from smoa_kernels.blocks.layout import BlockStore, Tensors
from smoa_kernels.cost import CostModel

# Measured as `cost.DEFAULT_COST` was.
CPP_COST = CostModel(form=7.0, form_per_rank=1.25, resident=9.0)
# Likewise, where the tile unit multiplies: rows cost little beside forming and reading. `beside` by steps of 80 to
# 1,024 tokens, K = 4: in one pass they took 0.9 to 1.3 times the base product's time; on merged weights that time, and
# what 40 tokens take, and 1.1 for each token of others.
TILES_COST = CostModel(form=12.0, form_per_rank=9.0, resident=40.0, beside=0.15)


class CppBackend(Backend):
    """CPUs with AVX2 or better."""

    name = "cpp"
    keeps_whole = True
    delta = staticmethod(smoa_delta_cpp)
    linear = staticmethod(smoa_linear_cpp)

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """It builds the kernel at need."""
        return build.unavailable_reason(device_type, dtype)

    def pack(
        self, blocks: Tensors, dtype: torch.dtype, scales: Tensors = (), whole: Tensors | None = None
    ) -> BlockStore:
        """Panels of 16 rows."""
        return PackedBlocks(blocks, whole)

    def cost(self, device: torch.device, dtype: torch.dtype) -> CostModel:
        """By the unit that multiplies."""
        return TILES_COST if self.why_not(device.type, dtype) is None and build.uses_tiles(dtype) else CPP_COST


BACKEND = CppBackend()
