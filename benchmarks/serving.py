"""What do adapters cost end to end? The base alone and with the plugin, SMoA adapters, vLLM's own LoRA adapters."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.delta import baselines
from benchmarks.delta.cases import Case, LayerShape
from benchmarks.delta.layers import DTYPE, build_layers
from benchmarks.delta.step import Step
from benchmarks.harness import LOAD, Bar, Options, Row, median_bar, models, of_kind, ops, ratio_bar, table, timing
from benchmarks.harness.load import Load, Repeat, figures, take_turns
from benchmarks.harness.markdown import load_words, setup_line
from benchmarks.harness.results import grouped
from benchmarks.harness.servers import FLAGS, Server, running

CONFIGURATIONS = ((16, 4), (32, 8))  # (r, K): both have r/K = 4, as many parameters as LoRA of rank 4
LORA_RANK = 4
ADAPTERS = 16
STOCK, EAGER, LORA, PLUGIN = "vLLM alone", "vLLM alone, eager", "vLLM with LoRA", "vLLM with smoa-serve"
CPU = torch.device("cpu")
NAME, WORDS = "smoa-r{}-k{}-{}".format, "{} SMoA r={} K={}".format
COLOURS = {"base": "#8c8c8c", "LoRA": "#4c78a8", "SMoA": "#e4572e"}


@dataclass(frozen=True)
class Plan:
    shape: models.Shape | None  # None = the demo's
    load: Load
    repeats: int
    counts: tuple[int, ...]  # of SMoA adapters
    delta_repeats: int  # of each time of the deltas alone
    eager: bool  # also the base without compilation: vLLM compiles nothing on a CPU once LoRA is enabled


def cases(options: Options) -> list[Plan]:
    if options.quick:
        return [Plan(models.QWEN_05B_QUICK, Load(16, 64, 32), 7, (16,), 3, False)]
    return [Plan(shape, Load(16, 128, 64), 3, (1, 4, 16), 5, True) for shape in (models.QWEN_05B, None)]


def measure(plans: Sequence[Plan], options: Options) -> list[Row]:
    rows: list[Row] = []
    for plan in plans:
        rows += [delta_row(plan.shape, *each, plan) for each in CONFIGURATIONS if plan.shape]
        rows += _compare(plan)
    return rows


def _compare(plan: Plan) -> Iterator[Row]:
    base = models.random_base(plan.shape) if plan.shape else models.demo_base()
    lora = {f"lora-{i}": models.random_lora(base, LORA_RANK, i) for i in range(ADAPTERS)}
    smoa = {NAME(*each, i): models.random_smoa(base, *each, i) for each in CONFIGURATIONS for i in range(ADAPTERS)}
    servers = [Server(STOCK, False), Server(LORA, False, lora), Server(PLUGIN, True, smoa)]
    if plan.eager:
        servers.insert(1, Server(EAGER, False, flags=(*FLAGS, "--enforce-eager")))
    # Variant → (server, whom the streams ask in turn).
    variants = {f"base, {server.name}": (server.name, ["base"]) for server in servers}
    variants[f"{ADAPTERS} LoRA r={LORA_RANK}"] = (LORA, list(lora))
    for each in CONFIGURATIONS:
        for count in plan.counts:
            variants[WORDS(count, *each)] = (PLUGIN, [NAME(*each, i) for i in range(count)])
    load = plan.load
    with running(base, servers) as processes:
        for server, asked in variants.values():  # adapters come into their slots, buffers into being
            replace(load, output_tokens=4).send(processes[server], asked, max(load.streams, len(asked)))

        def ask(variant: str, seed: int) -> Repeat:
            server, asked = variants[variant]
            return load.send(processes[server], asked, load.streams, seed)

        results = take_turns(list(variants), plan.repeats, ask)
    shared = {"kind": "serving", "model": plan.shape.name if plan.shape else "demo", "load": asdict(load)}
    for name, found in results.items():
        yield {**shared, "variant": name, **figures(found)}


def delta_row(shape: models.Shape, rank: int, num_blocks: int, plan: Plan) -> Row:
    """Time of all deltas of a load (one prefill of all prompts, then decode steps), by our operation and by the dense
    way; one decoder layer is measured and stands for all."""
    seconds = {"own": [0.0] * plan.delta_repeats, "dense": [0.0] * plan.delta_repeats}
    budget = timing.Budget(0.0, plan.delta_repeats, plan.delta_repeats)
    load, first = plan.load, ops.available_implementations(CPU, DTYPE)[0]
    for layer in layer_shapes(shape):
        copies = build_layers(
            layer, rank, num_blocks, slots=ADAPTERS, implementations=[first], device=CPU, num_copies=1
        )
        for tokens, times in ((load.streams * load.input_tokens, 1), (load.streams, load.output_tokens - 1)):
            step = Step(Case(layer, rank, num_blocks, tokens, ADAPTERS), copies)
            calls = {"own": step.delta(first), "dense": baselines.dense(step)}
            step.gate(calls)
            for name, found in timing.measure(calls, 1, CPU, budget).items():
                for i, us in enumerate(found["by_round"].values()):
                    seconds[name][i] += us / 1e6 * times * shape.num_hidden_layers
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    medians = {f"{name}_s": statistics.median(found) for name, found in seconds.items()}
    return {"kind": "delta", "model": shape.name, "rank": rank, "num_blocks": num_blocks, **medians, "ratios": ratios}


def layer_shapes(shape: models.Shape) -> list[LayerShape]:
    """The packed layers of a decoder layer."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    sizes = {"qkv": (hidden, (hidden, kv, kv)), "o": (hidden, (hidden,))}
    sizes |= {"gate_up": (hidden, (wide, wide)), "down": (wide, (hidden,))}
    return [LayerShape(name, *size) for name, size in sizes.items()]


