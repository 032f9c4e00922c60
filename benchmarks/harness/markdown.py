"""Tables and lines of a result's rows, in Markdown, and their place in a document."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.machine import device_class
from benchmarks.harness.results import Row, of_kind

# Head → a format string over a row's keys, or a function of a row.
Columns = Mapping[str, str | Callable[[Row], object]]
LOAD: Columns = {
    "tokens/s": "{tokens_per_s:.1f}",
    "lowest to highest": "{spread[0]:.1f} to {spread[1]:.1f}",
    "TTFT p50 / p99 ms": "{ttft_ms_p50:.0f} / {ttft_ms_p99:.0f}",
    "TPOT p50 / p99 ms": "{tpot_ms_p50:.1f} / {tpot_ms_p99:.1f}",
    "CPU s": lambda row: f"{statistics.median_high(row['cpu_s']):.1f}",
}


def table(columns: Columns, rows: Sequence[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([cell.format_map(row) if isinstance(cell, str) else str(cell(row)) for cell in columns.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bar_table(rows: Sequence[Row]) -> str:
    """Each bar with its figure, and where it was met or missed."""
    columns: Columns = {
        "bar": "{name}",
        "limit": limit_words,
        "measured": "{figure:.2f}",
        "repeats": "{spread[0]:.2f} to {spread[1]:.2f}",
        "reached": lambda row: "yes" if row["reached"] else "**no**",
        "device class": device_class,
    }
    return table(columns, of_kind(rows, "bar"))


def limit_words(bar: Row) -> str:
    return f"≤ {bar['at_most']:.2f}" if bar["at_least"] is None else f"≥ {bar['at_least']:.2f}"


def setup_line(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    limited = f", limited to {row['limited_to']}" if "limited_to" in row else ""
    hardware = f"{row['hardware']}{limited}, {row['cores']} cores, {row['memory_gib']} GiB"
    others = f"; others used {row['busy_before']:.0%} of the cores before the start" if row["busy_before"] > 0.1 else ""
    return f"{hardware}; Python {row['python']}, {versions}; {row['time'][:10]}{others}."


def load_words(row: Row) -> str:
    return "{streams} concurrent streams, {input_tokens} tokens in, {output_tokens} out".format_map(row["load"])


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
