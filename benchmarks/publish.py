"""A result of `serving` or `merge` into the documents: `python -m benchmarks.publish RESULT.jsonl`.

Replaces what stands between the markers in docs/performance.md and README.md; draws docs/serving.png.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.plot import draw

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Publish one result.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ and README.md are")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.result.read_text(encoding="utf-8").splitlines()]
    if rows[0]["what"] == "merge":
        from benchmarks import merge_publish

        replace_section(options.root / "docs" / "performance.md", "merging", merge_publish.section(rows))
        return 0
    draw([row for row in rows if row["kind"] == "serving"], options.root / "docs" / "serving.png")
    replace_section(options.root / "docs" / "performance.md", "serving", full_section(rows))
    replace_section(options.root / "README.md", "results", short_section(rows))
    return 0


def replace_section(file: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = file.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{file} has no markers {begin} and {end}")
    file.write_text(pattern.sub(lambda match: f"{begin}\n{text}\n{end}", content), encoding="utf-8")


def full_section(rows: Sequence[Row]) -> str:
    """Setup, one table per model, the deltas' own times and the bars."""
    parts = [setup_line(rows[0])]
    serving = [row for row in rows if row["kind"] == "serving"]
    for model in dict.fromkeys(row["model"] for row in serving):
        found = [row for row in serving if row["model"] == model]
        parts.append(f"**{model}**, {load_words(found[0])}\n\n{model_table(found)}")
    parts.append(delta_table([row for row in rows if row["kind"] == "delta"]))
    parts.append(bar_table([row for row in rows if row["kind"] == "bar"]))
    return "\n\n".join(parts)


def short_section(rows: Sequence[Row]) -> str:
    """The first model's table, for the README."""
    serving = [row for row in rows if row["kind"] == "serving"]
    first = [row for row in serving if row["model"] == serving[0]["model"]]
    words = f"{first[0]['model']} with random weights, {load_words(first[0])}. {setup_line(rows[0])}"
    return f"{words}\n\n{model_table(first)}"


def setup_line(row: Row) -> str:
    """Hardware and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    hardware = f"{row['hardware']}, {row['cores']} cores, {row['memory_gib']} GiB"
    others = f"; others used {row['busy_before']:.0%} of the cores before the start" if row["busy_before"] > 0.1 else ""
    return f"{hardware}; Python {row['python']}, {versions}; {row['time'][:10]}{others}."


def load_words(row: Row) -> str:
    """The load of a serving row."""
    load = row["load"]
    return f"{load['streams']} concurrent streams, {load['input_tokens']} tokens in, {load['output_tokens']} out"


def model_table(rows: Sequence[Row], names: Mapping[str, str] = MappingProxyType({"variant": "variant"})) -> str:
    """Throughput and latency of each variant.

    Args:
        rows: one each.
        names: which of a row's keys say what it is, and the heads of their columns.
    """
    head = [*names.values(), "tokens/s", "lowest to highest", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "CPU s"]
    body = []
    for row in rows:
        low, high = row["spread"]
        cpu_s = sorted(row["cpu_s"])[len(row["cpu_s"]) // 2]
        body.append(
            [
                *(row[key] for key in names),
                f"{row['tokens_per_s']:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{row['ttft_ms_p50']:.0f} / {row['ttft_ms_p99']:.0f}",
                f"{row['tpot_ms_p50']:.1f} / {row['tpot_ms_p99']:.1f}",
                f"{cpu_s:.1f}",
            ]
        )
    return table(head, body)


def delta_table(rows: Sequence[Row]) -> str:
    """All deltas of the load: our operation's time, the dense way's."""
    body = [
        [f"r={row['rank']}, K={row['num_blocks']}", f"{row['own_s']:.2f} s", f"{row['dense_s']:.1f} s"] for row in rows
    ]
    return table(["16 adapters, all layers, the whole load", "smoa_delta", "dense dW each forward"], body)


def bar_table(rows: Sequence[Row]) -> str:
    """Each bar with its figure."""
    body = [
        [
            row["name"],
            f"{row['at_least']:.2f}" if row["at_least"] is not None else f"at most {row['at_most']:.2f}",
            f"{row['figure']:.2f}",
            f"{row['spread'][0]:.2f} to {row['spread'][1]:.2f}",
            "yes" if row["reached"] else "**no**",
        ]
        for row in rows
    ]
    return table(["bar", "at least", "measured", "repeats", "reached"], body)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
