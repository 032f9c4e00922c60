"""Bars: what a measurement has to reach, and whether it did."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Bar:
    """One bar and the figure beside it: `at_least` where higher is better, `at_most` where lower is.

    `spread` is the lowest and the highest figure of the repeats.
    """

    name: str
    figure: float
    at_least: float | None
    spread: tuple[float, float]
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        above, below = self.at_least, self.at_most
        return (above is None or self.figure >= above) and (below is None or self.figure <= below)

    def row(self) -> dict[str, object]:
        return {"kind": "bar", **asdict(self), "reached": self.reached}


def ratio_bar(name: str, values: Sequence[float], reference: Sequence[float], at_least: float) -> Bar:
    """The median of the ratios of paired repeats: both sides of a pair met the same state of the machine."""
    return median_bar(name, [value / other for value, other in zip(values, reference, strict=True)], at_least)


def median_bar(name: str, figures: Sequence[float], at_least: float | None = None, at_most: float | None = None) -> Bar:
    """The median of some figures, with the lowest and the highest."""
    return Bar(name, statistics.median(figures), at_least, (min(figures), max(figures)), at_most)
