"""docs/method.md: the tables and plots between two marks are written, the text around them is kept."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.method_models import METHODS, SHUFFLED, SMOA
from benchmarks.setup_facts import facts

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "method.md"
PLOT = DOCS / "method.png"
BEGIN, END = "<!-- figures: written by python -m benchmarks method -->", "<!-- end of figures -->"
COLOURS = dict(zip(METHODS, ("#4c78a8", "#72b7b2", "#f2a541", "#e4572e", "#8c8c8c"), strict=True))
Row = Mapping[str, Any]


def write_report(rows: Sequence[Row], seeds: int) -> None:
    """Replace the figures in docs/method.md and draw docs/method.png.

    Args:
        rows: of `benchmarks.method.run`.
        seeds: behind every mean.
    """
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{figures(rows, seeds)}\n{END}{after}", encoding="utf-8")
    draw(rows, PLOT)


def figures(rows: Sequence[Row], seeds: int) -> str:
    """The tables as Markdown."""
    measured = facts()
    versions = ", ".join(f"{name} {found}" for name, found in dict(measured["versions"]).items())  # type: ignore[call-overload]
    base = next(row for row in rows if row["kind"] == "base")
    parts = [
        f"Measured on {measured['hardware']}, {measured['cores']} cores, {versions}. Mean ± standard deviation of "
        f"{seeds} seeds that the search did not see; in brackets the learning rate that the search chose.",
        "### Regression: ‖ΔW − target‖ / ‖target‖",
        _comparison([row for row in rows if row["kind"] == "regression"]),
        "### Dialects of a character model: loss on new sentences, nats per character",
        f"The untouched base has {base['loss_of_its_own_dialect']:.3f} on its own dialect, "
        + ", ".join(f"{base[task]:.2f} on “{task}”" for task in _tasks(rows, "dialect"))
        + ".",
        _comparison([row for row in rows if row["kind"] == "dialect"]),
        _paired(rows),
        "### What an update reaches, as shares of min(H_out, H_in)",
        _reach(rows),
        "![errors of all methods](method.png)",
    ]
    return "\n\n".join(parts)


def _tasks(rows: Iterable[Row], kind: str) -> list[str]:
    return list(dict.fromkeys(str(row["task"]) for row in rows if row["kind"] == kind))


def _comparison(rows: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    lines = [_line("method", "parameters", *tasks), _line(*["---"] * (2 + len(tasks)))]
    for method in METHODS:
        own = {row["task"]: row for row in rows if row["method"] == method}
        cells = [f"{own[t]['mean']:.3f} ± {own[t]['spread']:.3f} ({own[t]['learning_rate']:g})" for t in tasks]
        lines.append(_line(method, str(own[tasks[0]]["parameters"]), *cells))
    return "\n".join(lines)


def _paired(rows: Sequence[Row]) -> str:
    """What the order adds, seed by seed: both sides saw the same data."""
    parts = []
    for task in _tasks(rows, "dialect"):
        spectral, shuffled = (
            next(row["errors"] for row in rows if row.get("task") == task and row["method"] == method)
            for method in (SMOA, SHUFFLED)
        )
        gains = [other - own for own, other in zip(spectral, shuffled, strict=True)]
        better = sum(gain > 0 for gain in gains)
        parts.append(
            f"“{task}” {statistics.mean(gains):.4f} lower on average, better in {better} of {len(gains)} seeds"
        )
    return f"The spectral order against the random one, seed by seed: {'; '.join(parts)}."


def _reach(rows: Sequence[Row]) -> str:
    dialects = _tasks(rows, "dialect")
    head = ["method", "rank, random factors", "effective rank, random factors", "directions of W, random factors"]
    head += [f"effective rank learned on “{task}”" for task in dialects]
    lines = [_line(*head), _line(*["---"] * len(head))]
    for method in METHODS:
        family = next(row for row in rows if row["kind"] == "reach" and row["method"] == method)
        cells = [f"{family[key]:.0%}" for key in ("rank", "effective_rank", "directions")]
        for task in dialects:
            row = next(r for r in rows if r["kind"] == "dialect" and r["method"] == method and r["task"] == task)
            cells.append(f"{row['reach']['effective_rank']:.0%}")
        lines.append(_line(method, *cells))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def draw(rows: Sequence[Row], image: Path) -> None:
    """Means and spread over seeds: bars for the regression, points for the dialects, whose axis does not start at 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2, gridspec_kw={"width_ratios": [4, 2]})
    for kind, axes in (("regression", bars), ("dialect", points)):
        tasks = _tasks(rows, kind)
        width = 0.8 / len(METHODS)
        for place, method in enumerate(METHODS):
            own = {row["task"]: row for row in rows if row["kind"] == kind and row["method"] == method}
            means = [float(own[task]["mean"]) for task in tasks]
            spread = [float(own[task]["spread"]) for task in tasks]
            at = [number + (place - (len(METHODS) - 1) / 2) * width for number in range(len(tasks))]
            if kind == "regression":
                axes.bar(at, means, width, yerr=spread, label=method, color=COLOURS[method], capsize=2)
            else:
                axes.errorbar(at, means, yerr=spread, fmt="o", color=COLOURS[method], capsize=3)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.grid(axis="y", alpha=0.3)
    bars.set_ylabel("‖ΔW − target‖ / ‖target‖")
    points.set_ylabel("loss on new sentences, nats per character")
    figure.legend(loc="outside upper center", ncols=len(METHODS), fontsize=9)
    figure.savefig(image, dpi=110)
