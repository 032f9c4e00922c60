"""`python -m benchmarks tune`: measures the cost constants of every implementation here, and stores them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from smoa_kernels import available_implementations
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT, CostModel, Way, default_cost
from smoa_kernels.tuned import CostFileError, TunedCost, cost_file, device_name, store_costs

from benchmarks.bars import Bar
from benchmarks.kernels.candidates import Step, gate
from benchmarks.kernels.cases import Case, Grid, LayerShape
from benchmarks.kernels.fit import Sample, fit, regret
from benchmarks.kernels.layers import LayerSet, build_layers
from benchmarks.kernels.timing import Budget, Times, measure
from smoa_serve.errors import ConfigError

DTYPE = torch.bfloat16
WAYS: dict[Way, CostModel] = {"expand": ALWAYS_EXPAND, "modulate": ALWAYS_MODULATE, "resident": ALWAYS_RESIDENT}
LAYERS, QUICK_LAYERS = ("896x4864", "2048x2048", "4096x4096"), ("2048x2048",)
# (r, K): live ranks 2, 4, 8 and 16.
CONFIGURATIONS, QUICK_CONFIGURATIONS = ((16, 8), (16, 4), (32, 4), (32, 2)), ((16, 8), (32, 4))
GROUP_TOKENS, ADAPTERS = (1, 2, 4, 8, 16, 32, 64), (1, 8)
BUDGET = Budget(seconds_each=0.08, least=4, most=16, patience_s=0.5)
QUICK_BUDGET = Budget(seconds_each=0.04, least=4, most=10, patience_s=0.2)


@dataclass(frozen=True)
class Timed:
    """One point: the case and the times of each way."""

    case: Case
    times: dict[Way, Times]

    def sample(self, rounds: int) -> Sample:
        """From the even rounds (0) or the odd ones (1): constants are judged by others than they were fitted to."""
        halves = {way: [s for i, s in t.by_round.items() if i % 2 == rounds] for way, t in self.times.items()}
        seconds: dict[Way, float] = {
            way: Times(dict(enumerate(half or self.times[way].by_round.values()))).median
            for way, half in halves.items()
        }
        return Sample(self.case.tokens // self.case.adapters, self.case.branch_rank, seconds)


def run(
    quick: bool, device: str = "cpu", layers: Sequence[str] | None = None
) -> tuple[list[dict[str, object]], list[Bar]]:
    """Measures, fits, stores, and says what the constants change.

    Args:
        quick: one layer and half of the ranks.
        device: "cpu" or "cuda".
        layers: names out of `cases.SHAPES`.

    Returns:
        A row per implementation and one per point for JSON; no bars.

    Raises:
        ConfigError: the file of the constants cannot be read.
    """
    place, console = torch.device(device), Console(stderr=True)
    shapes = Grid(QUICK_LAYERS if quick else LAYERS).shapes(layers)
    names = [name for name in available_implementations(place, DTYPE) if name != "reference"]
    timed: dict[str, list[Timed]] = {name: [] for name in names}
    for shape in shapes:
        for rank, blocks in QUICK_CONFIGURATIONS if quick else CONFIGURATIONS:
            for name in names:
                timed[name] += _time_ways(shape, rank, blocks, name, place, QUICK_BUDGET if quick else BUDGET)
            console.print(f"measured {shape.name}, (r, K) = ({rank}, {blocks})", highlight=False)
    rows, found = [], []
    for name, points in timed.items():
        before = default_cost(name, place, DTYPE)
        after = _judged(points, before)
        rows += [_summary(name, points, before, after), *(_point_row(name, point) for point in points)]
        found.append(_entry(name, place, after))
        console.print(_words(name, points, before, after), highlight=False, soft_wrap=True)
    try:
        store_costs(cost_file(), found)
    except CostFileError as error:
        raise ConfigError(str(error)) from error
    console.print(f"stored in {cost_file()}", highlight=False, soft_wrap=True)
    return rows, []


def _time_ways(
    shape: LayerShape, rank: int, blocks: int, name: str, device: torch.device, budget: Budget
) -> Iterator[Timed]:
    """The points of one layer, (r, K) and implementation."""
    layers = build_layers(shape, rank, blocks, slots=max(ADAPTERS), implementations=[name], device=device, dtype=DTYPE)
    for copy in layers.copies:
        for slot in range(len(layers.updates)):
            copy.banks[name].make_resident(slot)
    for adapters in ADAPTERS:
        for tokens in GROUP_TOKENS:
            yield _time_point(Case(shape, rank, blocks, tokens * adapters, adapters), layers, name, budget)


def _time_point(case: Case, layers: LayerSet, name: str, budget: Budget) -> Timed:
    step = Step(case, layers, residents=True)
    calls = {str(way): step.delta(name, cost) for way, cost in WAYS.items()}
    gate(step, calls)
    times = measure(calls, len(layers.copies), layers.device, budget)
    return Timed(case, {way: times[way] for way in WAYS})


def _judged(points: Sequence[Timed], before: CostModel) -> CostModel:
    """Constants fitted to half of the rounds, if they lose less in the other half too; else those before."""
    after = fit([point.sample(0) for point in points], before)
    others = [point.sample(1) for point in points]
    both = [*others, *(sample.without_resident() for sample in others)]
    return after if regret(both, after) < regret(both, before) else before


def _entry(name: str, device: torch.device, cost: CostModel) -> TunedCost:
    return TunedCost(
        device=device_name(device),
        implementation=name,
        dtype=str(DTYPE).removeprefix("torch."),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        **_fitted(cost),
    )


def _fitted(cost: CostModel) -> dict[str, float]:
    return {"form": cost.form, "form_per_rank": cost.form_per_rank, "resident": cost.resident}


def _summary(name: str, points: Sequence[Timed], before: CostModel, after: CostModel) -> dict[str, object]:
    others = [point.sample(1) for point in points]
    plain = [sample.without_resident() for sample in others]
    return {
        "kind": "tuned",
        "implementation": name,
        "constants": _fitted(after),
        "constants_before": _fitted(before),
        "points": len(points),
        "regret_before": round(regret(plain, before), 4),
        "regret_after": round(regret(plain, after), 4),
        "regret_resident_before": round(regret(others, before), 4),
        "regret_resident_after": round(regret(others, after), 4),
    }


def _words(name: str, points: Sequence[Timed], before: CostModel, after: CostModel) -> str:
    row = _summary(name, points, before, after)
    return (
        f"{name}: {before} → {after}; slower than the fastest way by {row['regret_before']:.1%} → "
        f"{row['regret_after']:.1%}, with resident blocks {row['regret_resident_before']:.1%} → "
        f"{row['regret_resident_after']:.1%} (geometric mean over {len(points)} points, other rounds than those fitted)"
    )


def _point_row(name: str, point: Timed) -> dict[str, object]:
    times = {way: times.row() for way, times in point.times.items()}
    return {"kind": "way", "implementation": name, **point.case.row(), "times_us": times}
