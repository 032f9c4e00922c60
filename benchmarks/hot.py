"""A hot adapter: the traffic it gets, where it is put, what a move does to running streams, what the policy does."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, pairwise
from random import Random
from typing import Any

import httpx

from benchmarks.harness.results import Row
from smoa_serve.cli.client import ServerClient
from smoa_serve.cli.loadgen import PROMPT_IDS, TIMEOUT_S
from smoa_serve.testing import ServerProcess

PROMPTS, PROMPT_TOKENS = 4, 48
STREAM_PROMPT_TOKENS, SETTLED_TOKENS = 16, 30  # of a stream during which adapters move; tokens before the first move
LOOK_S = 2  # how often the policy looks
# It moves an adapter up after two looks that speak for it, down after three: after four without a move it has settled.
SETTLED_S = 4.5 * LOOK_S
Window = tuple[float, float]
Scores = list[tuple[float, str]]  # per place: logprob of the prompt's token, the best token


@dataclass(frozen=True)
class Traffic:
    """Who is asked: `hot` is the share of adapter 0, the others in turn; None = Zipf(1.0) over all adapters."""

    name: str
    hot: float | None

    def adapters(self, requests: int, adapters: int, seed: int) -> list[int]:
        """Index of the adapter of each request, in random order; the same for the same seed."""
        rng = Random(seed)
        if self.hot is None:
            return rng.choices(range(adapters), [1 / rank for rank in range(1, adapters + 1)], k=requests)
        own = round(self.hot * requests)
        order = [0] * own + [1 + (seed * requests + i) % (adapters - 1) for i in range(requests - own)]
        rng.shuffle(order)
        return order


ALONE = Traffic("hot adapter alone", 1.0)
HOT_90, HOT_50, HOT_20 = (Traffic(f"{share:.0%} hot", share) for share in (0.9, 0.5, 0.2))
ZIPF = Traffic("Zipf(1.0)", None)


class Place(StrEnum):
    """Where an adapter is put; merged comes with what others get."""

    SLOT = "slot"
    RESIDENT = "resident"
    COMPENSATE = "merged, compensate"
    EXCLUSIVE = "merged, exclusive"


class Hot:
    """The hot adapter of one server. The automatic policy leaves all adapters where they are, until it is let in."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        self._client, self.openai, self.url, self.name = ServerClient(server.url), server.client(), server.url, name
        self.place = Place.SLOT
        self._all("pin")

    @contextmanager
    def left_to_the_policy(self) -> Iterator[None]:
        """All adapters are the automatic policy's; afterwards they are in their slots again."""
        self._all("unpin")
        try:
            yield
        finally:
            self._all("pin")
            for entry in self._client.adapters():
                if entry["residence"] in ("merged", "resident"):
                    self._client.move(entry["name"], "slot")
            self.place = Place.SLOT

    def _all(self, target: str) -> None:
        for entry in self._client.adapters():
            self._client.move(entry["name"], target)

    def bring(self, place: Place, **options: object) -> Row:
        """Move it, with these options of a merge; what the server reports of the move, nothing where it was there."""
        if place is self.place and not options:
            return {}
        merged, _, policy = place.partition(", ")
        if merged == "merged":  # rounding is not judged here, it is reported
            report = self._client.move(self.name, "merge", {"policy": policy, "max_lost": 1.0, **options})
        else:
            report = self._client.move(self.name, "slot")
            if place is Place.RESIDENT:
                report = self._client.move(self.name, "resident")
        self.place = place
        return report

    def policy(self) -> Row:
        return dict(httpx.get(f"{self.url}/v1/smoa/policy", timeout=TIMEOUT_S).raise_for_status().json())

    @property
    def shown(self) -> str:
        return next(str(entry["residence"]) for entry in self._client.adapters() if entry["name"] == self.name)


