"""A result of `serving` or `merge` into the documents: `python -m benchmarks.publish RESULT.jsonl`.

Replaces what stands between the markers in docs/performance.md and README.md; draws docs/serving.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import merge_publish
from benchmarks.plot import draw
from benchmarks.tables import ROOT, Row, bar_table, load_words, model_table, replace_section, setup_line, table


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
    what = rows[0]["what"]
    if what not in ("serving", "merge"):
        parser.error(
            f"{options.result} is a result of {what!r}; allowed are serving and merge (kernels: "
            "python -m benchmarks.kernels.publish)"
        )
    if what == "merge":
        replace_section(options.root / "docs" / "performance.md", "merging", merge_publish.section(rows))
        return 0
    draw([row for row in rows if row["kind"] == "serving"], options.root / "docs" / "serving.png")
    replace_section(options.root / "docs" / "performance.md", "serving", full_section(rows))
    replace_section(options.root / "README.md", "results", short_section(rows))
    return 0


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


def delta_table(rows: Sequence[Row]) -> str:
    """All deltas of the load: our operation's time, the dense way's."""
    body = [
        [f"r={row['rank']}, K={row['num_blocks']}", f"{row['own_s']:.2f} s", f"{row['dense_s']:.1f} s"] for row in rows
    ]
    return table(["16 adapters, all layers, the whole load", "smoa_delta", "dense dW each forward"], body)


if __name__ == "__main__":
    sys.exit(main())
