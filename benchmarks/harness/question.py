"""What a question is, and which there are.

Each is a module of this package: `cases(options)` says what is measured; `measure(cases, options)` gives rows for JSON,
every computation gated before its clock runs; `section(rows)` is Markdown, from rows as they are stored. One that has
bars has `bars(rows)`, which these rows decide; one that has a picture has `draw(rows, folder)`.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

QUESTIONS = ("serving", "merge", "kernels", "tune", "training", "method", "churn")
IN_THIS_PROCESS = ("kernels", "tune", "training", "method")  # they compute where `device` says


@dataclass(frozen=True)
class Options:
    """How a question is asked: at a smaller size; for kernels and tune on which device, and which layers by name."""

    quick: bool = False
    device: str = "cpu"
    layers: tuple[str, ...] | None = None


def question(what: str) -> Any:
    return import_module(f"benchmarks.{what}")
