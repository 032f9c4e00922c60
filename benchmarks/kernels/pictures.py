"""Pictures of a kernels result: the delta's cost over the batch size for each workload, and a roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoa_kernels.testing import WORKLOADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
COLOURS = dict(zip(WORKLOADS, ("#e4572e", "#4c78a8", "#54a24b", "#8c8c8c", "#b279a2"), strict=True))
LORA = "lora (vllm)"


def draw_ratios(rows: Sequence[Row], image: Path) -> None:
    """The delta's time over the base GEMM's, over T, a line per workload and a panel per (r, K).

    Args:
        rows: of kind "kernels"; those of a workload are drawn.
        image: PNG to write.
    """
    rows = [row for row in rows if row["workload"] in WORKLOADS]
    panels = sorted({(row["rank"], row["blocks"]) for row in rows})
    figure = _figure(len(panels))
    for axes, (rank, blocks) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        here = [row for row in rows if (row["rank"], row["blocks"]) == (rank, blocks)]
        for name in WORKLOADS:
            points = sorted((row["tokens"], _over_base(row)) for row in here if row["workload"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[name], label=name)
        other = sorted((row["tokens"], row["over_base"][LORA]) for row in here if _shows_lora(row))
        if other:
            axes.plot(*zip(*other, strict=True), "k:", label="LoRA of equal size in vLLM, distinct")
        axes.axhline(1.0, color="#cccccc", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="tokens in the step", title=f"r = {rank}, K = {blocks}")
        ticks = sorted({row["tokens"] for row in here})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    axes = figure.axes[0]
    axes.set_ylabel("time of the delta / time of the base GEMM")
    axes.legend(fontsize=8)
    figure.suptitle(f"{rows[0]['layer']}, 64 slots, {_machine(rows[0])}", fontsize=10)
    _save(figure, image)


def draw_roofline(rows: Sequence[Row], image: Path) -> None:
    """FLOP/s over FLOP per byte: base GEMM and delta of all points under the roof that was measured.

    Args:
        rows: of kind "kernels", of one machine; their floors count the work.
        image: PNG to write.
    """
    rows = [row for row in rows if "delta" in row["work"]]
    figure = _figure(1)
    axes = figure.subplots(1, 1)
    own = str(rows[0]["implementations"][0])
    for name, work, colour in (("base GEMM", "base", "#8c8c8c"), (f"delta ({own})", "delta", "#e4572e")):
        times = [row["times_us"]["base" if work == "base" else own]["median"] / 1e6 for row in rows]
        flops = [row["work"][work]["flops"] for row in rows]
        intensity = [row["work"][work]["flops"] / row["work"][work]["num_bytes"] for row in rows]
        speeds = [count / seconds / 1e9 for count, seconds in zip(flops, times, strict=True)]
        axes.scatter(intensity, speeds, s=14, color=colour, label=name, alpha=0.7)
    _roof(axes, rows)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the least traffic", ylabel="GFLOP/s")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(f"{len(rows)} points, {_machine(rows[0])}", fontsize=10)
    _save(figure, image)


def _roof(axes: "Axes", rows: Sequence[Row]) -> None:
    bandwidth = max(row["ceilings"]["bytes_per_s"] for row in rows)
    rate = max(row["ceilings"]["flops_per_s"] for row in rows)
    intensities = [work["flops"] / work["num_bytes"] for row in rows for work in row["work"].values()]
    low, high = min(intensities) / 2, max(intensities) * 2
    corner = rate / bandwidth
    axes.plot([low, corner, high], [low * bandwidth / 1e9, rate / 1e9, rate / 1e9], "k-", linewidth=1)
    axes.annotate(
        f"{rate / 1e12:.2f} TFLOP/s", (corner, rate / 1e9), xytext=(0, 4), textcoords="offset points", fontsize=8
    )
    axes.annotate(
        f"{bandwidth / 1e9:.0f} GB/s",
        (low, low * bandwidth / 1e9),
        xytext=(8, 0),
        textcoords="offset points",
        fontsize=8,
    )


def _shows_lora(row: Row) -> bool:
    return row["workload"] == "distinct" and LORA in row["over_base"]


def _over_base(row: Row) -> float:
    return float(row["over_base"][row["implementations"][0]])


def _machine(row: Row) -> str:
    return f"{row['hardware']}, {row['dtype']}" + (f", {row['threads']} threads" if row["device"] == "cpu" else "")


def _figure(panels: int) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels + 1, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", image: Path) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)
