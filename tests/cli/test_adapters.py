"""`smoa-serve adapters` and `bench` against a small server that answers as ours does."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from typer.testing import CliRunner, Result

from smoa_serve.cli.app import app as program
from smoa_serve.cli.client import ServerClient, ServerError
from smoa_serve.cli.loadgen import make_jobs, percentile
from smoa_serve.server.app import AdapterInfo
from smoa_serve.testing import free_port

KEY = "secret"


def adapter_info(name: str) -> dict[str, Any]:
    """What GET /v1/smoa/adapters says of one adapter."""
    info = AdapterInfo(
        name=name,
        kind="smoa",
        digest="abcdef0123456789" * 4,
        rank=16,
        max_rank=4,
        num_blocks=4,
        parameters=1000,
        bytes=3 * 2**20,
        residence="slot",
        resident_bytes=0,
        pinned=False,
        order="recomputed",
        order_error=0.25,
        requests=7,
        path="/x",
    )
    return info.model_dump()


def make_server() -> FastAPI:
    app = FastAPI()
    app.state.names = ["legal"]

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Any:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    @app.get("/v1/smoa/adapters")
    async def adapters() -> dict[str, Any]:
        return {"object": "list", "data": [adapter_info(name) for name in app.state.names]}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": name} for name in ["base", *app.state.names]]}

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        body = await request.json()
        if body["lora_name"] in app.state.names and not body["load_inplace"]:
            message = f"The lora adapter '{body['lora_name']}' has already been loaded."
            return JSONResponse({"error": {"message": message, "type": "InvalidUserInput", "code": 400}}, 400)
        app.state.names.append(body["lora_name"])
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        name = (await request.json())["lora_name"]
        if name not in app.state.names:
            return JSONResponse({"error": {"message": f"The lora adapter '{name}' cannot be found."}}, 404)
        app.state.names.remove(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    @app.post("/v1/completions")
    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()
        count = body["max_tokens"] - (body["model"] == "short")

        async def events() -> Any:
            for _ in range(count):
                yield f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': count}})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture
def url() -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make_server(), host="127.0.0.1", port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(program, list(arguments))


def test_list_shows_every_adapter(url: str) -> None:
    result = run("adapters", "list", "--url", url, "--api-key", KEY)
    assert result.exit_code == 0
    for part in ("legal", "smoa", "3.0 MiB", "slot"):
        assert part in result.output


def test_list_as_json_is_what_the_server_says(url: str) -> None:
    result = run("adapters", "list", "--url", f"{url}/v1/", "--api-key", KEY, "--json")
    assert json.loads(result.output) == [adapter_info("legal")]


def test_load_and_unload(url: str) -> None:
    options = ("--url", url, "--api-key", KEY)
    assert "added" in run("adapters", "load", "new", "/adapters/new", *options).output
    assert [entry["name"] for entry in ServerClient(url, KEY).adapters()] == ["legal", "new"]
    assert "removed" in run("adapters", "unload", "new", *options).output
    assert [entry["name"] for entry in ServerClient(url, KEY).adapters()] == ["legal"]


def test_the_servers_refusal_is_shown(url: str) -> None:
    with pytest.raises(ServerError, match=r"refused \(400\): The lora adapter 'legal' has already been loaded"):
        ServerClient(url, KEY).load("legal", "/x", in_place=False)
    with pytest.raises(ServerError, match=r"refused \(404\): The lora adapter 'nobody' cannot be found"):
        ServerClient(url, KEY).unload("nobody")
    result = run("adapters", "unload", "nobody", "--url", url, "--api-key", KEY)
    assert result.exit_code == 1
    assert isinstance(result.exception, ServerError)


def test_an_adapter_in_use_is_replaced_on_request(url: str) -> None:
    assert run("adapters", "load", "legal", "/x", "--in-place", "--url", url, "--api-key", KEY).exit_code == 0


def test_a_wrong_key_is_named(url: str) -> None:
    with pytest.raises(ServerError, match="--api-key"):
        ServerClient(url, "wrong").adapters()


def test_the_key_may_come_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_API_KEY", KEY)
    monkeypatch.setenv("SMOA_URL", url)
    assert run("adapters", "list", "--json").exit_code == 0


def test_nobody_listening_is_a_clear_error() -> None:
    with pytest.raises(ServerError, match=r"nothing answers at http://127\.0\.0\.1:9 .*is the server running"):
        ServerClient("http://127.0.0.1:9").adapters()
    with pytest.raises(ServerError, match="failed"):
        ServerClient("nonsense").adapters()


def test_bench_asks_every_model(url: str) -> None:
    result = run("bench", "--url", url, "--api-key", KEY, "--requests", "8", "--streams", "3", "--json")
    assert result.exit_code == 0, result.exception
    report = json.loads(result.output)
    assert set(report["models"]) == {"base", "legal"}
    assert report["total"]["requests"] == 8
    assert report["models"]["legal"]["requests"] == 4
    assert report["total"]["tokens_per_s"] > 0


def test_bench_prints_a_table(url: str) -> None:
    result = run("bench", "--url", url, "--api-key", KEY, "--requests", "4", "--model", "legal")
    assert "legal" in result.output
    assert "4 requests, 128 tokens in and 64 out" in result.output


def test_bench_refuses_answers_of_another_length(url: str) -> None:
    result = run("bench", "--url", url, "--api-key", KEY, "--model", "short")
    assert isinstance(result.exception, ServerError)
    assert "1 tokens came back, 2 were asked for" in str(result.exception)


def test_jobs_are_spread_evenly_and_repeatable() -> None:
    jobs = make_jobs(["a", "b"], 5, 7, 3, seed=4)
    assert [job.model for job in jobs] == ["a", "b", "a", "b", "a"]
    assert {len(job.prompt) for job in jobs} == {7}
    assert jobs == make_jobs(["a", "b"], 5, 7, 3, seed=4)
    assert jobs != make_jobs(["a", "b"], 5, 7, 3, seed=5)


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 0.5) == pytest.approx(50.5)
    assert percentile(values, 0.99) == pytest.approx(99.01)
    assert percentile([3.0], 0.99) == 3.0
