"""Time of `smoa_delta` next to the base GEMM of the same layer, on the CPU.

Layers have the shapes of Qwen2.5-0.5B. As in a model, each call meets another layer's weights: copies of the layer are
used in turn, more than the last-level cache holds. All candidates run in turn too, so that a busy machine slows all.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from smoa_kernels import StepPlan, available_implementations, smoa_delta
from smoa_kernels.testing import Layer, assert_close, random_blocks, random_layer, random_update
from torch import Tensor

LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (896, (896, 128, 128)),
    "o": (896, (896,)),
    "gate_up": (896, (4864, 4864)),
    "down": (4864, (896,)),
}
SLOTS = 16
COLD_BYTES = 64 << 20
# (r, K), then (tokens, adapters): decode of 1 and 16 tokens, prefill of one prompt and of four.
CONFIGURATIONS = ((16, 4), (16, 8), (32, 8))
STEPS = ((1, 1), (16, 16), (128, 1), (512, 4))
QUICK_CONFIGURATIONS, QUICK_STEPS = ((16, 4), (32, 8)), ((16, 16), (128, 1))


@dataclass(frozen=True)
class Setup:
    """One measured case."""

    layer: str
    rank: int
    blocks: int
    tokens: int
    adapters: int


def run(quick: bool) -> list[dict[str, object]]:
    """Measures all cases; each row says what was measured where.

    Args:
        quick: fewer cases and repetitions.

    Returns:
        Rows with best and median microseconds of: base (the GEMM of oneDNN), each implementation of the delta, lora (a
        LoRA delta of as many parameters, in torch), and each best time as a share of the base's.
    """
    rows: list[dict[str, object]] = []
    for rank, blocks in QUICK_CONFIGURATIONS if quick else CONFIGURATIONS:
        for name in LAYERS:
            layers: dict[str, list[Layer]] = {
                implementation: _copies(name, rank, blocks, implementation)
                for implementation in ("cpp", "torch")
                if implementation in available_implementations("cpu", torch.bfloat16)
            }
            for tokens, adapters in QUICK_STEPS if quick else STEPS:
                rows.append(_measure(Setup(name, rank, blocks, tokens, adapters), layers, 15 if quick else 40))
    return rows


def _copies(name: str, rank: int, blocks: int, implementation: str) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    h_in, slices = LAYERS[name]
    cols = random_blocks(h_in, blocks, generator)
    ranks = [rank // blocks] * blocks
    updates = [random_update(random_blocks(size, blocks, generator), cols, ranks, generator) for size in slices]
    layers = []
    for _ in range(max(2, -(-COLD_BYTES // (2 * h_in * sum(slices))))):
        layer = random_layer(
            h_in, slices, slots=SLOTS, max_rank=rank // blocks, dtype=torch.bfloat16, generator=generator,
            implementation=implementation,
        )  # fmt: skip
        for slot in range(SLOTS):
            layer.bank.set(slot, updates)
        layers.append(layer)
    return layers


def _measure(setup: Setup, layers: dict[str, list[Layer]], repetitions: int) -> dict[str, object]:
    h_in, slices = LAYERS[setup.layer]
    slots = torch.arange(setup.tokens) * setup.adapters // setup.tokens
    plan = StepPlan(setup.tokens, SLOTS, "cpu")
    plan.update(slots.numpy())
    x = torch.randn(setup.tokens, h_in, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = torch.zeros(setup.tokens, sum(slices), dtype=torch.bfloat16)
    _gate(y, x, plan, {implementation: copies[0] for implementation, copies in layers.items()})
    first = next(iter(layers.values()))
    first = next(iter(layers.values()))
    weights = [torch.cat(layer.weights) for layer in first]

    def delta(implementation: str) -> Callable[[int], object]:
        banks = [layer.bank for layer in layers[implementation]]
        return lambda i: smoa_delta(y, x, banks[i % len(banks)], plan, implementation)

    times = _times_us(
        {
            "base": lambda i: F.linear(x, weights[i % len(weights)]),
            **{implementation: delta(implementation) for implementation in layers},
            "lora": lambda i: _lora(y, x, first[i % len(first)], slots),
        },
        repetitions,
    )
    best = {name: min(values) for name, values in times.items()}
    return {
        **vars(setup),
        **{f"{name}_us": round(us, 1) for name, us in best.items()},
        **{f"{name}_median_us": round(statistics.median(values), 1) for name, values in times.items()},
        **{f"{name}_over_base": round(us / best["base"], 3) for name, us in best.items() if name != "base"},
        "hardware": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _gate(y: Tensor, x: Tensor, plan: StepPlan, layers: dict[str, Layer]) -> None:
    """No number without a right result."""
    for implementation, layer in layers.items():
        expected, found = torch.zeros_like(y), torch.zeros_like(y)
        smoa_delta(expected, x, layer.bank, plan, "reference")
        smoa_delta(found, x, layer.bank, plan, implementation)
        assert_close(found, expected)


def _lora(y: Tensor, x: Tensor, layer: Layer, slots: Tensor) -> None:
    """Shrink and expand with the factors of the slots read as LoRA's: as many parameters, no base weight."""
    offset = 0
    for a, b in zip(layer.bank.a, layer.bank.b, strict=True):
        if slots[0] == slots[-1]:
            slot = int(slots[0])
            y[:, offset : offset + b.shape[2]].addmm_(x @ a[slot].T, b[slot])
        else:
            shrunk = torch.bmm(x[:, None], a[slots].transpose(1, 2))  # [T, 1, R]
            y[:, offset : offset + b.shape[2]] += torch.bmm(shrunk, b[slots])[:, 0]
        offset += b.shape[2]


def _times_us(calls: dict[str, Callable[[int], object]], repetitions: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repetitions + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: values[3:] for name, values in times.items()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
