"""Results as pages: `python -m benchmarks publish`. The newest full run of every question and device class is written
to benchmarks/results/QUESTION.md, every bar side by side to docs/performance.md, the first table to README.md."""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.machine import DEVICE_CLASSES
from benchmarks.harness.markdown import bar_of, replace_section, section_of, table
from benchmarks.harness.question import QUESTIONS, question
from benchmarks.harness.results import ROOT, Row, newest, of_kind

PERFORMANCE, README = Path("docs") / "performance.md", Path("README.md")
# What of a bar's name says only where it was the nearest to its limit, or which choice was the best one.
_WHERE, _CHOICE = re.compile(r", worst of \d+: ([^,]+),.*"), re.compile(r" \((slot|resident|merged, \w+)\)$")


def publish(root: Path = ROOT) -> None:
    """Write all pages and pictures anew."""
    found = _found(root)
    for file, text in pages(root, found).items():
        file.write_text(text, encoding="utf-8")
    for file, marker, text in sections(root, found):
        replace_section(file, marker, text)
    for what, by_class in found.items():
        if hasattr(question(what), "draw") and by_class:
            question(what).draw(next(iter(by_class.values())), root / "docs")


def stale(root: Path = ROOT) -> list[Path]:
    """Pages that say something else than the stored results."""
    found = _found(root)
    wrong = [file for file, text in pages(root, found).items() if not file.is_file() or file.read_text() != text]
    return wrong + [file for file, marker, text in sections(root, found) if section_of(file, marker) != text]


def pages(root: Path, found: dict[str, dict[str, list[Row]]]) -> dict[Path, str]:
    """File → content of the page of every question."""
    written = {}
    for what, by_class in found.items():
        parts = [f"# {what}", (question(what).__doc__ or "").strip()]
        words = "Written by `python -m benchmarks publish` from the lines beside this page"
        parts.append(f"{words}; how it is measured: [performance](../../docs/performance.md).")
        parts += [f"## {name}\n\n{question(what).section(rows)}" for name, rows in by_class.items()]
        written[root / "benchmarks" / "results" / f"{what}.md"] = "\n\n".join(parts) + "\n"
    return written


def sections(root: Path, found: dict[str, dict[str, list[Row]]]) -> Iterator[tuple[Path, str, str]]:
    """(file, marker, content) of what stands inside documents."""
    yield root / PERFORMANCE, "bars", side_by_side(found)
    if found["serving"]:
        latest = max(found["serving"].values(), key=lambda rows: str(rows[0]["time"]))
        yield root / README, "results", question("serving").short_section(latest)


def side_by_side(found: dict[str, dict[str, list[Row]]]) -> str:
    """Every bar and its figure on each class of devices; empty where nobody ran it."""
    lines: dict[tuple[str, str, str], Row] = {}
    for what, by_class in found.items():
        for name, rows in by_class.items():
            for row in of_kind(rows, "bar"):
                label, limit = _CHOICE.sub("", _WHERE.sub(r": \1", row["name"])), bar_of(row).limit
                line = {"what": what, "label": label, "limit": limit, **dict.fromkeys(DEVICE_CLASSES, "")}
                words = f"{row['figure']:.2f}" if row["reached"] else f"**{row['figure']:.2f}** missed"
                lines.setdefault((what, label, limit), line)[name] = words
    columns = {"question": "[{what}](../benchmarks/results/{what}.md)", "figure": "{label}", "bar": "{limit}"}
    return table(columns | {name: f"{{{name}}}" for name in DEVICE_CLASSES}, list(lines.values()))


def _found(root: Path) -> dict[str, dict[str, list[Row]]]:
    """Question → device class → rows, in the order of DEVICE_CLASSES."""
    results = root / "benchmarks" / "results"
    by_question = {what: newest(what, results) for what in QUESTIONS}
    return {what: {c: rows[c] for c in DEVICE_CLASSES if c in rows} for what, rows in by_question.items()}