def bars(rows: Sequence[Row]) -> list[Bar]:
    found = {row["variant"]: row["values"] for row in next(iter(grouped(of_kind(rows, "serving"), "model").values()))}
    stock, lora = f"base, {STOCK}", f"{ADAPTERS} LoRA r={LORA_RANK}"
    plugin = found[f"base, {PLUGIN}"]
    bars = [
        ratio_bar("base with the plugin / vLLM alone", plugin, found[stock], 0.97),
        ratio_bar("base with the plugin / vLLM with --enable-lora", plugin, found[f"base, {LORA}"], 0.97),
    ]
    for each in CONFIGURATIONS:
        name = WORDS(ADAPTERS, *each)
        bars.append(ratio_bar(f"{name} / {lora}", found[name], found[lora], 1.0))
        bars.append(ratio_bar(f"{name} / {stock}", found[name], found[stock], 0.5))
    for row in of_kind(rows, "delta"):
        what = f"{ADAPTERS} adapters (r={row['rank']}, K={row['num_blocks']})"
        bars.append(median_bar(f"delta's own time against the dense way's, {what}", row["ratios"], 10.0))
    return bars


def section(rows: Sequence[Row]) -> str:
    parts = []
    for model, found in grouped(of_kind(rows, "serving"), "model").items():
        parts.append(f"**{model}**, {load_words(found[0])}\n\n{table({'variant': '{variant}', **LOAD}, found)}")
    what = {f"{ADAPTERS} adapters, all layers, the whole load": "r={rank}, K={num_blocks}"}
    times = {"smoa_delta": "{own_s:.2f} s", "dense dW each forward": "{dense_s:.1f} s"}
    return "\n\n".join([*parts, table(what | times, of_kind(rows, "delta"))])


def short_section(rows: Sequence[Row]) -> str:
    """The picture of `draw` and what it shows, for the README."""
    model, found = next(iter(grouped(of_kind(rows, "serving"), "model").items()))
    words = f"{model} with random weights, {load_words(found[0])}. {setup_line(rows[0])}"
    return f"![Tokens per second of base, LoRA and SMoA adapters](docs/serving.png)\n\n{words}"


def draw(rows: Sequence[Row], folder: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_model = grouped(of_kind(rows, "serving"), "model")
    figure = Figure(figsize=(6.5 * len(by_model), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (model, found) in zip(figure.subplots(1, len(by_model), squeeze=False)[0], by_model.items(), strict=True):
        names, speeds = ([row[key] for row in found[::-1]] for key in ("variant", "tokens_per_s"))
        spread = [[abs(row["tokens_per_s"] - row["spread"][side]) for row in found[::-1]] for side in (0, 1)]
        colours = [next(colour for word, colour in COLOURS.items() if word in name) for name in names]
        axes.barh(names, speeds, xerr=spread, color=colours, capsize=3)
        axes.set_title(f"{model}, {load_words(found[0])}", fontsize=10)
        axes.set_xlabel("tokens/s (median, lowest and highest repeat)")
    figure.suptitle(f"{rows[0]['hardware']}, {rows[0]['cores']} cores")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "serving.png", dpi=130)
