"""One measured point of the table: its times beside the floor and the base GEMM."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from benchmarks.kernels import floor
from benchmarks.kernels.cases import Case
from benchmarks.kernels.floor import Ceilings, Work
from benchmarks.kernels.timing import Times

BASE, EXPAND, MODULATE, LOOP, DENSE = "base", "bmm expand", "bmm modulate", "loop", "dense"
SINGLE_PASS = "single pass"
FORCED_WAYS = {"triton expand": "expand", "triton modulate": "modulate"}


@dataclass(frozen=True, eq=False)
class Point:
    """What was measured of one case.

    Attributes:
        case: tokens, adapters, layer.
        times: by candidate.
        skipped: candidate → why it was left out.
        implementations: names of ours among the candidates, the default one first.
        ceilings: of the device.
    """

    case: Case
    times: Mapping[str, Times]
    skipped: Mapping[str, str]
    implementations: tuple[str, ...]
    ceilings: Ceilings

    @property
    def own(self) -> Times:
        """Of the default implementation."""
        return self.times[self.implementations[0]]

    @property
    def waiting(self) -> float:
        """Share of the time of base and default implementation in which some thread waited for a core."""
        return max(self.own.waiting, self.times[BASE].waiting)

    def works(self) -> dict[str, Work]:
        """What has to be moved and computed, by what is computed."""
        works = {"base": floor.base_work(self.case)}
        if self.case.group_sizes():
            works |= {
                "delta": floor.delta_work(self.case),
                "expand": floor.expand_work(self.case),
                "modulate": floor.modulate_work(self.case),
                SINGLE_PASS: floor.single_pass_work(self.case),
            }
        return works

    def floors_s(self) -> dict[str, float]:
        """Floors of `works`."""
        return {name: self.ceilings.floor_s(work) for name, work in self.works().items()}

    def floor_over_time(self) -> dict[str, float]:
        """How near each of ours comes to its floor (1 is the limit), and the base GEMM."""
        floors = self.floors_s()
        counterpart = {
            BASE: "base",
            SINGLE_PASS: SINGLE_PASS,
            **dict.fromkeys(self.implementations, "delta"),
            **FORCED_WAYS,
        }
        return {
            name: floors[counterpart[name]] / times.median
            for name, times in self.times.items()
            if counterpart.get(name) in floors
        }

    def row(self) -> dict[str, object]:
        """For JSON: microseconds, shares and ratios by candidate."""
        base = self.times[BASE].median
        return {
            **self.case.row(),
            "implementations": list(self.implementations),
            "times_us": {name: times.row() for name, times in self.times.items()},
            "work": {name: asdict(work) for name, work in self.works().items()},
            "floor_us": {name: round(seconds * 1e6, 2) for name, seconds in self.floors_s().items()},
            "floor_over_time": {name: round(share, 4) for name, share in self.floor_over_time().items()},
            "over_base": {n: round(times.median / base, 4) for n, times in self.times.items() if n != BASE},
            "waiting": round(self.waiting, 3),
            "skipped": dict(self.skipped),
        }

    def line(self) -> str:
        """For people: microseconds, and ratios to the base."""
        case, base = self.case, self.times[BASE].median
        what = f"{case.layer.name} ({case.rank},{case.blocks}) T={case.tokens} {case.workload} {case.adapters}"
        others = (f"{n} {t.median * 1e6:,.0f} ({t.median / base:.2f})" for n, t in self.times.items() if n != BASE)
        disturbed = f"; {self.waiting:.0%} of the time a thread waited for a core" if self.waiting > 0.05 else ""
        return f"{what}: base {base * 1e6:,.0f} us; {', '.join(others)}{disturbed}"
