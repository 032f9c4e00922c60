"""Bars: what a measurement has to reach, and whether it did."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Bar:
    """One bar and the figure beside it.

    Attributes:
        name: what is compared.
        figure: what was measured.
        at_least: the bar where higher is better, else None.
        spread: lowest and highest figure of the repeats.
        at_most: the bar where lower is better, else None.
    """

    name: str
    figure: float
    at_least: float | None
    spread: tuple[float, float]
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the figure is on the right side of the bar, or on it."""
        return (self.at_least is None or self.figure >= self.at_least) and (
            self.at_most is None or self.figure <= self.at_most
        )

    @property
    def limit(self) -> str:
        """The bar, for people."""
        return f"at most {self.at_most:.2f}" if self.at_least is None else f"{self.at_least:.2f}"

    def line(self) -> str:
        """For people."""
        low, high = self.spread
        verdict = "reached" if self.reached else "MISSED"
        return f"{verdict:8} {self.name}: {self.figure:.2f} (bar {self.limit}, repeats {low:.2f} to {high:.2f})"

    def row(self) -> dict[str, object]:
        """For JSON."""
        return {"kind": "bar", **asdict(self), "reached": self.reached}


def ratio_bar(name: str, values: Sequence[float], reference: Sequence[float], at_least: float) -> Bar:
    """The median of the ratios of paired repeats: both sides of a pair met the same state of the machine.

    Args:
        name: what is compared.
        values: one figure per repeat.
        reference: the other side's, in the same order.
        at_least: the bar.
    """
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    return Bar(name, statistics.median(ratios), at_least, (min(ratios), max(ratios)))
