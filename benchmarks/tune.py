"""Which way is the cheaper one here? Measures the cost constants of every implementation, and stores them."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.delta.cases import Case, LayerShape, shapes
from benchmarks.delta.layers import DTYPE, LayerCopy, build_layers
from benchmarks.delta.step import Step
from benchmarks.harness import ops, timing
from benchmarks.harness.bars import Bar
from benchmarks.harness.markdown import Columns, setup_line, table
from benchmarks.harness.ops import CostModel, Way
from benchmarks.harness.question import Options
from benchmarks.harness.results import Row, of_kind
from benchmarks.harness.timing import Budget
from smoa_serve.errors import ConfigError

WAYS: dict[Way, CostModel] = {
    "expand": ops.ALWAYS_EXPAND,
    "modulate": ops.ALWAYS_MODULATE,
    "resident": ops.ALWAYS_RESIDENT,
}
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
    """(layer, r, K)."""
    layers = options.layers or (QUICK_LAYERS if options.quick else LAYERS)
    configurations = QUICK_CONFIGURATIONS if options.quick else CONFIGURATIONS
    return [(shape, rank, blocks) for shape in shapes(layers) for rank, blocks in configurations]


def measure(chosen: Sequence[tuple[LayerShape, int, int]], options: Options) -> list[Row]:
    """A row per implementation and one per point. Stores what was found.

    Raises:
        ConfigError: the file of the constants cannot be read.
    """
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
                    case = Case(shape, rank, blocks, tokens * adapters, adapters)
                    points[name].append(_point(case, copies, name, budget))
        print(f"measured {shape.name}, (r, K) = ({rank}, {blocks})")
    rows, found = [], []
    for name, mine in points.items():
        before = ops.default_cost(name, device, DTYPE)
        after = judged(mine, before)
        rows += [_summary(name, mine, before, after), *mine]
        found.append(
            ops.TunedCost(
                device=ops.device_name(device),
                implementation=name,
                dtype=str(DTYPE).removeprefix("torch."),
                threads=torch.get_num_threads() if device.type == "cpu" else None,
                **_constants(after),
            )
        )
    try:
        ops.store_costs(ops.cost_file(), found)
    except ops.CostFileError as error:
        raise ConfigError(str(error)) from error
    print(f"stored in {ops.cost_file()}")
    return rows


def bars(rows: Sequence[Row]) -> list[Bar]:
    """None: constants that are no better than the defaults are not taken."""
    return []


def section(rows: Sequence[Row]) -> str:
    """What the constants change: geometric means over all points, of other rounds than those they were fitted to."""
    columns: Columns = {
        "implementation": "{implementation}",
        "form, per rank, resident: default": lambda row: ", ".join(f"{v:g}" for v in row["constants_before"].values()),
        "tuned": lambda row: ", ".join(f"{v:g}" for v in row["constants"].values()),
        "slower than the fastest way": "{regret_before:.1%} → {regret_after:.1%}",
        "with resident blocks": "{regret_resident_before:.1%} → {regret_resident_after:.1%}",
        "points": "{points}",
    }
    return f"{setup_line(rows[0])}\n\n{table(columns, of_kind(rows, 'tuned'))}"


def _point(case: Case, copies: Sequence[LayerCopy], name: str, budget: Budget) -> Row:
    step = Step(case, copies, residents=True)
    calls = {str(way): step.delta(name, cost) for way, cost in WAYS.items()}
    step.gate(calls)
    times = timing.measure(calls, len(copies), step.x.device, budget)
    return {"kind": "way", "implementation": name, **case.row(), "times_us": times}


@dataclass(frozen=True)
class Sample:
    """Time of each way for batches in which every adapter has `tokens` tokens and this live rank."""

    tokens: int
    rank: int
    times: dict[Way, float]

    def regret(self, cost: CostModel) -> float:
        """Share of time lost by the way that `cost` chooses, against the fastest."""
        chosen = cost.way(self.tokens, self.rank, "resident" in self.times)
        return self.times[chosen] / min(self.times.values()) - 1.0

    def without_resident(self) -> "Sample":
        """The same where no blocks are held."""
        return replace(self, times={way: time for way, time in self.times.items() if way != "resident"})


def sample(row: Row, half: int) -> Sample:
    """From the even rounds (0) or the odd ones (1): constants are judged by others than they were fitted to."""
    times: dict[Way, float] = {}
    for way in WAYS:
        rounds = row["times_us"][way]["by_round"]
        mine = [us for i, us in rounds.items() if int(i) % 2 == half]
        times[way] = statistics.median(mine or rounds.values())
    return Sample(row["tokens"] // row["adapters"], row["rank"] // row["blocks"], times)


def regret(samples: Iterable[Sample], cost: CostModel) -> float:
    """Share of time lost over all samples: their geometric mean, so that no single point decides."""
    return math.exp(statistics.mean(math.log1p(one.regret(cost)) for one in samples)) - 1.0


def judged(points: Sequence[Row], before: CostModel) -> CostModel:
    """Constants fitted to half of the rounds, if they lose less in the other half too; else those before."""
    after = fit([sample(row, 0) for row in points], before)
    others = [sample(row, 1) for row in points]
    both = [*others, *(one.without_resident() for one in others)]
    return after if regret(both, after) < regret(both, before) else before


def fit(samples: Sequence[Sample], start: CostModel) -> CostModel:
    """The constants of least regret; they stay those of `start` where nothing is gained by others."""
    forming = [one.without_resident() for one in samples]
    candidates = [replace(start, form=form, form_per_rank=per_rank) for form in ROWS for per_rank in PER_RANK]
    formed = _least([start, *candidates], lambda cost: regret(forming, cost), start)
    held = [one for one in samples if "resident" in one.times]
    if not held:
        return formed
    return _least([formed, *(replace(formed, resident=rows) for rows in ROWS)], lambda cost: regret(held, cost), formed)


def _least(candidates: Sequence[CostModel], loss: Callable[[CostModel], float], start: CostModel) -> CostModel:
    """Of least loss; of equal ones the nearest to the start."""

    def distance(cost: CostModel) -> float:
        return sum(abs(value - _constants(start)[name]) for name, value in _constants(cost).items())

    return min(candidates, key=lambda cost: (round(loss(cost), 6), distance(cost)))


def _constants(cost: CostModel) -> dict[str, float]:
    return {"form": cost.form, "form_per_rank": cost.form_per_rank, "resident": cost.resident}


def _summary(name: str, points: Sequence[Row], before: CostModel, after: CostModel) -> Row:
    others = [sample(row, 1) for row in points]
    plain = [one.without_resident() for one in others]
    return {
        "kind": "tuned",
        "implementation": name,
        "constants": _constants(after),
        "constants_before": _constants(before),
        "points": len(points),
        "regret_before": round(regret(plain, before), 4),
        "regret_after": round(regret(plain, after), 4),
        "regret_resident_before": round(regret(others, before), 4),
        "regret_resident_after": round(regret(others, after), 4),
    }
