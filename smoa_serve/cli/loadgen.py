"""Load for a running server: streams over the OpenAI HTTP API, and what they took."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from .client import ServerError

# Ids of single bytes in practically every tokenizer, so that a prompt's length in tokens is exact.
PROMPT_IDS = range(16, 256)
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        model: the base's or an adapter's name.
        prompt: token ids.
        output_tokens: how many to generate, whatever comes.
    """

    model: str
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Sample:
    """What one request took.

    Attributes:
        model: who answered.
        tokens: generated.
        ttft_s: until the first token.
        total_s: until the last.
    """

    model: str
    tokens: int
    ttft_s: float
    total_s: float

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.total_s - self.ttft_s) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class LoadResult:
    """All requests of a run.

    Attributes:
        samples: one per request.
        wall_s: from the first request to the last answer.
    """

    samples: tuple[Sample, ...]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all streams together."""
        return sum(sample.tokens for sample in self.samples) / self.wall_s

    def of(self, model: str) -> list[Sample]:
        """The requests that one model answered."""
        return [sample for sample in self.samples if sample.model == model]


def make_jobs(models: Sequence[str], count: int, input_tokens: int, output_tokens: int, seed: int = 0) -> list[Job]:
    """`count` requests with random prompts, spread evenly over the models.

    Args:
        models: names to ask.
        count: requests.
        input_tokens: length of a prompt.
        output_tokens: length of an answer.
        seed: of the prompts.
    """
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(PROMPT_IDS, k=input_tokens)) for _ in range(count)]
    return [Job(models[i % len(models)], prompt, output_tokens) for i, prompt in enumerate(prompts)]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed, between neighbours linearly."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


async def run_load(url: str, jobs: Sequence[Job], streams: int, api_key: str | None = None) -> LoadResult:
    """Send all jobs, `streams` at a time.

    Args:
        url: of the server, without /v1.
        jobs: what to ask, in this order.
        streams: concurrent requests.
        api_key: what the server was started with.

    Raises:
        ServerError: a request failed; the run is worth nothing then.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=streams)
    queue = list(reversed(jobs))
    samples: list[Sample] = []
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=TIMEOUT_S) as client:

        async def worker() -> None:
            while queue:
                samples.append(await _stream(client, queue.pop()))

        begin = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(streams, len(jobs))):
                    group.create_task(worker())
        except* (httpx.HTTPError, ServerError) as errors:
            first = errors.exceptions[0]
            raise ServerError(f"a request to {url} failed: {type(first).__name__}: {first}") from first
        return LoadResult(tuple(samples), time.perf_counter() - begin)


async def _stream(client: httpx.AsyncClient, job: Job) -> Sample:
    body = {
        "model": job.model,
        "prompt": list(job.prompt),
        "max_tokens": job.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    first = last = begin
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if not response.is_success:
            text = (await response.aread()).decode(errors="replace")
            raise ServerError(f"{job.model}: {response.status_code}: {text[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ServerError(f"{job.model}: {event['error']}")
            if event["choices"]:
                last = time.perf_counter()
                first = last if first == begin else first
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if tokens != job.output_tokens:
        raise ServerError(f"{job.model}: {tokens} tokens came back, {job.output_tokens} were asked for")
    return Sample(job.model, tokens, first - begin, last - begin)
