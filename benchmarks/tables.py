"""Tables and lines of a result's rows, in Markdown, and their place in a document."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


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
