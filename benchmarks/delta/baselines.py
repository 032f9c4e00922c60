"""What the delta is compared with: plain `torch.bmm`, the published dense way, LoRA of as many parameters.

Blocks of equal size only. Every call adds to the y of its step.
"""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.delta.cases import EQUAL, Case
from benchmarks.delta.layers import PlainSlice
from benchmarks.delta.step import Step
from benchmarks.harness.gates import assert_rounded
from benchmarks.harness.timing import Call

EXPAND, MODULATE, LOOP = "bmm expand", "bmm modulate", "loop"
LORA, LORA_TORCH = "lora (vllm)", "lora (torch)"
LARGEST_LOOP = 64  # adapters; beyond, it only repeats itself
LARGEST_GATHER_BYTES = 1 << 28  # vLLM's CPU ops copy the factors of every token, in float32


def plain_calls(step: Step, implementation: str) -> dict[str, Call]:
    """The plain ways, where adapters have equally many tokens, and the loop over adapters."""
    adapters = len(step.case.group_sizes())
    if not adapters or step.case.workload != EQUAL:
        return {}
    loop = {LOOP: step.loop(implementation)} if 1 < adapters <= LARGEST_LOOP else {}
    return {EXPAND: expand(step), MODULATE: modulate(step), **loop}


def expand(step: Step) -> Call:
    """`sum_rho b_rho * (W_k (a_rho * x_k))`: a row per token and rank, one batched product for all adapters."""
    active = np.flatnonzero(step.slots >= 0)
    tokens, slots = step.on_device(active), step.on_device(step.slots[active])

    def run(i: int) -> None:
        for layer in step.copies[i].plain:
            blocks, m, n = layer.weight.shape
            ranks = layer.a.shape[1]
            rows = step.x[tokens][:, layer.cols].view(-1, 1, blocks, n) * layer.a[slots]  # [U, R, K, n]
            u = torch.bmm(rows.view(-1, blocks, n).transpose(0, 1), layer.weight.transpose(1, 2))  # [K, U * R, m]
            delta = (u.transpose(0, 1).view(-1, ranks, blocks, m) * layer.b[slots]).sum(1)  # [U, K, m]
            _add(step.y, delta, layer, tokens)

    return run


def modulate(step: Step) -> Call:
    """`(W_k * (B_k A_k)) x_k`, one adapter after the other, all its blocks in one batched product."""
    groups = step.groups()

    def run(i: int) -> None:
        for layer in step.copies[i].plain:
            blocks, _, n = layer.weight.shape
            for slot, tokens in groups:
                a, b = layer.a[slot].transpose(0, 1), layer.b[slot].transpose(0, 1)  # [K, R, n], [K, R, m]
                modulated = torch.bmm(b.transpose(1, 2), a) * layer.weight  # [K, m, n]
                rows = step.x[tokens][:, layer.cols].view(-1, blocks, n).transpose(0, 1)  # [K, t, n]
                delta = torch.bmm(rows, modulated.transpose(1, 2)).transpose(0, 1)  # [t, K, m]
                _add(step.y, delta, layer, tokens)

    return run


def _add(y: Tensor, delta: Tensor, layer: PlainSlice, tokens: Tensor) -> None:
    rows = delta.reshape(len(tokens), -1)[:, layer.inverse]
    y[tokens, layer.offset : layer.offset + rows.shape[1]] += rows


def dense(step: Step) -> Call:
    """The published way: of every adapter present, every block of dW is formed from float32 factors and its part of W
    ("anchor") in float32, and put into a dense matrix, on each call."""
    first = step.copies[0]
    groups, kept = step.groups(), {}
    for slot, _ in groups:
        for index, (update, weight) in enumerate(zip(first.updates[slot], first.slices, strict=True)):
            for k in range(step.case.blocks):
                rows, cols = ((ids == k).nonzero()[:, 0] for ids in (update.row_block, update.col_block))
                anchor = weight.cpu()[rows[:, None], cols].float()
                parts = (update.a[:, cols].contiguous(), update.b[rows], anchor, rows, cols)
                kept[slot, index, k] = [part.to(weight.device) for part in parts]

    def run(i: int) -> None:
        for slot, tokens in groups:
            offset = 0
            for index, weight in enumerate(first.slices):
                delta = torch.zeros_like(weight)
                for k in range(step.case.blocks):
                    a, b, anchor, rows, cols = kept[slot, index, k]
                    delta[rows[:, None], cols] = ((b @ a) * anchor).to(delta.dtype)
                step.y[tokens, offset : offset + len(weight)] += step.x[tokens] @ delta.t()
                offset += len(weight)

    return run


def lora(step: Step) -> dict[str, Call]:
    """LoRA of rank r/K, as many parameters as SMoA has, after its gate: vLLM's, in torch where that copies too much."""
    case, layer, x, y = step.case, step.case.layer, step.x, step.y
    if not case.group_sizes():
        return {}
    slots, generator = len(step.copies[0].updates), torch.Generator().manual_seed(2)
    a = torch.randn(slots, 1, case.branch_rank, layer.h_in, generator=generator).div_(layer.h_in**0.5).to(x)
    wide = [torch.randn(slots, 1, size, case.branch_rank, generator=generator).to(x) for size in layer.slices]
    # As vLLM stacks them: per copy and slice, a [S, 1, R, H_in] and b [S, 1, H_out, R].
    factors = [([a.clone() for _ in wide], [b.clone() for b in wide]) for _ in step.copies]
    groups = step.groups()

    def in_torch(i: int, y: Tensor = y, x: Tensor = x) -> None:
        for part, a, b in zip(y.split(layer.slices, 1), *factors[i], strict=True):
            for slot, tokens in groups:
                part[tokens] += x[tokens] @ a[slot, 0].to(x).T @ b[slot, 0].to(x).T

    calls: dict[str, Call] = {LORA_TORCH: in_torch}
    gathered = case.tokens * case.branch_rank * max(layer.h_in, *layer.slices) * 4
    if x.device.type == "cuda" or gathered <= LARGEST_GATHER_BYTES:
        wrapper = _wrapper(case, slots, x.device)
        calls[LORA] = lambda i: wrapper.add_lora_linear(y, x, *factors[i], 1.0, layer.slices)
    exact, active = y.float().zero_(), step.slots >= 0
    in_torch(0, exact, x.float())
    for name, call in calls.items():
        y.zero_()
        call(0)
        assert_rounded(name, y[active], exact[active])
    return dict(list(calls.items())[-1:])


def _wrapper(case: Case, num_slots: int, device: torch.device) -> Any:
    """What vLLM's layers call, for this step."""
    from vllm.lora.layers import LoRAMapping

    kind = "GPU" if device.type == "cuda" else "CPU"
    module = import_module(f"vllm.lora.punica_wrapper.punica_{kind.lower()}")
    limits = SimpleNamespace(max_loras=num_slots, specialize_active_lora=False, fully_sharded_loras=False)
    wrapper = getattr(module, f"PunicaWrapper{kind}")(case.tokens, case.tokens, device, lora_config=limits)
    ids = tuple(slot + 1 for slot in case.slots().tolist())  # 0 = no adapter
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(range(1, num_slots + 1)), num_slots, 32000)
    return wrapper
