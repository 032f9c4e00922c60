"""Which way is the cheaper one here? Measures the cost constants of every implementation, and stores them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from benchmarks.delta.cases import Case, LayerShape, shapes
from benchmarks.delta.layers import DTYPE, build_layers
from benchmarks.delta.step import Step
from benchmarks.harness import Columns, Options, Row, of_kind, ops, table, timing
from benchmarks.harness.ops import CostModel, Way
from benchmarks.harness.timing import Budget
from smoa_serve.errors import ConfigError

WAYS: dict[Way, CostModel] = {"expand": ops.ALWAYS_EXPAND, "modulate": ops.ALWAYS_MODULATE}
WAYS["resident"] = ops.ALWAYS_RESIDENT
LAYERS, QUICK_LAYERS = ("896x4864", "2048x2048", "4096x4096"), ("2048x2048",)
# (r, K): live ranks 2, 4, 8 and 16.
CONFIGURATIONS, QUICK_CONFIGURATIONS = ((16, 8), (16, 4), (32, 4), (32, 2)), ((16, 8), (32, 4))
GROUP_TOKENS, ADAPTERS = (1, 2, 4, 8, 16, 32, 64), (1, 8)
BUDGET = Budget(seconds_each=0.08, least=4, most=16, patience_s=0.5)
QUICK_BUDGET = Budget(seconds_each=0.04, least=4, most=10, patience_s=0.2)
# The constants that are tried.
ROWS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 7.0, 9.0, 12.0, 16.0, 20.0, 26.0, 34.0, 44.0, 60.0, 80.0, 120.0, 200.0)
PER_RANK = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5, 7.0, 9.0, 12.0, 16.0)


def cases(options: Options) -> list[tuple[LayerShape, int, int]]:
    layers = options.layers or (QUICK_LAYERS if options.quick else LAYERS)
    configurations = QUICK_CONFIGURATIONS if options.quick else CONFIGURATIONS
    return [(shape, rank, blocks) for shape in shapes(layers) for rank, blocks in configurations]


def measure(chosen: Sequence[tuple[LayerShape, int, int]], options: Options) -> list[Row]:
    """A row per implementation and one per point. Stores what was found; ConfigError if that file cannot be read."""
    device, budget = torch.device(options.device), QUICK_BUDGET if options.quick else BUDGET
    names = [name for name in ops.available_implementations(device, DTYPE) if name != "reference"]
    points: dict[str, list[Row]] = {name: [] for name in names}
    for shape, rank, blocks in chosen:
        for name in names:
            copies = build_layers(shape, rank, blocks, slots=max(ADAPTERS), implementations=[name], device=device)
            for copy in copies:
                for slot in range(max(ADAPTERS)):
                    copy.banks[name].make_resident(slot)
            for adapters in ADAPTERS:
                for tokens in GROUP_TOKENS:
                    step = Step(Case(shape, rank, blocks, tokens * adapters, adapters), copies, residents=True)
                    calls = {str(way): step.delta(name, cost) for way, cost in WAYS.items()}
                    step.gate(calls)
                    times = timing.measure(calls, len(copies), device, budget)
                    points[name].append({"kind": "way", "implementation": name, **step.case.row(), "times_us": times})
        print(f"measured {shape.name}, (r, K) = ({rank}, {blocks})")
    rows, found = [], []
    for name, mine in points.items():
        before = ops.default_cost(name, device, DTYPE)
        after, others = judged(mine, before), [sample(row, 1) for row in mine]
        plain = without_resident(others)
        row = {"kind": "tuned", "implementation": name, "points": len(mine)}
        row |= {"constants": _constants(after), "constants_before": _constants(before)}
        for when, cost in (("before", before), ("after", after)):
            row |= {f"regret_{when}": regret(plain, cost), f"regret_resident_{when}": regret(others, cost)}
        rows += [row, *mine]
        threads = torch.get_num_threads() if device.type == "cpu" else None
        what = {"device": ops.device_name(device), "dtype": str(DTYPE).removeprefix("torch."), "threads": threads}
        found.append(ops.TunedCost(implementation=name, **what, **_constants(after)))
    try:
        ops.store_costs(ops.cost_file(), found)
    except ops.CostFileError as error:
        raise ConfigError(str(error)) from error
    print(f"stored in {ops.cost_file()}")
    return rows


def section(rows: Sequence[Row]) -> str:
    columns: Columns = {
        "implementation": "{implementation}",
        "form, per rank, resident: default": lambda row: ", ".join(f"{v:g}" for v in row["constants_before"].values()),
        "tuned": lambda row: ", ".join(f"{v:g}" for v in row["constants"].values()),
        "slower than the fastest way": "{regret_before:.1%} → {regret_after:.1%}",
        "with resident blocks": "{regret_resident_before:.1%} → {regret_resident_after:.1%}",
        "points": "{points}",
    }
    return table(columns, of_kind(rows, "tuned"))


Sample = tuple[int, int, dict[Way, float]]  # tokens of every adapter, live rank, time of each way


def sample(row: Row, half: int) -> Sample:
    """From the even rounds (0) or the odd ones (1): constants are judged by others than they were fitted to."""
    times: dict[Way, float] = {}
    for way in WAYS:
        rounds = row["times_us"][way]["by_round"]
        mine = [us for i, us in rounds.items() if int(i) % 2 == half]
        times[way] = statistics.median(mine or rounds.values())
    return row["tokens"] // row["adapters"], row["rank"] // row["blocks"], times


def without_resident(samples: Iterable[Sample]) -> list[Sample]:
    """The same where no blocks are held."""
    return [(t, r, {way: time for way, time in times.items() if way != "resident"}) for t, r, times in samples]


def regret(samples: Iterable[Sample], cost: CostModel) -> float:
    """Share of time lost by the ways that `cost` chooses, against the fastest: the geometric mean over all samples, so
    that no single point decides."""
    chosen = [(times[cost.way(tokens, rank, "resident" in times)], times) for tokens, rank, times in samples]
    return math.exp(statistics.mean(math.log(time / min(times.values())) for time, times in chosen)) - 1.0


def judged(points: Sequence[Row], before: CostModel) -> CostModel:
    """Constants fitted to half of the rounds, if they lose less in the other half too; else those before."""
    after, others = fit([sample(row, 0) for row in points], before), [sample(row, 1) for row in points]
    both = [*others, *without_resident(others)]
    return after if regret(both, after) < regret(both, before) else before


def fit(samples: Sequence[Sample], start: CostModel) -> CostModel:
    """The constants of least regret, of equal ones the nearest to the start."""

    def least(candidates: Sequence[CostModel], known: Sequence[Sample]) -> CostModel:
        def loss(cost: CostModel) -> tuple[float, float]:
            away = sum(abs(value - _constants(candidates[0])[name]) for name, value in _constants(cost).items())
            return round(regret(known, cost), 6), away

        return min(candidates, key=loss)

    forming = [replace(start, form=form, form_per_rank=per_rank) for form in ROWS for per_rank in PER_RANK]
    formed = least([start, *forming], without_resident(samples))
    held = [one for one in samples if "resident" in one[2]]
    return least([formed, *(replace(formed, resident=rows) for rows in ROWS)], held) if held else formed


def _constants(cost: CostModel) -> dict[str, float]:
    return {"form": cost.form, "form_per_rank": cost.form_per_rank, "resident": cost.resident}
