"""What does a training step take? Time and memory of our SMoA layers against the dense formulation, on one base.

    python -m benchmarks.training VARIANT RANK BLOCKS TOKENS DTYPE

prints the peak memory of training steps in a process of their own: bytes above what was resident before the first.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Columns, Options, Row, median_bar, of_kind, ratio_bar, table, timing
from benchmarks.learning import SMOA, Fit, adapt, llama

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
VARIANTS = ("base", "ours", "dense")
LOSS_TOLERANCE = 1e-4  # relative, float32
CPU = torch.device("cpu")


class Setting(NamedTuple):
    """Total rank r, blocks K, tokens of one step (in sequences of 128), dtype of the base."""

    rank: int
    num_blocks: int
    tokens: int
    dtype: str = "float32"


FULL = (Setting(32, 4, 256), Setting(32, 2, 256), Setting(32, 4, 256, "bfloat16"))
LOSSES = Setting(32, 4, 32)  # few tokens: many steps of both formulations


def cases(options: Options) -> tuple[Setting, ...]:
    return FULL[:1] if options.quick else FULL


def measure(settings: Sequence[Setting], options: Options) -> list[Row]:
    """A row per setting: times, then memory in processes of their own. First a gate: both ways learn the same."""
    ours, dense = (make_step(make_model(variant, LOSSES), LOSSES) for variant in ("ours", "dense"))
    losses = [(ours(), dense()) for _ in range(5 if options.quick else 50)]
    difference = max(abs(one - other) / other for one, other in losses)
    assert difference <= LOSS_TOLERANCE, f"losses differ by {difference:.2e}, allowed is {LOSS_TOLERANCE:.0e}"
    budget = timing.Budget(0.0, *(3, 3) if options.quick else (5, 5))
    rows = []
    for setting in settings:
        steps = {variant: make_step(make_model(variant, setting), setting) for variant in VARIANTS}
        times = timing.measure({v: lambda _, step=step: step() for v, step in steps.items()}, 1, CPU, budget)
        del steps
        plain = setting._replace(rank=1, num_blocks=1)  # the base has no blocks: it is measured once per dtype
        row = {
            "kind": "training",
            "setting": f"r={setting.rank} K={setting.num_blocks} {setting.dtype}",
            "tokens": setting.tokens,
            "times_us": times,
            "step_s": {variant: found["median"] / 1e6 for variant, found in times.items()},
            "peak_bytes": {variant: _peak(variant, plain if variant == "base" else setting) for variant in VARIANTS},
            "largest_loss_difference": difference,
        }
        print(row)
        rows.append(row)
    return rows


def bars(rows: Sequence[Row]) -> list[Bar]:
    bars = []
    for row in of_kind(rows, "training"):
        ours, dense = (list(row["times_us"][variant]["by_round"].values()) for variant in ("ours", "dense"))
        less = _adapter_bytes(row, "dense") / _adapter_bytes(row, "ours")
        bars.append(median_bar(f"{row['setting']}: less adapter memory, dense / ours", [less], 2.0))
        bars.append(ratio_bar(f"{row['setting']}: step time, dense / ours", dense, ours, 1.0))
    return bars


def section(rows: Sequence[Row]) -> str:
    columns: Columns = {
        "setting": "{setting}",
        "step: dense, ms": lambda row: f"{row['step_s']['dense'] * 1e3:.0f}",
        "ours": lambda row: f"{row['step_s']['ours'] * 1e3:.0f}",
        "base": lambda row: f"{row['step_s']['base'] * 1e3:.0f}",
        "adapter memory: dense, MB": lambda row: f"{_adapter_bytes(row, 'dense') / 1e6:.0f}",
        "ours, MB": lambda row: f"{_adapter_bytes(row, 'ours') / 1e6:.0f}",
    }
    first = of_kind(rows, "training")[0]
    words = "{tokens} tokens a step; losses of both formulations differ by at most {largest_loss_difference:.0e}."
    return f"{words.format_map(first)}\n\n{table(columns, of_kind(rows, 'training'))}"


def _adapter_bytes(row: Row, variant: str) -> int:
    return int(row["peak_bytes"][variant] - row["peak_bytes"]["base"])


@cache
def _peak(variant: str, setting: Setting) -> int:
    """Peak memory in a process of its own, where every freed tensor goes back to the system at once."""
    command = [sys.executable, "-m", "benchmarks.training", variant, *map(str, setting)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1])


class DenseFormulation(nn.Module):
    """A layer of ours as it is published: every block's product times a float32 copy of its weights, written into a
    matrix of the layer's size, on every forward pass; gradients by autograd."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.blocks = layer.blocks("default")
        self.scaling = layer.entries["default"].scaling
        a, b = layer.smoa_a["default"].detach(), layer.smoa_b["default"].detach()
        factors = [block.factors(a, b) for block in self.blocks]
        self.a = nn.ParameterList([nn.Parameter(a_k.clone()) for a_k, _ in factors])
        self.b = nn.ParameterList([nn.Parameter(b_k.clone()) for _, b_k in factors])
        self.anchors = [block.weight(layer.matrix, torch.float32) for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        delta = torch.zeros(self.base_layer.weight.shape, device=x.device)
        for block, a, b, anchor in zip(self.blocks, self.a, self.b, self.anchors, strict=True):
            delta[block.rows[:, None], block.cols] = (b @ a) * anchor * self.scaling
        return self.base_layer(x) + nn.functional.linear(x, delta.to(x.dtype))  # type: ignore[no-any-return]


def make_model(variant: str, setting: Setting) -> nn.Module:
    """A llama of hidden size 1024 with 8 layers and random weights; the same numbers for every variant."""
    from smoa_serve.peft import SMoALinear

    model: nn.Module = llama(1024, 2816, 8, 1024, 16, 4).to(getattr(torch, setting.dtype)).requires_grad_(False)
    # As with adapters below: gradients flow through the whole model, so that only the adapters make the difference.
    model.enable_input_require_grads()
    if variant == "base":
        return model
    fit = Fit(SMOA, setting.rank // setting.num_blocks, num_blocks=setting.num_blocks)
    adapted: nn.Module = adapt(model, fit, list(TARGETS))
    if variant == "dense":
        for name, layer in list(adapted.named_modules()):
            if isinstance(layer, SMoALinear):
                parent, _, child = name.rpartition(".")
                setattr(adapted.get_submodule(parent), child, DenseFormulation(layer))
    return adapted


def make_step(model: nn.Module, setting: Setting) -> Callable[[], float]:
    """One training step on random tokens: forward, backward and, where there is something to train, AdamW."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, (max(1, setting.tokens // 128), min(128, setting.tokens)), generator=generator)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, foreach=False) if trainable else None

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak_bytes(step: Callable[[], float], repeats: int) -> int:
    """Highest resident memory of this process while it takes steps."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(repeats):
        step()
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux reports it for every process"
    return int(found[1]) * 1024


if __name__ == "__main__":
    alone = Setting(*map(int, sys.argv[2:5]), sys.argv[5])
    one_step = make_step(make_model(sys.argv[1], alone), alone)
    one_step()  # what is made once: optimizer state, threads' scratch
    print(peak_bytes(one_step, 2))
