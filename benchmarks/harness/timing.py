"""Times of calls that take turns: what slows the machine for a while slows all of them.

On a CPU, a call during which some thread had to wait for a core is repeated while there is patience: the system's
pressure counter says so, whatever the call's own time was.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

Call = Callable[[int], object]  # takes the number of the layer's copy to use
Once = tuple[float, float]  # seconds, and the share of them in which some thread waited for a core
PRESSURE = Path("/proc/pressure/cpu")
MOST_WAITING = 0.05


@dataclass(frozen=True)
class Budget:
    """How long to measure: about `seconds_each` for a candidate, in `least` to `most` rounds; patience for all."""

    seconds_each: float
    least: int
    most: int
    patience_s: float = 0.0

    def rounds(self, seconds: float) -> int:
        return max(self.least, min(self.most, int(self.seconds_each / max(seconds, 1e-9))))


def measure(calls: Mapping[str, Call], copies: int, device: torch.device, budget: Budget) -> dict[str, dict[str, Any]]:
    """What `times_row` says of each candidate; they take turns round after round, each time on another copy."""
    repeats = {
        name: _cuda_repeat(call, copies) if device.type == "cuda" else _cpu_repeat(call, copies, first)
        for first, (name, call) in enumerate(calls.items())
    }
    gc.collect()
    gc.disable()
    try:
        rounds = {name: budget.rounds(repeat()[0]) for name, repeat in repeats.items()}
        found: dict[str, dict[int, Once]] = {name: {} for name in calls}
        patience_s = budget.patience_s
        for i in range(most := max(rounds.values())):
            for name in (name for name in repeats if takes_part(i, rounds[name], most)):
                best = repeats[name]()
                while best[1] > MOST_WAITING and patience_s > 0:
                    again = repeats[name]()
                    patience_s -= again[0]
                    best = min(best, again, key=lambda once: once[1])
                found[name][i] = best
    finally:
        gc.enable()
    return {name: times_row(by_round) for name, by_round in found.items()}


def times_row(by_round: Mapping[int, Once]) -> dict[str, Any]:
    """Microseconds for JSON: median, extremes and every round; slow candidates sit some rounds out."""
    values = {str(i): round(seconds * 1e6, 2) for i, (seconds, _) in by_round.items()}
    return {
        "median": round(statistics.median(values.values()), 2),
        "lowest": min(values.values()),
        "highest": max(values.values()),
        "rounds": len(values),
        "waiting": round(statistics.mean(waiting for _, waiting in by_round.values()), 3),
        "by_round": values,
    }


def over(times: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    """Ratio of the medians of two candidates, and the lowest and highest ratio within a round of both."""
    mine, theirs = times["by_round"], other["by_round"]
    ratios = [value / theirs[i] for i, value in mine.items() if i in theirs]
    ratio = times["median"] / other["median"]
    return ratio, (min(ratios, default=ratio), max(ratios, default=ratio))


def takes_part(i: int, rounds: int, most: int) -> bool:
    """Whether a candidate with so many rounds takes part in round i: they are spread evenly."""
    return i * rounds // most != (i - 1) * rounds // most


def _cpu_repeat(call: Call, copies: int, first: int) -> Callable[[], Once]:
    numbers = count(first + 1)

    def repeat() -> Once:
        copy = next(numbers) % copies
        waited = _waited_s()
        begin = time.perf_counter()
        call(copy)
        seconds = time.perf_counter() - begin
        return seconds, (_waited_s() - waited) / seconds

    return repeat


def _waited_s() -> float:
    """Seconds since the start of the machine in which some thread waited for a core; 0 where nobody counts them."""
    try:
        return int(PRESSURE.read_text(encoding="ascii").split("total=", 1)[1].split()[0]) / 1e6
    except OSError:
        return 0.0


def _cuda_repeat(call: Call, copies: int) -> Callable[[], Once]:
    """One call on every copy as a CUDA graph; what cannot be captured is launched call by call."""

    def all_copies() -> None:
        for copy in range(copies):
            call(copy)

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        all_copies()
        all_copies()
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
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / copies, 0.0

    return repeat
