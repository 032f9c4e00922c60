"""The load of a comparison, what one repeat of it took, and variants that take turns."""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.results import Row
from benchmarks.harness.servers import ServerProcess
from smoa_serve.cli.bench import summary
from smoa_serve.cli.loadgen import LoadResult, make_jobs, run_load


@dataclass(frozen=True)
class Load:
    streams: int
    input_tokens: int
    output_tokens: int

    def send(self, server: ServerProcess, asked: Sequence[str], requests: int, seed: int = 0) -> "Repeat":
        """So many requests to those who are asked, in turn; equal seeds send equal prompts."""
        jobs = make_jobs(asked, requests, self.input_tokens, self.output_tokens, seed)
        before = server.cpu_seconds()
        result = asyncio.run(run_load(server.url, jobs, self.streams))
        return Repeat(result, server.cpu_seconds() - before)


@dataclass(frozen=True)
class Repeat:
    """What the streams of one repeat saw, and the server's processor time: what is comparable on a shared machine."""

    load: LoadResult
    cpu_s: float


def take_turns(variants: Sequence[Any], repeats: int, ask: Callable[[Any, int], Repeat]) -> dict[Any, list[Repeat]]:
    """Every variant once per repeat (its seed), in turn and back: a machine that slows down slows all of them."""
    found: dict[Any, list[Repeat]] = {variant: [] for variant in variants}
    for seed in range(1, repeats + 1):
        for variant in variants[:: 1 if seed % 2 else -1]:
            one = ask(variant, seed)
            found[variant].append(one)
            print(f"{seed} of {repeats}: {variant}: {one.load.tokens_per_s:.1f} tokens/s, {one.cpu_s:.1f} s of CPU")
    return found


def figures(repeats: Sequence[Repeat]) -> Row:
    """What a line of results says of all repeats of a variant: throughput, spread, processor time, latencies."""
    found = [round(repeat.load.tokens_per_s, 2) for repeat in repeats]
    samples = [sample for repeat in repeats for sample in repeat.load.samples]
    return {
        "tokens_per_s": round(statistics.median(found), 2),
        "spread": [min(found), max(found)],
        "values": found,
        "cpu_s": [round(repeat.cpu_s, 2) for repeat in repeats],
        **{key: round(value, 2) for key, value in summary(samples).items()},
    }
