"""Kernel results into the documents: `python -m benchmarks.kernels.publish RESULT.jsonl ...`.

Replaces what stands between the markers in docs/performance.md, and draws docs/kernels-ratio.png and
docs/kernels-roofline.png. Several results of one machine, each of other layers, make one table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import EQUAL
from benchmarks.kernels.pictures import draw_ratios, draw_roofline
from benchmarks.kernels.point import SINGLE_PASS
from benchmarks.kernels.predictions import prediction_table
from benchmarks.kernels.timing import MOST_WAITING
from benchmarks.tables import ROOT, replace_section, setup_line, table

Row = dict[str, Any]
# (tokens, adapters) of the summary.
BATCHES = ((1, 1), (8, 8), (64, 1), (64, 8), (64, 64), (256, 8), (256, 64), (256, 256), (4096, 1), (4096, 64))


def main(arguments: list[str] | None = None) -> int:
    """Publish results.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.publish", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ is")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for file in options.results for line in file.read_text(encoding="utf-8").splitlines()]
    points = [row for row in rows if row["kind"] == "kernels"]
    if any(row["workload"] != EQUAL for row in points):  # measured on one layer only
        draw_ratios(points, options.root / "docs" / "kernels-ratio.png")
    draw_roofline(points, options.root / "docs" / "kernels-roofline.png")
    replace_section(options.root / "docs" / "performance.md", "kernels", section(rows))
    replace_section(options.root / "docs" / "performance.md", "kernels-gpu", prediction_table())
    return 0


def section(rows: Sequence[Row]) -> str:
    """Setup, a table per layer, the dense way, the bars and what tuning changed."""
    points = [row for row in rows if row["kind"] == "kernels"]
    parts = [setup_line(points[0]), ceilings_line(points)]
    equal = [row for row in points if row["workload"] == EQUAL]
    parts.append("The delta's time over the base GEMM's, layers H_in x H_out:\n\n" + summary_table(equal))
    if any(SINGLE_PASS in row["over_base"] for row in equal):
        words = (
            "Base product and delta in one pass over the weight, over the base GEMM's time (1.00 = the delta is free):"
        )
        parts.append(f"{words}\n\n{summary_table(equal, SINGLE_PASS)}")
    for layer in dict.fromkeys(row["layer"] for row in equal):
        here = [row for row in equal if row["layer"] == layer]
        summary = f"<summary>{layer}: all {len(here)} points, microseconds</summary>"
        parts.append(f"<details>{summary}\n\n{layer_table(here)}\n\n</details>")
    parts.append(dense_table([row for row in equal if "dense" in row["times_us"]]))
    bars = [row for row in rows if row["kind"] == "bar" and row["what"] == "kernels"]
    parts.append(bar_table(bars))
    tuned = [row for row in rows if row["kind"] == "tuned"]
    if tuned:
        parts.append(tuned_table(tuned))
    return "\n\n".join(part for part in parts if part)


def ceilings_line(rows: Sequence[Row]) -> str:
    """What the machine reached, over the runs."""
    bandwidth = sorted({row["ceilings"]["bytes_per_s"] / 1e9 for row in rows})
    rate = sorted({row["ceilings"]["flops_per_s"] / 1e12 for row in rows})
    threads = f", {rows[0]['threads']} threads" if rows[0]["device"] == "cpu" else ""
    speeds = f"{_range(bandwidth, 0)} GB/s, {_range(rate, 2)} TFLOP/s"
    ceilings = f"Ceilings measured at the start of each run{threads}: {speeds}."
    disturbed = sum(row["waiting"] > MOST_WAITING for row in rows)
    if not disturbed:
        return ceilings
    return (
        f"{ceilings} The machine had other work: at {disturbed} of {len(rows)} points (†) a thread waited for a core "
        f"during more than {MOST_WAITING:.0%} of the time."
    )


