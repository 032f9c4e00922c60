"""Results as pages: `python -m benchmarks publish`. The newest full run of every question and device class is written
to docs/results/QUESTION.md, every bar side by side to docs/performance.md, the first table to README.md."""

import re
from pathlib import Path

from benchmarks.harness.machine import DEVICE_CLASSES
from benchmarks.harness.markdown import bar_table, limit_words, setup_line, table, with_section
from benchmarks.harness.question import QUESTIONS, question
from benchmarks.harness.results import ROOT, Row, newest, of_kind

# What of a bar's name says only where it was the nearest to its limit, or which choice was the best one.
_WHERE, _CHOICE = re.compile(r", worst of \d+: ([^,]+),.*"), re.compile(r" \((slot|resident|merged, \w+)\)$")


def publish(root: Path = ROOT) -> None:
    for file, text in pages(root).items():
        file.write_text(text, encoding="utf-8")
    question("serving").draw(_latest(_found(root)["serving"]), root / "docs")


def pages(root: Path) -> dict[Path, str]:
    """File → what it has to be: a page a question, and the documents with the parts that are written."""
    found = _found(root)
    performance, readme = root / "docs" / "performance.md", root / "README.md"
    written = {
        performance: with_section(performance, "bars", side_by_side(found)),
        readme: with_section(readme, "results", question("serving").short_section(_latest(found["serving"]))),
    }
    words = "Written by `python -m benchmarks publish` from `benchmarks/results/`; how it is measured: [performance]"
    for what, by_class in found.items():
        parts = [f"# {what}", str(question(what).__doc__).partition("\n\n")[0], f"{words}(../performance.md)."]
        parts += [f"## {name}\n\n{page(what, rows)}" for name, rows in by_class.items()]
        written[root / "docs" / "results" / f"{what}.md"] = "\n\n".join(parts) + "\n"
    return written


def page(what: str, rows: list[Row]) -> str:
    """One run: the setup, the question's own tables, the bars."""
    bars = bar_table(rows) if of_kind(rows, "bar") else ""
    return f"{setup_line(rows[0])}\n\n{question(what).section(rows)}\n\n{bars}".rstrip()


def side_by_side(found: dict[str, dict[str, list[Row]]]) -> str:
    """Every bar and its figure on each class of devices; empty where nobody ran it."""
    lines: dict[tuple[str, str, str], Row] = {}
    for what, by_class in found.items():
        for name, rows in by_class.items():
            for row in of_kind(rows, "bar"):
                label, limit = _CHOICE.sub("", _WHERE.sub(r": \1", row["name"])), limit_words(row)
                line = {"what": what, "label": label, "limit": limit, **dict.fromkeys(DEVICE_CLASSES, "")}
                words = f"{row['figure']:.2f}" if row["reached"] else f"**{row['figure']:.2f}** missed"
                lines.setdefault((what, label, limit), line)[name] = words
    columns = {"question": "[{what}](results/{what}.md)", "figure": "{label}", "bar": "{limit}"}
    return table(columns | {name: f"{{{name}}}" for name in DEVICE_CLASSES}, list(lines.values()))


def _found(root: Path) -> dict[str, dict[str, list[Row]]]:
    """Question → device class → rows, in the order of DEVICE_CLASSES."""
    results = root / "benchmarks" / "results"
    by_question = {what: newest(what, results) for what in QUESTIONS}
    return {what: {c: rows[c] for c in DEVICE_CLASSES if c in rows} for what, rows in by_question.items()}


def _latest(by_class: dict[str, list[Row]]) -> list[Row]:
    return max(by_class.values(), key=lambda rows: str(rows[0]["time"]))
