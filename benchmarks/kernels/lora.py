"""A LoRA delta of as many parameters as the SMoA one, which is a LoRA rank of r/K, through vLLM's own kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.timing import Call

LARGEST_GATHER_BYTES = 1 << 28  # vLLM's CPU ops copy the factors of every token, in float32


@dataclass(frozen=True)
class LoraFactors:
    """One copy of a layer's factors as vLLM stacks them, per slice.

    Attributes:
        a: [S, 1, R, H_in].
        b: [S, 1, H_out, R].
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]

    def float(self) -> "LoraFactors":
        """The same in float32."""
        return LoraFactors(tuple(a.float() for a in self.a), tuple(b.float() for b in self.b))


def random_factors(case: Case, slots: int, device: torch.device, dtype: torch.dtype) -> LoraFactors:
    """Gaussian factors of rank r/K."""
    layer, rank = case.layer, case.branch_rank
    a = torch.randn(slots, 1, rank, layer.h_in).div_(layer.h_in**0.5)
    b = [torch.randn(slots, 1, h_out, rank) for h_out in layer.slices]
    return LoraFactors(
        tuple(a.to(device, dtype, copy=True) for _ in b), tuple(factor.to(device, dtype) for factor in b)
    )


def vllm_missing() -> str | None:
    """Why vLLM's kernels cannot be measured, None when they can."""
    try:
        import_module("vllm.lora.punica_wrapper.punica_cpu")
    except Exception as error:  # whatever an unfit vLLM raises while it is imported
        return f"vLLM cannot be imported: {type(error).__name__}: {error}"
    return None


def gather_too_large(case: Case, device: torch.device) -> str | None:
    """Why vLLM's CPU ops are left out at many tokens, None when they are not."""
    size = case.tokens * case.branch_rank * max(case.layer.h_in, *case.layer.slices) * 4
    if device.type == "cpu" and size > LARGEST_GATHER_BYTES:
        return f"vLLM's CPU kernel would copy {size / 2**30:.1f} GiB of factors"
    return None


def vllm_call(case: Case, factors: Sequence[LoraFactors], y: Tensor, x: Tensor) -> Call:
    """LoRA as vLLM's layers run it: `add_lora_linear` of the wrapper of this device."""
    wrapper = _wrapper(case, factors[0].a[0].shape[0], x.device)
    return lambda i: wrapper.add_lora_linear(y, x, factors[i].a, factors[i].b, 1.0, case.layer.slices)


def torch_call(case: Case, factors: Sequence[LoraFactors], y: Tensor, x: Tensor) -> Call:
    """LoRA in torch where there is no vLLM: one product per adapter, or batched when all differ."""
    slots = torch.from_numpy(case.slots())
    groups = [(slot, (slots == slot).nonzero()[:, 0].to(x.device)) for slot in sorted(set(slots.tolist()) - {-1})]
    every = slots.to(x.device)
    batched = len(groups) == case.tokens > 1

    def run(i: int) -> None:
        offset = 0
        for a, b in zip(factors[i].a, factors[i].b, strict=True):
            part = y[:, offset : offset + b.shape[2]]
            if batched:
                part += torch.bmm(torch.bmm(x[:, None], a[every, 0].transpose(1, 2)), b[every, 0].transpose(1, 2))[:, 0]
            else:
                for slot, tokens in groups:
                    part[tokens] += x[tokens] @ a[slot, 0].T @ b[slot, 0].T
            offset += b.shape[2]

    return run


def _wrapper(case: Case, num_slots: int, device: torch.device) -> Any:
    from vllm.lora.layers import LoRAMapping

    slots = case.slots().tolist()
    ids: list[int | None] = [slot + 1 for slot in range(num_slots)]  # 0 = no adapter
    arguments: dict[str, Any] = {}
    if device.type == "cuda":
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as Wrapper

        arguments["lora_config"] = SimpleNamespace(
            max_loras=num_slots, specialize_active_lora=False, fully_sharded_loras=False
        )
    else:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Wrapper
    wrapper = Wrapper(len(slots), len(slots), device, **arguments)
    mapping = LoRAMapping(tuple(slot + 1 for slot in slots), tuple(slot + 1 for slot in slots), is_prefill=True)
    wrapper.update_metadata(mapping, ids, num_slots, 32000)
    return wrapper
