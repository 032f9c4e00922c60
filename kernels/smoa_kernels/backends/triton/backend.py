"""The Triton kernels as a backend. Triton is imported where it is used: it is not there on every machine."""

import importlib.util
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from smoa_kernels.backend import Backend
from smoa_kernels.backends.triton.aligned import AlignedBlocks
from smoa_kernels.backends.triton.tables import TRITON_COST, LayerTables
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.layout import BlockStore, Tensors
from smoa_kernels.blocks.tables import MAX_BLOCKS, PASS_TOKENS
from smoa_kernels.cost import CostModel
from smoa_kernels.plan import StepPlan


class TritonBackend(Backend):
    """CUDA GPUs."""

    name = "triton"
    keeps_whole = True

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """It needs CUDA; for tests the interpreter of Triton."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device_type == "cuda":
            return None
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            # For tests: slow, and tl.dot is wrong for bfloat16 there.
            return "its interpreter takes float32 and float16 only" if dtype is torch.bfloat16 else None
        return f"it serves CUDA devices, not {device_type}"

    def why_not_blocks(self, count: int) -> str | None:
        """The grid of a launch is fixed."""
        return f"it has {count} blocks; on a GPU at most {MAX_BLOCKS} are allowed." if count > MAX_BLOCKS else None

    def reads_fp8(self, device: torch.device) -> bool:
        """From compute capability 8.9 on."""
        return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)

    def pack(
        self, blocks: Tensors, dtype: torch.dtype, scales: Tensors = (), whole: Tensors | None = None
    ) -> BlockStore:
        """Rows padded to whole vectors, and the whole weight likewise."""
        return AlignedBlocks(blocks, dtype, scales, whole)

    def cost(self, device: torch.device, dtype: torch.dtype) -> CostModel:
        """Not measured."""
        return TRITON_COST

    def attach_bank(self, bank: LayerBank) -> LayerTables:
        """Its device tables."""
        return LayerTables(bank)

    def attach_plan(self, plan: StepPlan, bank: LayerBank, captured: bool) -> None:
        """Scratch memory, and kernels that a capture must find loaded."""
        from smoa_kernels.backends.triton.launch import scratch_bytes, warm_up

        plan.cost = bank.cost
        plan.scratch(scratch_bytes(bank, plan.max_tokens))
        if captured:
            warm_up(bank, plan)

    def delta(self, y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan) -> None:
        """The plan's tables say which way each token goes."""
        from smoa_kernels.backends.triton.launch import smoa_delta_triton

        smoa_delta_triton(y, x, bank, plan)

    def linear_reasons(self, bank: LayerBank, plan: StepPlan) -> Iterable[str]:
        """All ranks of all tokens have to fit one tile, and come from factors."""
        if plan.num_tokens > PASS_TOKENS or bank.max_rank > PASS_TOKENS:
            yield (
                f"it has {plan.num_tokens} tokens and slots of rank {bank.max_rank}; allowed are at most {PASS_TOKENS} "
                f"tokens and rank {PASS_TOKENS}."
            )
        for group in plan.groups:
            if any(entry and not entry.rank and not entry.idle for entry in bank.slots[group.slot]):
                yield f"slot {group.slot} holds blocks of dW without factors."

    def linear(self, x: Tensor, bank: LayerBank, plan: StepPlan, bias: Tensor | None) -> Tensor:
        """One kernel over the sorted weight."""
        from smoa_kernels.backends.triton.launch import smoa_linear_triton

        return smoa_linear_triton(x, bank, plan, bias)


BACKEND = TritonBackend()
