"""Times of calls that take turns: what slows the machine for a while slows all of them.

On a CPU, a call during which some thread had to wait for a core is repeated while there is patience: the system's
pressure counter says so, whatever the call's own time was.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[int], object]  # takes the number of the layer's copy to use
PRESSURE = Path("/proc/pressure/cpu")
MOST_WAITING = 0.05


@dataclass(frozen=True)
class Once:
    """One call: its seconds, and the share of them in which some thread waited for a core."""

    seconds: float
    waiting: float = 0.0


Repeat = Callable[[], Once]  # runs once


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate.

    Attributes:
        by_round: round → seconds; slow candidates sit some rounds out.
        waiting: mean share of the time in which some thread waited for a core.
    """

    by_round: Mapping[int, float]
    waiting: float = 0.0

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.by_round.values())

    def over(self, other: "Times") -> tuple[float, tuple[float, float]]:
        """Ratio of the medians to another candidate's, and the lowest and highest ratio within a round."""
        ratios = [seconds / other.by_round[i] for i, seconds in self.by_round.items() if i in other.by_round]
        ratio = self.median / other.median
        return ratio, (min(ratios, default=ratio), max(ratios, default=ratio))

    def row(self) -> dict[str, object]:
        """For JSON."""
        values = self.by_round.values()
        figures = {"median": self.median, "lowest": min(values), "highest": max(values)}
        return {
            **{name: round(seconds * 1e6, 2) for name, seconds in figures.items()},
            "rounds": len(values),
            "waiting": round(self.waiting, 3),
        }


@dataclass(frozen=True)
class Budget:
    """How long to measure: every candidate gets about `seconds_each`, in between so many rounds.

    Attributes:
        patience_s: for repeating disturbed calls of one measurement.
    """

    seconds_each: float
    least: int = 4
    most: int = 30
    patience_s: float = 0.0

    def rounds(self, seconds: float) -> int:
        """For a candidate that takes this long."""
        return max(self.least, min(self.most, int(self.seconds_each / max(seconds, 1e-9))))


def measure(calls: Mapping[str, Call], copies: int, device: torch.device, budget: Budget) -> dict[str, Times]:
    """Times all candidates in turn, round after round.

    Args:
        calls: candidates by name; each takes the number of the copy to use.
        copies: of the layer; each round and each candidate takes another one.
        device: where they run.
        budget: how long.

    Returns:
        Times by name.
    """
    timer = _cuda_repeats if device.type == "cuda" else _cpu_repeats
    repeats = timer(calls, copies)
    with _no_collection():
        rounds = {name: budget.rounds(repeat().seconds) for name, repeat in repeats.items()}
        found: dict[str, dict[int, Once]] = {name: {} for name in calls}
        patience_s = budget.patience_s
        for i in range(most := max(rounds.values())):
            for name, repeat in repeats.items():
                if _takes_part(i, rounds[name], most):
                    found[name][i], patience_s = _undisturbed(repeat, patience_s)
    return {name: _times(once) for name, once in found.items()}


def _undisturbed(repeat: Repeat, patience_s: float) -> tuple[Once, float]:
    """The least disturbed of a call's repetitions, and the patience that is left."""
    best = repeat()
    while best.waiting > MOST_WAITING and patience_s > 0:
        again = repeat()
        patience_s -= again.seconds
        best = min(best, again, key=lambda once: once.waiting)
    return best, patience_s


def _times(by_round: Mapping[int, Once]) -> Times:
    waiting = statistics.mean(once.waiting for once in by_round.values())
    return Times({i: once.seconds for i, once in by_round.items()}, waiting)


def _takes_part(i: int, rounds: int, most: int) -> bool:
    """Whether a candidate with so many rounds takes part in round i: they are spread evenly."""
    return i * rounds // most != (i - 1) * rounds // most


def _cpu_repeats(calls: Mapping[str, Call], copies: int) -> dict[str, Repeat]:
    return {name: _cpu_repeat(call, copies, first) for first, (name, call) in enumerate(calls.items())}


def _cpu_repeat(call: Call, copies: int, first: int) -> Repeat:
    state = {"copy": first}

    def repeat() -> Once:
        state["copy"] += 1
        copy = state["copy"] % copies
        waited = _waited_s()
        begin = time.perf_counter()
        call(copy)
        seconds = time.perf_counter() - begin
        return Once(seconds, (_waited_s() - waited) / seconds)

    return repeat


def _waited_s() -> float:
    """Seconds since the start of the machine in which some thread waited for a core; 0 where nobody counts them."""
    try:
        return int(PRESSURE.read_text(encoding="ascii").split("total=", 1)[1].split()[0]) / 1e6
    except OSError:
        return 0.0


def _cuda_repeats(calls: Mapping[str, Call], copies: int) -> dict[str, Repeat]:
    return {name: _cuda_repeat(call, copies) for name, call in calls.items()}


def _cuda_repeat(call: Call, copies: int) -> Repeat:
    """One call on every copy as a CUDA graph; what cannot be captured is launched call by call."""

    def all_copies() -> None:
        for copy in range(copies):
            call(copy)

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_copies()
        all_copies()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    run: Callable[[], object] = all_copies
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_copies()
        run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

    def repeat() -> Once:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        return Once(float(begin.elapsed_time(end)) / 1e3 / copies)

    return repeat


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
