"""Serving compared end to end: the base alone, with the plugin, with SMoA adapters, with vLLM's own LoRA adapters."""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, ratio_bar
from benchmarks.dense import delta_bar
from benchmarks.fleet import Load, Repeat, Server, Variant, figures, measure, running, speeds
from benchmarks.random_models import QWEN_05B, QWEN_05B_QUICK, random_base, random_lora, random_smoa
from smoa_serve.cli.bench import summary
from smoa_serve.demo.shipped import ensure_models

CONFIGURATIONS = ((16, 4), (32, 8))  # (r, K): both have r/K = 4, as many parameters as LoRA of rank 4
LORA_RANK = 4
ADAPTERS = 16
STOCK, EAGER, LORA, PLUGIN = "vLLM alone", "vLLM alone, eager", "vLLM with LoRA", "vLLM with smoa-serve"
DEMO_DIR = Path(".demo")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    load: Load
    repeats: int
    counts: tuple[int, ...]
    delta_repeats: int
    eager: bool  # also the base without compilation: vLLM compiles nothing on a CPU once LoRA is enabled


FULL = Plan(Load(16, 128, 64), repeats=3, counts=(1, 4, 16), delta_repeats=5, eager=True)
QUICK = Plan(Load(16, 64, 32), repeats=7, counts=(16,), delta_repeats=3, eager=False)


def run(quick: bool) -> tuple[list[dict[str, object]], list[Bar]]:
    """Measure everything.

    Args:
        quick: fewer layers, shorter load, no tiny model; the same bars.

    Returns:
        Rows for JSON, and the bars.
    """
    console = Console() if sys.stdout.isatty() else Console(width=140)
    plan, shape = (QUICK, QWEN_05B_QUICK) if quick else (FULL, QWEN_05B)
    rows: list[dict[str, object]] = []
    bars: list[Bar] = []
    for rank, num_blocks in CONFIGURATIONS:
        bar, figures = delta_bar(shape, rank, num_blocks, plan.load, plan.delta_repeats)
        rows.append({"model": shape.name, **figures})
        bars.append(bar)
    base = random_base(shape)
    results = _compare(base, plan, console)
    console.print(_table(shape.name, plan, results))
    rows += _rows(shape.name, plan, results)
    bars = _bars(results) + bars
    if not quick:
        demo = ensure_models(DEMO_DIR, console)
        tiny = _compare(demo.base, plan, console)
        console.print(_table("demo", plan, tiny))
        rows += _rows("demo", plan, tiny)
    return rows, bars


def _compare(base: Path, plan: Plan, console: Console) -> dict[str, list[Repeat]]:
    lora = {f"lora-{i}": random_lora(base, LORA_RANK, i) for i in range(ADAPTERS)}
    smoa = {
        f"smoa-r{rank}-k{num_blocks}-{i}": random_smoa(base, rank, num_blocks, i)
        for rank, num_blocks in CONFIGURATIONS
        for i in range(ADAPTERS)
    }
    servers = [Server(STOCK, False, {}), Server(LORA, False, lora), Server(PLUGIN, True, smoa)]
    if plan.eager:
        servers.insert(1, Server(EAGER, False, {}, ("--enforce-eager",)))
    variants = [Variant(f"base, {server.name}", server.name, ("base",)) for server in servers]
    variants.append(Variant(f"{ADAPTERS} LoRA r={LORA_RANK}", LORA, tuple(lora)))
    for rank, num_blocks in CONFIGURATIONS:
        for count in plan.counts:
            models = tuple(f"smoa-r{rank}-k{num_blocks}-{i}" for i in range(count))
            variants.append(Variant(_smoa_name(count, rank, num_blocks), PLUGIN, models))
    with running(base, servers, console) as processes:
        return measure(processes, variants, plan.load, plan.repeats, console)


def _smoa_name(count: int, rank: int, num_blocks: int) -> str:
    return f"{count} SMoA r={rank} K={num_blocks}"


def _bars(results: dict[str, list[Repeat]]) -> list[Bar]:
    found = {name: speeds(repeats) for name, repeats in results.items()}
    plugin, stock, enabled = (found[f"base, {name}"] for name in (PLUGIN, STOCK, LORA))
    bars = [
        ratio_bar("base with the plugin / vLLM alone", plugin, stock, 0.97),
        ratio_bar("base with the plugin / vLLM with --enable-lora", plugin, enabled, 0.97),
    ]
    for rank, num_blocks in CONFIGURATIONS:
        name = _smoa_name(ADAPTERS, rank, num_blocks)
        lora = found[f"{ADAPTERS} LoRA r={LORA_RANK}"]
        bars.append(ratio_bar(f"{name} / {ADAPTERS} LoRA r={LORA_RANK}", found[name], lora, 1.0))
        bars.append(ratio_bar(f"{name} / base, vLLM alone", found[name], stock, 0.5))
    return bars


def _rows(model: str, plan: Plan, results: dict[str, list[Repeat]]) -> list[dict[str, object]]:
    shared = {"kind": "serving", "model": model, "load": asdict(plan.load)}
    return [{**shared, "variant": name, **figures(found)} for name, found in results.items()]


def _table(model: str, plan: Plan, results: dict[str, list[Repeat]]) -> Table:
    load = plan.load
    title = f"{model}: {load.streams} streams, {load.input_tokens} tokens in, {load.output_tokens} out"
    table = Table("variant", "tokens/s", "repeats", "TTFT p50 ms", "TPOT p50 ms", "CPU s", "of base", title=title)
    reference = speeds(results[f"base, {STOCK}"])
    for name, found in results.items():
        reached = speeds(found)
        facts = summary([sample for result in found for sample in result.load.samples])
        share = statistics.median(a / b for a, b in zip(reached, reference, strict=True))
        spread = f"{min(reached):.1f} to {max(reached):.1f}"
        cpu_s = statistics.median(result.cpu_s for result in found)
        times = (f"{facts['ttft_ms_p50']:.0f}", f"{facts['tpot_ms_p50']:.1f}", f"{cpu_s:.1f}")
        table.add_row(name, f"{statistics.median(reached):.1f}", spread, *times, f"{share:.2f}")
    return table
