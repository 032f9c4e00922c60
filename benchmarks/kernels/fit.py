"""Cost constants from measured times: those that lose least against the faster way, over all points."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from smoa_kernels.cost import CostModel, Way

ROWS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 7.0, 9.0, 12.0, 16.0, 20.0, 26.0, 34.0, 44.0, 60.0, 80.0, 120.0, 200.0)
PER_RANK = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5, 7.0, 9.0, 12.0, 16.0)


@dataclass(frozen=True)
class Sample:
    """Seconds of each way for batches in which every adapter has `tokens` tokens and this live rank."""

    tokens: int
    rank: int
    seconds: dict[Way, float]

    def regret(self, cost: CostModel) -> float:
        """Share of time lost by the way that `cost` chooses, against the fastest."""
        chosen = cost.way(self.tokens, self.rank, "resident" in self.seconds)
        return self.seconds[chosen] / min(self.seconds.values()) - 1.0

    def without_resident(self) -> "Sample":
        """The same where no blocks are held."""
        return replace(self, seconds={way: s for way, s in self.seconds.items() if way != "resident"})


def regret(samples: Iterable[Sample], cost: CostModel) -> float:
    """Share of time lost over all samples: their geometric mean, so that no single point decides."""
    return math.exp(statistics.mean(math.log1p(sample.regret(cost)) for sample in samples)) - 1.0


def fit(samples: Sequence[Sample], start: CostModel) -> CostModel:
    """The constants of least regret.

    Args:
        samples: measured; those with a resident way also decide about `resident`.
        start: the present constants: they stay where nothing is gained by others.
    """
    forming = [sample.without_resident() for sample in samples]
    candidates = [replace(start, form=form, form_per_rank=per_rank) for form in ROWS for per_rank in PER_RANK]
    formed = _least([start, *candidates], lambda cost: regret(forming, cost), start)
    held = [sample for sample in samples if "resident" in sample.seconds]
    if not held:
        return formed
    return _least([formed, *(replace(formed, resident=rows) for rows in ROWS)], lambda cost: regret(held, cost), formed)


def _least(candidates: Sequence[CostModel], loss: Callable[[CostModel], float], start: CostModel) -> CostModel:
    """Of least loss; of equal ones the nearest to the start."""
    return min(candidates, key=lambda cost: (round(loss(cost), 6), _distance(cost, start)))


def _distance(cost: CostModel, other: CostModel) -> float:
    return (
        abs(cost.form - other.form)
        + abs(cost.form_per_rank - other.form_per_rank)
        + abs(cost.resident - other.resident)
    )
