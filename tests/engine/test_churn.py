"""A short run of `python -m benchmarks churn` on the tests' server: what comes and goes leaves nothing behind."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.churn import WORKERS, Churn, growth, make_contents

pytestmark = pytest.mark.engine

OPERATIONS, CONTENTS = 150, 8
PROMPT = [13, 97, 88, 114, 5, 31, 64]
SETTLE_S = 30


def account(tiny: Any) -> dict[str, Any]:
    """What the server holds for adapters when each of those it started with was just used."""
    for model in tiny.models:
        assert tiny.ask(model, PROMPT).differs(tiny.solo(model, PROMPT)) is None
    response = tiny.server.post("/collective_rpc", {"method": "smoa_status"})
    status = response.raise_for_status().json()["results"][0]
    text = httpx.get(f"{tiny.server.url}/metrics", headers=tiny.server.headers).raise_for_status().text
    names = [line.partition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    return {
        "residence": set(status["residence"]),
        "host_bytes": status["host_bytes"],
        "tokens": set(status["tokens"]),
        "block_bytes": set(status["block_bytes"]),
        "resident_bytes": status["resident_bytes"],
        "partitions": status["partitions"],
        "series": {name for name in names if "churn-" in name},
        "series of names that run": sum(name.startswith("vllm:lora_requests_info{") for name in names),
    }


def settled(tiny: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """The account once all that was unloaded has left, which takes a moment."""
    deadline = time.monotonic() + SETTLE_S
    while (found := account(tiny)) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_operations_without_end_leave_nothing_behind_and_every_answer_is_right(tiny: Any, tmp_path: Path) -> None:
    contents, movable = make_contents(tiny.base, tiny.root / "churn", CONTENTS)
    before = settled(tiny, account(tiny))

    async def run() -> Churn:
        limits = httpx.Limits(max_connections=WORKERS)
        settings: dict[str, Any] = {"headers": tiny.server.headers, "timeout": 120, "limits": limits}
        async with httpx.AsyncClient(base_url=tiny.server.url, **settings) as client:
            churn = Churn(client, contents, movable)
            await churn.learn()
            await churn.run(OPERATIONS)
            return churn

    churn = asyncio.run(run())
    assert churn.wrong == []
    assert churn.operations >= OPERATIONS
    assert churn.requests >= OPERATIONS
    assert {"load", "unload", "replace", "resident"} <= set(churn.done)
    assert settled(tiny, before) == before


def test_growth_is_measured_after_the_warm_up() -> None:
    sizes = [100, 500, *range(1000, 1010), *range(1100, 1110)]
    samples = [{"operations": place, "total_kib": size} for place, size in enumerate(sizes)]
    assert growth(samples, warm_up=1) == pytest.approx(1107.5 / 1001.5 - 1)
