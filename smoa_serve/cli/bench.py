"""`smoa-serve bench`: a short load on a running server, over the base and all its adapters."""

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..program import ending
from .adapters import DEFAULT_URL, KeyOption, UrlOption
from .client import ServerClient
from .loadgen import LoadResult, Sample, make_jobs, percentile, run_load


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("bench", epilog=ending("smoa-serve bench --url http://localhost:8000 --streams 16"))(bench)


def bench(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", show_default="all it has", help="Ask this model; may be repeated.")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", min=1, help="Concurrent requests.")] = 16,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in all.")] = 64,
    input_tokens: Annotated[int, typer.Option("--input-tokens", min=1, help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="Tokens of each answer.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure tokens/s, time to first token and time per token of a running server, model by model.

    Requests go to the models in turn, so that batches are mixed. For the project's own comparisons with their bars see
    python -m benchmarks; vLLM's vllm bench serve works against the same server.
    """
    client = ServerClient(url, api_key)
    key = api_key.get_secret_value() if api_key else None
    models = list(model or [entry["id"] for entry in client.models()])
    # One request each before the clock runs: adapters come into their slots.
    asyncio.run(run_load(client.url, make_jobs(models, len(models), 8, 2), streams, key))
    jobs = make_jobs(models, requests, input_tokens, output_tokens, seed=1)
    result = asyncio.run(run_load(client.url, jobs, streams, key))
    if as_json:
        typer.echo(json.dumps(_report(models, result), indent=2))
        return
    console = Console()
    console.print(_table(models, result))
    console.print(
        f"{len(result.samples)} requests, {input_tokens} tokens in and {output_tokens} out, {streams} streams: "
        f"{result.tokens_per_s:.1f} tokens/s in {result.wall_s:.1f} s"
    )


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Times of some requests in milliseconds, and tokens/s of one stream."""
    ttft, tpot = [s.ttft_s * 1e3 for s in samples], [s.tpot_s * 1e3 for s in samples]
    return {
        "requests": len(samples),
        "ttft_ms_p50": percentile(ttft, 0.5),
        "ttft_ms_p99": percentile(ttft, 0.99),
        "tpot_ms_p50": percentile(tpot, 0.5),
        "tpot_ms_p99": percentile(tpot, 0.99),
        "stream_tokens_per_s": sum(s.tokens for s in samples) / sum(s.total_s for s in samples),
    }


def _report(models: Sequence[str], result: LoadResult) -> dict[str, object]:
    by_model = {name: summary(result.of(name)) for name in models if result.of(name)}
    total = summary(result.samples) | {"tokens_per_s": result.tokens_per_s, "wall_s": result.wall_s}
    return {"total": total, "models": by_model}


def _table(models: Sequence[str], result: LoadResult) -> Table:
    table = Table("model", "requests", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "tokens/s a stream")
    rows = [(name, result.of(name)) for name in models if result.of(name)]
    for name, samples in [*rows, ("all", list(result.samples))]:
        facts = summary(samples)
        columns = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "stream_tokens_per_s")
        table.add_row(name, str(len(samples)), *(f"{facts[column]:.1f}" for column in columns))
    return table
