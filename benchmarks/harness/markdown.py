"""Tables and lines of a result's rows, in Markdown, and their place in a document."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.bars import Bar
from benchmarks.harness.machine import device_class
from benchmarks.harness.results import Row, of_kind

Columns = Mapping[
    str, str | Callable[[Row], object]
]  # head → a format string over a row's keys, or a function of a row
LOAD: Columns = {
    "tokens/s": "{tokens_per_s:.1f}",
    "lowest to highest": "{spread[0]:.1f} to {spread[1]:.1f}",
    "TTFT p50 / p99 ms": "{ttft_ms_p50:.0f} / {ttft_ms_p99:.0f}",
    "TPOT p50 / p99 ms": "{tpot_ms_p50:.1f} / {tpot_ms_p99:.1f}",
    "CPU s": lambda row: f"{statistics.median_high(row['cpu_s']):.1f}",
}


def table(columns: Columns, rows: Sequence[Row]) -> str:
    """A Markdown table with a line per row."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [
        [cell.format_map(row) if isinstance(cell, str) else str(cell(row)) for cell in columns.values()] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bar_table(rows: Sequence[Row]) -> str:
    """Each bar with its figure, and where it was met or missed."""
    columns: Columns = {
        "bar": "{name}",
        "limit": lambda row: bar_of(row).limit,
        "measured": "{figure:.2f}",
        "repeats": "{spread[0]:.2f} to {spread[1]:.2f}",
        "reached": lambda row: "yes" if row["reached"] else "**no**",
        "device class": device_class,
    }
    return table(columns, of_kind(rows, "bar"))


def bar_of(row: Row) -> Bar:
    """The bar of a line of results."""
    return Bar(row["name"], row["figure"], row["at_least"], tuple(row["spread"]), row.get("at_most"))


def setup_line(row: Row) -> str:
    """Hardware and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    limited = f", limited to {row['limited_to']}" if "limited_to" in row else ""
    hardware = f"{row['hardware']}{limited}, {row['cores']} cores, {row['memory_gib']} GiB"
    others = f"; others used {row['busy_before']:.0%} of the cores before the start" if row["busy_before"] > 0.1 else ""
    return f"{hardware}; Python {row['python']}, {versions}; {row['time'][:10]}{others}."


def load_words(row: Row) -> str:
    """The load of a row of requests."""
    words = "{streams} concurrent streams, {input_tokens} tokens in, {output_tokens} out"
    return words.format_map(row["load"])


def with_section(file: Path, name: str, text: str) -> str:
    """A document with `text` between its markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise ValueError(f"{file} has no markers {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
