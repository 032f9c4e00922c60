"""Training: step time and memory of our SMoA layers against the dense formulation, on one base."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, ratio_bar
from benchmarks.training_models import VARIANTS, Setting, make_model, make_step

FULL = (Setting(32, 4, 256), Setting(32, 2, 256), Setting(32, 4, 256, torch.bfloat16))
QUICK = (Setting(32, 4, 256),)
MEMORY_BAR, TIME_BAR = 2.0, 1.0
LOSSES = Setting(32, 4, 32)  # few tokens: many steps of both formulations
LOSS_STEPS = 50
LOSS_TOLERANCE = 1e-4  # relative, float32


def run(quick: bool) -> tuple[list[dict[str, object]], list[Bar]]:
    """Measure every setting: losses first, then times in pairs, then memory in processes of their own.

    Args:
        quick: one setting, fewer repeats.
    """
    rows: list[dict[str, object]] = []
    bars: list[Bar] = []
    difference = _loss_difference(5 if quick else LOSS_STEPS)
    for setting in QUICK if quick else FULL:
        steps = {variant: make_step(make_model(variant, setting), setting) for variant in VARIANTS}
        times = _times(steps, 3 if quick else 5)
        del steps
        plain = replace(setting, rank=1, num_blocks=1)  # the base has no blocks: it is measured once per dtype
        peaks = {variant: _peak(variant, plain if variant == "base" else setting) for variant in VARIANTS}
        name = f"{setting.name} {str(setting.dtype).removeprefix('torch.')}"
        bars += _bars(name, times, peaks)
        rows.append(
            {
                "kind": "training",
                "setting": name,
                "tokens": setting.tokens,
                "step_s": {variant: statistics.median(values) for variant, values in times.items()},
                "peak_bytes": peaks,
                "largest_loss_difference": difference,
            }
        )
        _print(rows[-1])
    return rows, bars


def _loss_difference(count: int) -> float:
    """Largest relative difference of the losses of `count` steps; a gate, not a figure.

    Raises:
        AssertionError: the two formulations do not learn the same.
    """
    ours_step, dense_step = (make_step(make_model(variant, LOSSES), LOSSES) for variant in ("ours", "dense"))
    pairs = [(ours_step(), dense_step()) for _ in range(count)]
    largest = max(abs(ours - dense) / dense for ours, dense in pairs)
    assert largest <= LOSS_TOLERANCE, f"losses differ by {largest:.2e}, allowed is {LOSS_TOLERANCE:.0e}"
    return largest


def _times(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step; the variants take turns."""
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for repeat in range(repeats + 1):
        for variant, step in steps.items():
            begin = time.perf_counter()
            step()
            if repeat:  # the first warms up
                times[variant].append(time.perf_counter() - begin)
    return times


@cache
def _peak(variant: str, setting: Setting) -> int:
    """Peak memory in a process of its own, where every freed tensor goes back to the system at once."""
    command = [sys.executable, "-m", "benchmarks.training_models", variant]
    command += [str(setting.rank), str(setting.num_blocks), str(setting.tokens)]
    command.append(str(setting.dtype).removeprefix("torch."))
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def _bars(name: str, times: dict[str, list[float]], peaks: dict[str, int]) -> list[Bar]:
    ours, dense = (peaks[variant] - peaks["base"] for variant in ("ours", "dense"))
    memory = dense / ours
    return [
        Bar(f"{name}: less adapter memory, dense / ours", memory, MEMORY_BAR, (memory, memory)),
        ratio_bar(f"{name}: step time, dense / ours", times["dense"], times["ours"], TIME_BAR),
    ]


def _print(row: dict[str, object]) -> None:
    table = Table("", "step ms", "peak MB", "adapter MB", title=f"{row['setting']}, {row['tokens']} tokens a step")
    seconds, peaks = row["step_s"], row["peak_bytes"]
    assert isinstance(seconds, dict)
    assert isinstance(peaks, dict)
    for variant in VARIANTS:
        megabytes = peaks[variant] / 1e6
        above = "-" if variant == "base" else f"{megabytes - peaks['base'] / 1e6:.0f}"
        table.add_row(variant, f"{seconds[variant] * 1e3:.0f}", f"{megabytes:.0f}", above)
    Console().print(table)