def scores(client: Any, model: str) -> Scores:
    """Logprobs of fixed random prompts, by a server that caches no prefixes: without sampling rounding cannot lead two
    runs apart."""
    rng = Random(7)
    found: Scores = []
    for _ in range(PROMPTS):
        prompt = rng.choices(PROMPT_IDS, k=PROMPT_TOKENS)
        asked = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0}
        answer = client.completions.create(**asked, extra_body={"prompt_logprobs": 1})
        # The first token follows nothing.
        for token, place in zip(prompt[1:], answer.choices[0].prompt_logprobs[1:], strict=True):
            best = next(key for key, entry in place.items() if entry["rank"] == 1)
            found.append((float(place[str(token)]["logprob"]), best))
    return found


def difference(one: Scores, other: Scores) -> dict[str, float]:
    """Of two rounds of `scores`, nats, and the share of places at which the best token is the same."""
    gaps = [abs(a - b) for (a, _), (b, _) in zip(one, other, strict=True)]
    same = sum(a == b for (_, a), (_, b) in zip(one, other, strict=True))
    return {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "best_agree": same / len(gaps)}


def stalls(hot: Hot, models: Sequence[str], tokens: int, cycles: int) -> Row:
    """Merge and un-merge the hot adapter while a stream per model runs, until there are enough moves: times between two
    tokens of a stream when nothing moves, the longest of any stream during each move, and what each merge took."""
    gaps: list[Window] = []
    windows: dict[Place, list[Window]] = {Place.COMPENSATE: [], Place.SLOT: []}
    while len(windows[Place.SLOT]) < cycles:
        times: list[list[float]] = [[] for _ in models]
        moves = []
        with ThreadPoolExecutor(len(models)) as pool:
            streams = [pool.submit(_stream, hot.openai, *each, tokens) for each in zip(models, times, strict=True)]
            while min(map(len, times)) < SETTLED_TOKENS and not all(stream.done() for stream in streams):
                time.sleep(0.01)
            while not any(stream.done() for stream in streams):
                for place in windows:
                    begin = time.perf_counter()
                    hot.bring(place)
                    moves.append((place, (begin, time.perf_counter())))
                    time.sleep(0.3)
        for stream in streams:
            stream.result()  # whatever it raised
        for place, window in moves:
            if window[1] < min(mine[-1] for mine in times):
                windows[place].append(window)
        gaps += [pair for mine in times for pair in pairwise(mine[SETTLED_TOKENS // 2 :])]
    moved = [window for found in windows.values() for window in found]
    usual = [b - a for a, b in gaps if not any(_overlap((a, b), window) for window in moved)]
    return {
        "usual_ms": statistics.median(usual) * 1e3,
        "usual_longest_ms": max(usual) * 1e3,
        "merge_ms": [longest_ms(gaps, window) for window in windows[Place.COMPENSATE]],
        "unmerge_ms": [longest_ms(gaps, window) for window in windows[Place.SLOT]],
        "seconds": [end - begin for begin, end in windows[Place.COMPENSATE]],
    }


def longest_ms(gaps: Sequence[Window], window: Window) -> float:
    """The longest of the gaps that touch a window of time."""
    return max(b - a for a, b in gaps if _overlap((a, b), window)) * 1e3


def _overlap(gap: Window, window: Window) -> bool:
    return gap[1] > window[0] and gap[0] < window[1]


def _stream(client: Any, model: str, times: list[float], tokens: int) -> None:
    prompt = Random(0).choices(PROMPT_IDS, k=STREAM_PROMPT_TOKENS)
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    for chunk in client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}):
        if chunk.choices:
            times.append(time.perf_counter())


def settle(hot: Hot, once: Callable[[int], object], limit_s: float) -> Row:
    """What the policy, which the server is left to, did until it moved nothing any more; `once` sends one repeat of a
    seed meanwhile."""
    known = {str(decision) for decision in hot.policy()["decisions"]}
    moves: list[str] = []
    begin = last = time.monotonic()
    for seed in count(1000):  # of no repeat that counts
        once(seed)
        now, policy = time.monotonic(), hot.policy()
        new = [one for one in reversed(policy["decisions"]) if str(one) not in known]
        known |= {str(one) for one in new}
        moves += [f"{one['action']} {one['name']}: {one['result']}" for one in new]
        if new or policy["moving"]:
            last = now
        if now - last > SETTLED_S or now - begin > limit_s:
            break
    return {"seconds": now - begin, "settled": now - last > SETTLED_S, "moves": moves, "hot": hot.shown}
