"""The two ops, on whatever backend the bank was made for. An explicit wish for another never falls back."""

from collections.abc import Iterator

import torch
from torch import Tensor

from smoa_kernels.backend import chosen
from smoa_kernels.bank import LayerBank
from smoa_kernels.errors import ShapeError
from smoa_kernels.plan import StepPlan


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
        implementation: name of a backend; None = the one the bank was made for.

    Raises:
        ShapeError: x or y does not fit the bank or the plan, or it says merged and the bank holds nothing merged.
        ImplementationError: the implementation that was asked for does not exist or cannot run here.
    """
    backend = bank.backend if implementation is None else chosen(bank.device, bank.dtype, implementation)
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
            backend.delta(y, x, bank, part)


def can_be_one_pass(bank: LayerBank, plan: StepPlan) -> bool:
    """Whether `smoa_linear` can serve a step.

    Every token has an adapter, as those of the base keep the bits of the base product; each slice's weight is whole, in
    the partition of all adapters of the step that change the slice; nothing is merged; and the backend agrees.
    """
    return bank.memo("one pass", plan.version, lambda: next(_obstacles(bank, plan), None) is None)


def _obstacles(bank: LayerBank, plan: StepPlan) -> Iterator[str]:
    if plan.merged:
        yield "an adapter is merged; un-merge it first."
    whole = [bank.whole_partition(index) for index in range(len(bank.slices))]
    if None in whole:
        yield "a weight is not kept whole; make the bank with whole=True, for a backend that can."
    if len(plan.order) < plan.num_tokens:
        yield "it has tokens without an adapter, which keep the bits of the base product."
    for group in plan.groups:
        for index, (entry, own) in enumerate(zip(bank.slots[group.slot], whole, strict=True)):
            if entry is not None and not entry.idle and entry.partition is not own:
                yield f"slot {group.slot} has another partition than the sorted weight in slice {index}."
    yield from bank.backend.linear_reasons(bank, plan)


def smoa_linear(x: Tensor, bank: LayerBank, plan: StepPlan, bias: Tensor | None = None) -> Tensor:
    """The layer's output with the deltas of its tokens' adapters, from one read of the weight.

    Semantics: `y[t] = W x[t] + bias + ` the delta of `smoa_delta`, in fp32.

    Args:
        x: [T, H_in] model dtype, T = plan.num_tokens; rows may be apart.
        bank: made with `whole=True`.
        plan: a step that `can_be_one_pass` holds of.
        bias: [H_out] of the layer, model dtype.

    Returns:
        [T, H_out] model dtype, rounded once.

    Raises:
        ShapeError: the bank cannot serve this step in one pass; lists every reason.
    """
    if not can_be_one_pass(bank, plan) or x.shape != (plan.num_tokens, bank.h_in) or x.dtype is not bank.dtype:
        reason = "it takes the tokens of one plan, unmerged, whose slots all share the partition of the whole weight"
        reasons = [f"{reason}; x is {tuple(x.shape)} {x.dtype}.", *_obstacles(bank, plan)]
        raise ShapeError("the single pass", reasons)
    return bank.backend.linear(x if x.stride(1) == 1 else x.contiguous(), bank, plan, bias)


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
