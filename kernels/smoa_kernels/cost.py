"""Which way serves an adapter group: expand (a row per token and rank) or modulate (form W * BA once, a row per token).

The unit is one token's row through the blocks' GEMM. Both ways are exact; the constants only decide about speed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Cost of forming the modulated blocks once, in GEMM rows: form + form_per_rank * rank.

    Attributes:
        form: fixed part (passes over the block, launch overhead).
        form_per_rank: part per live rank of the adapter.
    """

    form: float
    form_per_rank: float

    def modulates(self, tokens: int, rank: int) -> bool:
        """Whether `tokens` tokens of one adapter with this live rank are cheaper by modulating than by expanding."""
        return tokens + self.form + self.form_per_rank * rank < tokens * rank


# From the crossing points measured on AVX512-BF16 cores: bf16, layers of 896 and 4864, K = 4 and 8, r_k = 2 to 16.
TORCH_COST = CostModel(form=20.0, form_per_rank=5.5)
CPP_COST = CostModel(form=5.5, form_per_rank=1.25)
# For tests and measurements: one way for every group.
ALWAYS_EXPAND = CostModel(form=float("inf"), form_per_rank=0.0)
ALWAYS_MODULATE = CostModel(form=float("-inf"), form_per_rank=0.0)