def summary_table(rows: Sequence[Row], candidate: str | None = None) -> str:
    """Ratio to the base GEMM: a line per layer and (r, K), a column per batch.

    Args:
        rows: points.
        candidate: of whom; None = the default implementation.
    """
    found = {(row["layer"], row["rank"], row["blocks"], row["tokens"], row["adapters"]): row for row in rows}
    body = []
    for layer, rank, blocks in dict.fromkeys(key[:3] for key in found):
        line = [found.get((layer, rank, blocks, *batch)) for batch in BATCHES]
        ratios = [None if row is None else row["over_base"].get(candidate or row["implementations"][0]) for row in line]
        body.append([layer, f"({rank}, {blocks})", *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    heads = [f"{tokens:,} of {adapters}" if adapters > 1 else f"{tokens:,} of one" for tokens, adapters in BATCHES]
    return table(["layer", "(r, K)", *heads], body)


def layer_table(rows: Sequence[Row]) -> str:
    """Times in microseconds, share of the floor, and ratios to the base GEMM."""
    own = rows[0]["implementations"]
    head = ["(r, K)", "T, adapters", "base", *own, "spread", "floor / time", "floor / time of the base", "over base"]
    head += ["one pass", "plain expand", "plain modulate", "loop", "LoRA"]
    body = []
    for row in rows:
        times, first = row["times_us"], times_of(row, own[0])
        body.append(
            [
                f"({row['rank']}, {row['blocks']})",
                f"{row['tokens']:,}, {row['adapters'] or 'none'}" + (" †" if row["waiting"] > MOST_WAITING else ""),
                *(_us(times.get(name)) for name in ("base", *own)),
                f"{_us_value(first['lowest'])} to {_us_value(first['highest'])}",
                f"{row['floor_over_time'].get(own[0], float('nan')):.2f}",
                f"{row['floor_over_time']['base']:.2f}",
                f"**{row['over_base'][own[0]]:.2f}**",
                *(_us(times.get(name)) for name in (SINGLE_PASS, "bmm expand", "bmm modulate", "loop")),
                _lora(row),
            ]
        )
    return table(head, body)


def times_of(row: Row, name: str) -> Row:
    """One candidate's times."""
    found: Row = row["times_us"][name]
    return found


def dense_table(rows: Sequence[Row]) -> str:
    """The published way beside ours."""
    body = []
    for row in rows:
        own = row["implementations"][0]
        ours, dense = times_of(row, f"{own} beside dense"), times_of(row, "dense")
        what = [row["layer"], f"({row['rank']}, {row['blocks']})", f"{row['tokens']}, {row['adapters']}"]
        body.append([*what, _us(ours), _us(dense), f"{dense['median'] / ours['median']:.0f}"])
    head = ["layer", "(r, K)", "T, adapters", "smoa_delta, us", "dense dW per forward, us", "times as long"]
    return table(head, body) if body else ""


def bar_table(rows: Sequence[Row]) -> str:
    """Each bar with its worst point."""
    body = []
    for row in rows:
        low, high = row["spread"]
        limit = f"≥ {row['at_least']:.2f}" if row["at_least"] is not None else f"≤ {row['at_most']:.2f}"
        verdict = "yes" if row["reached"] else "**no**"
        body.append([row["name"], limit, f"{row['figure']:.2f}", f"{low:.2f} to {high:.2f}", verdict])
    return table(["bar", "limit", "measured", "rounds", "reached"], body)


def tuned_table(rows: Sequence[Row]) -> str:
    """What `python -m benchmarks tune` measured."""
    body = []
    for row in rows:
        before, after = (", ".join(f"{v:g}" for v in row[key].values()) for key in ("constants_before", "constants"))
        plain = f"{row['regret_before']:.1%} → {row['regret_after']:.1%}"
        held = f"{row['regret_resident_before']:.1%} → {row['regret_resident_after']:.1%}"
        body.append([row["implementation"], before, after, plain, held, str(row["points"])])
    head = ["implementation", "form, per rank, resident: default", "tuned", "slower than the fastest way"]
    return table([*head, "with resident blocks", "points"], body)


def _lora(row: Row) -> str:
    for name, mark in (("lora (vllm)", ""), ("lora (torch)", " (torch)")):
        if name in row["times_us"]:
            return _us(row["times_us"][name]) + mark
    return "-"


def _us(times: Row | None) -> str:
    return "-" if times is None else _us_value(times["median"])


def _us_value(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _range(values: Sequence[float], digits: int) -> str:
    low, high = f"{values[0]:.{digits}f}", f"{values[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
