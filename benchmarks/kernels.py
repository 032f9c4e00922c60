"""Time of `smoa_delta` next to the base GEMM of the same layer, on the CPU.

Layers have the shapes of Qwen2.5-0.5B. As in a model, each call meets another layer's weights: copies of the layer are
used in turn, more than the last-level cache holds.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
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
COLD_BYTES = 96 << 20
# (r, K), then (tokens, adapters): decode of 1 and 16 tokens, prefill of one and of four prompts.
CONFIGURATIONS = ((16, 4), (16, 8), (32, 8), (16, 1))
STEPS = ((1, 1), (16, 16), (16, 2), (128, 1), (512, 4))
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
    """
    rows: list[dict[str, object]] = []
    for rank, blocks in QUICK_CONFIGURATIONS if quick else CONFIGURATIONS:
        for name in LAYERS:
            by_implementation = {
                implementation: _layers(name, rank, blocks, implementation)
                for implementation in ("cpp", "torch")
                if implementation in available_implementations("cpu", torch.bfloat16)
            }
            for tokens, adapters in QUICK_STEPS if quick else STEPS:
                setup = Setup(name, rank, blocks, tokens, adapters)
                rows.append(_measure(setup, by_implementation, 15 if quick else 40))
    return rows


def _layers(name: str, rank: int, blocks: int, implementation: str) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    h_in, slices = LAYERS[name]
    copies = max(2, -(-COLD_BYTES // (2 * h_in * sum(slices))))
    cols = random_blocks(h_in, blocks, generator)
    ranks = [rank // blocks] * blocks
    layers = []
    for _ in range(copies):
        layer = random_layer(
            h_in, slices, slots=16, max_rank=rank // blocks, dtype=torch.bfloat16, generator=generator,
            implementation=implementation,
        )  # fmt: skip
        rows = [random_blocks(size, blocks, generator) for size in slices]
        for slot in range(16):
            layer.bank.set(slot, [random_update(row, cols, ranks, generator) for row in rows])
        layers.append(layer)
    return layers


def _measure(setup: Setup, by_implementation: dict[str, list[Layer]], repetitions: int) -> dict[str, object]:
    h_in, slices = LAYERS[setup.layer]
    plan = StepPlan(setup.tokens, 16, "cpu")
    plan.update([t * setup.adapters // setup.tokens for t in range(setup.tokens)])
    x = torch.randn(setup.tokens, h_in, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = torch.zeros(setup.tokens, sum(slices), dtype=torch.bfloat16)
    first = next(iter(by_implementation.values()))
    _gate(y, x, plan, first[0], list(by_implementation))
    weights = cycle([torch.cat(layer.weights) for layer in first])
    times = {"base": _median_us(lambda: F.linear(x, next(weights)), repetitions)}
    for implementation, layers in by_implementation.items():
        times[implementation] = _median_us(_delta(y, x, plan, cycle(layers), implementation), repetitions)
    return {
        **vars(setup),
        **{f"{name}_us": round(us, 1) for name, us in times.items()},
        **{f"{name}_over_base": round(us / times["base"], 3) for name, us in times.items() if name != "base"},
        "hardware": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _gate(y: Tensor, x: Tensor, plan: StepPlan, layer: Layer, implementations: list[str]) -> None:
    """No number without a right result."""
    expected = torch.zeros_like(y)
    smoa_delta(expected, x, layer.bank, plan, "reference")
    for implementation in implementations:
        found = torch.zeros_like(y)
        smoa_delta(found, x, layer.bank, plan, implementation)
        assert_close(found, expected)


def _delta(y: Tensor, x: Tensor, plan: StepPlan, layers: Iterator[Layer], implementation: str) -> Callable[[], object]:
    return lambda: smoa_delta(y, x, next(layers).bank, plan, implementation)


def _median_us(call: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions + 3):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[3:])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
