"""How long running streams wait while an adapter is merged and un-merged."""

import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

from benchmarks.residence import Hot, Place
from smoa_serve.cli.client import ServerError
from smoa_serve.cli.loadgen import TIMEOUT_S, make_jobs

PROMPT_TOKENS = 16
SETTLED = 30  # tokens before the first move


@dataclass(frozen=True)
class Stalls:
    """What the moves of one load did to its streams.

    Attributes:
        usual_ms: median time between two tokens of a stream when nothing moves.
        usual_longest_ms: the longest such time.
        merge_ms, unmerge_ms: longest time between two tokens of any stream during each move.
        seconds: each merge took.
    """

    usual_ms: float
    usual_longest_ms: float
    merge_ms: list[float]
    unmerge_ms: list[float]
    seconds: list[float]

    def steps(self, longest_ms: Sequence[float]) -> list[float]:
        """Longest times minus the usual one, in decode steps."""
        return [(one - self.usual_ms) / self.usual_ms for one in longest_ms]


def measure_stalls(hot: Hot, url: str, models: Sequence[str], tokens: int, cycles: int) -> Stalls:
    """Merge and un-merge the hot adapter while a stream per model runs.

    Args:
        hot: in its slot before and after.
        url: of the server.
        models: whom the streams ask.
        tokens: of each stream; a load of streams is repeated until there are enough cycles.
        cycles: merges, and un-merges.
    """
    gaps: list[tuple[float, float]] = []
    windows: dict[Place, list[tuple[float, float]]] = {Place.COMPENSATE: [], Place.SLOT: []}
    while len(windows[Place.SLOT]) < cycles:
        times: list[list[float]] = [[] for _ in models]
        threads = [
            threading.Thread(target=_stream, args=(url, model, tokens, mine), daemon=True)
            for model, mine in zip(models, times, strict=True)
        ]
        for thread in threads:
            thread.start()
        while min(map(len, times)) < SETTLED and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        found = _move_while(hot, threads)
        for thread in threads:
            thread.join()
        end = min(mine[-1] for mine in times)
        for place, window in found:
            if window[1] < end:
                windows[place].append(window)
        gaps += [pair for mine in times for pair in pairwise(mine[SETTLED // 2 :])]
    moves = [window for found in windows.values() for window in found]
    usual = [b - a for a, b in gaps if not any(_overlap((a, b), window) for window in moves)]
    longest = {place: [_longest(gaps, window) for window in found] for place, found in windows.items()}
    return Stalls(
        statistics.median(usual) * 1e3,
        max(usual) * 1e3,
        longest[Place.COMPENSATE],
        longest[Place.SLOT],
        [end - begin for begin, end in windows[Place.COMPENSATE]],
    )


def _move_while(hot: Hot, threads: Sequence[threading.Thread]) -> list[tuple[Place, tuple[float, float]]]:
    """Moves for as long as every stream runs, with rests between them."""
    found = []
    while all(thread.is_alive() for thread in threads):
        for place in (Place.COMPENSATE, Place.SLOT):
            begin = time.perf_counter()
            hot.bring(place)
            found.append((place, (begin, time.perf_counter())))
            time.sleep(0.3)
    return found


def _overlap(gap: tuple[float, float], window: tuple[float, float]) -> bool:
    return gap[1] > window[0] and gap[0] < window[1]


def _longest(gaps: Sequence[tuple[float, float]], window: tuple[float, float]) -> float:
    return max(b - a for a, b in gaps if _overlap((a, b), window)) * 1e3


def _stream(url: str, model: str, tokens: int, times: list[float]) -> None:
    (job,) = make_jobs([model], 1, PROMPT_TOKENS, tokens)
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(job.prompt),
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        if not response.is_success:
            raise ServerError(f"{model}: {response.status_code}: {response.read().decode(errors='replace')[:500]}")
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line.removeprefix("data: ")).get("choices"):
                times.append(time.perf_counter())
