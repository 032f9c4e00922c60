"""The op, and the only chooser of its implementation. An explicit wish never falls back."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from smoa_kernels.backend import available_implementations, default_implementation, require_implementation
from smoa_kernels.backends.cpp.launch import smoa_delta_cpp
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.backends.torch import smoa_delta_torch
from smoa_kernels.bank import LayerBank
from smoa_kernels.errors import ShapeError
from smoa_kernels.plan import StepPlan

__all__ = ["available_implementations", "default_implementation", "smoa_delta"]

Implementation = Callable[[Tensor, Tensor, LayerBank, StepPlan], None]


def _smoa_delta_triton(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan) -> None:
    # Triton is imported where it is used: it is not there on every machine.
    from smoa_kernels.backends.triton.launch import smoa_delta_triton

    smoa_delta_triton(y, x, bank, plan)


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {"triton": _smoa_delta_triton, "cpp": smoa_delta_cpp, "torch": smoa_delta_torch, "reference": smoa_delta_reference}
)


def smoa_delta(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan, implementation: str | None = None) -> None:
    """Adds the delta of each token's adapter to the output of a (possibly packed) linear layer.

    Semantics: `y[t, i] += scaling * sum_j W[i, j] [row_block[i] == col_block[j]] (B A)[i, j] x[t, j]` with the factors
    and block ids of slot `token_to_slot[t]`, for each slice of the layer. Where the plan says merged, the
    base weight and with it y contain an adapter's update already: its tokens get nothing and all others `W - W'` of it
    beside their own.

    Args:
        y: [>= T, sum of H_out_i] model dtype, written in place; rows may be apart (a view of a wider tensor). Rows of
            slot -1, rows from T on, and slices that an adapter leaves alone keep their bits.
        x: [>= T, H_in] model dtype, read only; must not overlap y.
        bank: the layer's adapters and weight blocks.
        plan: the step; T = plan.num_tokens.
        implementation: "triton", "cpp", "torch" or "reference"; None = the one the bank was made for.

    Raises:
        ShapeError: x or y does not fit the bank or the plan, or it says merged and the bank holds nothing merged.
        ImplementationError: the implementation that was asked for does not exist or cannot run here.
    """
    if implementation is not None:
        require_implementation(implementation, bank.device, bank.dtype)
    if (
        x.dtype is not bank.dtype
        or y.dtype is not bank.dtype
        or x.device != bank.device
        or y.device != bank.device
        or x.ndim != 2
        or y.ndim != 2
        or x.shape[1] != bank.h_in
        or y.shape[1] != bank.h_out
        or x.shape[0] < plan.num_tokens
        or y.shape[0] < plan.num_tokens
        or x.stride(1) != 1
        or y.stride(1) != 1
        or plan.num_slots != bank.num_slots
        or (plan.merged and not bank.merged)
    ):
        raise ShapeError("the input of the delta", _reasons(y, x, bank, plan))
    # A captured graph has to serve steps in which other tokens have adapters.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    for part in (plan, plan.compensation):
        if part is not None and (part.active or capturing):
            IMPLEMENTATIONS[implementation or bank.implementation](y, x, bank, part)


def _reasons(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan) -> list[str]:
    reasons = []
    for name, tensor, width in (("x", x, bank.h_in), ("y", y, bank.h_out)):
        if tensor.dtype is not bank.dtype or tensor.device != bank.device:
            reasons.append(
                f"{name} is {tensor.dtype} on {tensor.device}; the bank's factors are {bank.dtype} on {bank.device}."
            )
        if tensor.ndim != 2 or tensor.shape[1] != width:
            reasons.append(f"{name} has shape {tuple(tensor.shape)}; allowed is [tokens, {width}].")
        elif tensor.shape[0] < plan.num_tokens:
            reasons.append(f"{name} has {tensor.shape[0]} rows; the plan has {plan.num_tokens} tokens.")
        elif tensor.stride(1) != 1:
            reasons.append(f"{name} has column stride {tensor.stride(1)}; allowed is 1 (rows may be apart).")
    if plan.num_slots != bank.num_slots:
        reasons.append(f"the plan has {plan.num_slots} slots and the bank has {bank.num_slots}; they must be equal.")
    if plan.merged and not bank.merged:
        reasons.append("the plan says that an adapter is merged and the bank holds none; call hold_merged first.")
    return reasons
