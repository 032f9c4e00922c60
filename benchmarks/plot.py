"""A bar chart of a serving result: `python -m benchmarks.plot RESULT.jsonl docs/serving.png`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"base": "#8c8c8c", "LoRA": "#4c78a8", "SMoA": "#e4572e"}


def main(arguments: list[str] | None = None) -> int:
    """Draw one chart per model of the result, side by side.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    options = parser.parse_args(arguments)
    lines = [json.loads(line) for line in options.result.read_text(encoding="utf-8").splitlines()]
    draw([line for line in lines if line["kind"] == "serving"], options.image)
    return 0


def draw(rows: list[dict[str, Any]], image: Path) -> None:
    """Draw throughput with the spread of the repeats.

    Args:
        rows: of kind "serving".
        image: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure = Figure(figsize=(6.5 * len(models), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        found = [row for row in rows if row["model"] == model][::-1]
        names = [str(row["variant"]) for row in found]
        speeds = [float(row["tokens_per_s"]) for row in found]
        below = [float(row["tokens_per_s"]) - float(row["spread"][0]) for row in found]
        above = [float(row["spread"][1]) - float(row["tokens_per_s"]) for row in found]
        axes.barh(names, speeds, xerr=[below, above], color=[_colour(name) for name in names], capsize=3)
        load = found[0]["load"]
        axes.set_title(f"{model}, {load['streams']} streams, {load['input_tokens']} in / {load['output_tokens']} out")
        axes.set_xlabel("tokens/s (median, lowest and highest repeat)")
    figure.suptitle(str(rows[0]["hardware"]) + f", {rows[0]['cores']} cores")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)


def _colour(variant: str) -> str:
    return next(colour for word, colour in COLOURS.items() if word in variant)


if __name__ == "__main__":
    sys.exit(main())
