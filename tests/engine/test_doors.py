"""Closed doors: every route asks for the key, names and resolvers lead nowhere else, nothing private is told."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Mount, WebSocketRoute

from smoa_serve.server.auth import OPEN_PATHS

pytestmark = pytest.mark.engine

PROMPT, TOKENS = [13, 97, 88, 114, 5, 31, 64], 6
KEY = "open:sesame"
WRONG_KEYS = (
    "",
    "Bearer",
    "Bearer ",
    f"Basic {KEY}",
    f"Bearer {KEY}x",
    f"Bearer {KEY[:-1]}",
    f"Bearer  {KEY}",
    KEY,
    f"Bearer {KEY.upper()}",
)
ODD_NAMES = ("a:b", "a:/b", "a/b/c", "0", "A..b-_c:d", "merge/a", "a/..b", "v1/models", "adapters", "x" * 256)
UNREACHABLE = ("a/../b", "a//b", "a/./b", "a/.", "a/..", "a/", "a/merge", "unmerge", "a/pin", "a/revisions", "split")


# ---- every route, without a server ----


@pytest.fixture(scope="module")
def built() -> Callable[..., Any]:
    """`built(*arguments, VARIABLE=value)`: vLLM's app with all of its routes and ours, as `vllm serve` makes it."""
    from smoa_serve.plugin import register

    register()
    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # vLLM <= 0.28
        from vllm.entrypoints.openai.api_server import build_app
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.tasks import GENERATION_TASKS, POOLING_TASKS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def build(*arguments: str, **environment: str) -> Any:
        args: Namespace = parser.parse_args(["--enable-tokenizer-info-endpoint", *arguments])
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return build_app(args, (*GENERATION_TASKS, *POOLING_TASKS), None)

    return build


@pytest.fixture(scope="module")
def full_app(built: Callable[..., Any]) -> Any:
    """With every route there is: development, SageMaker's adapters."""
    return built(
        *("--api-key", KEY, "another", "--allowed-origins", '["*"]'),
        VLLM_PLUGINS="smoa_serve",
        VLLM_SERVER_DEV_MODE="1",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    )


def walked(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Method and path of each route; a path's parameters have some value."""
    for route in routes:
        path = re.sub(r"\{[^}]*\}", "x", getattr(route, "path"))  # noqa: B009
        if isinstance(route, WebSocketRoute):
            yield "WEBSOCKET", path
        elif isinstance(route, Mount):
            yield from (("GET", path), ("GET", f"{path}/"), ("POST", f"{path}/x"))
        else:
            yield from ((method, path) for method in sorted(getattr(route, "methods")))  # noqa: B009


@pytest.mark.matrix
@pytest.mark.parametrize("authorization", [None, *WRONG_KEYS])
def test_every_route_of_the_app_asks_for_the_key_or_is_on_the_list(full_app: Any, authorization: str | None) -> None:
    from starlette.testclient import TestClient, WebSocketDenialResponse

    headers = {} if authorization is None else {"Authorization": authorization}
    client = TestClient(full_app, raise_server_exceptions=False)
    routes = list(walked(full_app.routes))
    assert {
        *(("POST", "/adapters"), ("DELETE", "/adapters/x"), ("POST", "/invocations"), ("POST", "/tokenize")),
        *(("POST", "/detokenize"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/load"), ("GET", "/version")),
        *(("POST", "/v1/load_lora_adapter"), ("POST", "/collective_rpc"), ("WEBSOCKET", "/v1/realtime")),
        *(("POST", "/v1/smoa/adapters/x/x"), ("GET", "/metrics"), ("GET", "/ping")),
    } <= set(routes)
    for method, path in routes:
        if method == "WEBSOCKET":
            with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(path, headers=headers):
                pytest.fail(f"{path} was accepted")
            assert denied.value.status_code == 401
            continue
        response = client.request(method, path, headers=headers, follow_redirects=False)
        assert (response.status_code == 401) == (path not in OPEN_PATHS), (method, path, response.status_code)


@pytest.mark.matrix
@pytest.mark.parametrize("key", [KEY, "another"])
def test_each_key_opens_the_same_routes(full_app: Any, key: str) -> None:
    from starlette.testclient import TestClient

    client = TestClient(full_app, raise_server_exceptions=False)
    for scheme in ("Bearer", "bearer", "BEARER"):
        for method, path in walked(full_app.routes):
            if method != "WEBSOCKET":
                response = client.request(method, path, headers={"Authorization": f"{scheme} {key}"})
                assert response.status_code != 401, (method, path)


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/models", "/v1/models/", "/v1//models", "/%76%31/models", "/V1/models", "/v1/./models", "/nothing", "/"),
        *("/health/", "/HEALTH", "/health/../docs", "//health", "/health;x", "/healthx", "/metricsx", "/metrics/x"),
        *("/health%2f..%2fdocs", "/./health", "/%2e/health", "/docs/oauth2-redirect", "/redoc", "/v1/models?x=/health"),
    ],
)
def test_a_path_that_is_nearly_open_is_closed(full_app: Any, path: str) -> None:
    import anyio

    messages: list[Any] = []

    async def call() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            messages.append(message)

        raw, _, query = path.partition("?")
        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http"},
            **{"path": httpx.URL(f"http://x{raw}").path if "%" in raw else raw, "raw_path": raw.encode()},
            **{"query_string": query.encode(), "headers": [], "client": ("x", 1), "server": ("x", 80)},
        }
        await full_app(scope, receive, send)

    anyio.run(call)
    assert messages[0]["status"] == 401


def test_open_paths_stay_open_below_a_root_path(built: Callable[..., Any]) -> None:
    from starlette.testclient import TestClient

    client = TestClient(built("--api-key", KEY, "--root-path", "/llm"), raise_server_exceptions=False)
    for path in ("/metrics", "/llm/metrics"):
        assert client.get(path).status_code == 200
    for path in ("/docs", "/llm/docs", "/llm", "/llmx/metrics", "/llm/v1/models", "/llmv1/models"):
        assert client.get(path, follow_redirects=False).status_code == 401
    assert client.get("/llm/docs", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_key_may_come_from_the_environment_and_none_closes_nothing(built: Callable[..., Any]) -> None:
    from starlette.testclient import TestClient

    app = built(VLLM_API_KEY=KEY)
    assert TestClient(app).get("/docs").status_code == 401
    assert TestClient(app).get("/docs", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert TestClient(built(VLLM_API_KEY="")).get("/docs").status_code == 200


def test_browsers_may_ask_before_they_send_the_key(full_app: Any) -> None:
    from starlette.testclient import TestClient

    asks = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    client = TestClient(full_app, raise_server_exceptions=False)
    response = client.options("/tokenize", headers=asks)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert client.options("/tokenize").status_code == 401


def test_without_vllms_variable_only_our_routes_load_adapters(tiny: Any) -> None:
    schema = (
        httpx.get(f"{tiny.server.url}/openapi.json", headers=tiny.server.headers, timeout=60).raise_for_status().json()
    )
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/smoa/adapters"} < set(schema["paths"])
    assert not [path for path in schema["paths"] if path.startswith("/adapters")]
    assert tiny.server.post("/adapters", {"name": "x", "src": "smoa-r8-k2"}).status_code == 404


# ---- a server that was asked for every door ----


@pytest.fixture(scope="module")
def doors(vectors: Path, serving: Callable[..., Any], makers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plain `vllm serve` with the variable that opens SageMaker's routes, and KV events."""
    folder = tmp_path_factory.mktemp("doors")
    base = shutil.copytree(vectors / "e2e/tiny-llama/base", folder / "base")
    makers.make_adapter(base, folder / "adapters" / "smoa", "smoa", (4, 4), seed=1)
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"ipc://{folder / 'events'}"}
    arguments = (
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base"),
        *("--enable-lora", "--max-lora-rank", "8", "--block-size", "32", "--kv-events-config", json.dumps(events)),
    )
    environment = {
        **{"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": KEY},
        **{"SMOA_ADAPTER_ROOTS": str(folder / "adapters")},
    }
    with serving(base, *arguments, **environment) as server:
        server.api_key = KEY
        yield Namespace(server=server, folder=folder, events=events["endpoint"])


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", KEY])
def test_every_route_of_a_server_asks_for_the_key_or_is_on_the_list(doors: Any, authorization: str | None) -> None:
    url = doors.server.url
    schema = httpx.get(f"{url}/openapi.json", headers=doors.server.headers, timeout=60).raise_for_status().json()
    routes = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    routes += [("get", "/docs"), ("get", "/redoc"), ("get", "/openapi.json"), ("get", "/metrics"), ("get", "/nothing")]
    assert ("post", "/adapters") in routes
    headers = {} if authorization is None else {"Authorization": authorization}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        for method, path in routes:
            response = client.request(method, re.sub(r"\{[^}]*\}", "x", path))
            expected = {401} if path not in OPEN_PATHS else {200, 405}
            assert response.status_code in expected, (method, path, response.text)


def test_sagemakers_doors_open_with_the_key_only(doors: Any) -> None:
    server, load = doors.server, {"name": "sage", "src": str(doors.folder / "adapters" / "smoa")}
    ask = {"model": "sage", "prompt": [1, 2], "max_tokens": 2}
    for headers, expected in (({}, 401), (server.headers, 200)):
        for method, path, body in (
            ("POST", "/adapters", load),
            ("POST", "/invocations", ask),
            ("DELETE", "/adapters/sage", None),
        ):
            response = httpx.request(method, f"{server.url}{path}", json=body, headers=headers, timeout=60)
            assert response.status_code == expected, (path, response.text)
        assert "sage" not in server.adapters()


def test_kv_events_name_the_revision_and_no_path(doors: Any) -> None:
    import msgspec
    import zmq

    server, seen = doors.server, []
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, 500)
        socket.connect(doors.events)
        assert server.post("/v1/load_lora_adapter", {"lora_name": "kv", "lora_path": "smoa"}).status_code == 200
        digest = server.adapters()["kv"]["digest"]
        for number in range(40):  # until the subscription is known and a block is stored
            server.greedy("kv", [number, *range(70)], 1)
            try:
                *_, payload = socket.recv_multipart()
            except zmq.Again:
                continue
            seen.append(payload)
            break
    assert seen
    text = repr(msgspec.msgpack.decode(seen[0]))
    assert f"kv@{digest[:32]}" in text
    assert str(doors.folder.parent) not in text
    assert "store" not in text.replace("BlockStored", "").replace("BLOCK_STORED", "")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "kv"}).status_code == 200


# ---- names ----


@pytest.mark.parametrize("name", ODD_NAMES)
def test_every_accepted_name_can_be_loaded_asked_moved_and_unloaded(tiny: Any, name: str) -> None:
    source = tiny.adapters["smoa-r8-k2"].path
    assert tiny.load(name, source).status_code == 200
    try:
        assert tiny.ask(name, PROMPT, TOKENS).differs(tiny.solo("smoa-r8-k2", PROMPT, TOKENS)) is None
        assert name in {card.id for card in tiny.client.models.list()}
        for target, step in (("resident", "resident"), ("slot", "slot"), ("pin", "slot"), ("unpin", "slot")):
            response = tiny.server.post(f"/v1/smoa/adapters/{name}/{target}", {})
            assert (response.status_code, response.json()["name"]) == (200, name)
            assert response.json()["step"] == step
    finally:
        assert tiny.unload(name).status_code == 200
    assert name not in tiny.server.adapters()


@pytest.mark.parametrize("name", UNREACHABLE)
def test_a_name_that_a_route_cannot_reach_is_not_loaded(tiny: Any, name: str) -> None:
    response = tiny.load(name, tiny.adapters["smoa-r8-k2"].path)
    assert response.status_code == 400
    assert f"the adapter name '{name}' cannot be used" in response.json()["error"]["message"]
    assert name not in tiny.server.adapters()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/load_lora_adapter", '{"lora_name": "\\ud800", "lora_path": "x"}'),
        ("/v1/load_lora_adapter", '{"lora_name": "x", "lora_path": "\\udfff"}'),
        ("/v1/load_lora_adapter", json.dumps({"lora_name": "x" * 1_000_000, "lora_path": "x"})),
        ("/v1/load_lora_adapter", json.dumps({"lora_name": "x", "lora_path": "x" * 1_000_000})),
        ("/v1/load_lora_adapter", '{"lora_name": ["x"], "lora_path": {}}'),
        ("/v1/load_lora_adapter", "[1, 2]"),
        ("/v1/load_lora_adapter", '"text"'),
        ("/v1/load_lora_adapter", "null"),
        ("/v1/load_lora_adapter", "{"),
        ("/v1/load_lora_adapter", '{"lora_name": NaN}'),
        ("/v1/load_lora_adapter", "[" * 100_000),
        ("/v1/unload_lora_adapter", '{"lora_name": "\\ud800"}'),
        ("/v1/unload_lora_adapter", '{"lora_name": 3}'),
        ("/v1/unload_lora_adapter", json.dumps({"lora_name": "x" * 1_000_000})),
        ("/v1/completions", '{"model": "\\ud800", "prompt": "t1"}'),
        ("/v1/completions", json.dumps({"model": "../" * 100_000, "prompt": "t1"})),
        ("/v1/smoa/adapters/smoa-r8-k2/merge", '{"policy": "\\ud800"}'),
        ("/v1/smoa/adapters/smoa-r8-k2/merge", '{"max_lost": NaN}'),
        ("/v1/smoa/adapters/smoa-r8-k2/merge", "[1]"),
        ("/v1/smoa/adapters/%ED%A0%80/merge", "{}"),
        ("/v1/smoa/adapters/%00/merge", "{}"),
        ("/v1/smoa/adapters/smoa-r8-k2/melt", "{}"),
    ],
)
def test_a_hostile_body_is_a_short_client_error(tiny: Any, path: str, body: str) -> None:
    headers = tiny.server.headers | {"Content-Type": "application/json"}
    response = httpx.post(f"{tiny.server.url}{path}", content=body.encode(), headers=headers, timeout=60)
    assert 400 <= response.status_code < 500, response.text[:500]
    assert len(response.content) < 5_000 or path == "/v1/completions"  # vLLM's answer repeats the name
    assert set(tiny.adapters) == set(tiny.server.adapters())


def test_the_load_routes_take_json_only(tiny: Any) -> None:
    response = httpx.post(
        f"{tiny.server.url}/v1/load_lora_adapter",
        content=json.dumps({"lora_name": "text", "lora_path": "smoa-r8-k2"}),
        headers=tiny.server.headers | {"Content-Type": "text/plain"},
        timeout=60,
    )
    assert response.status_code in {400, 415, 422}
    assert "text" not in tiny.server.adapters()


# ---- what is told ----


def test_a_refusal_names_the_adapter_and_no_folder_that_nobody_gave(tiny: Any) -> None:
    broken = tiny.root / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(tiny.adapters["smoa-r8-k2"].path, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    for path in (broken, "broken"):
        response = tiny.load("legal", path)
        message = response.json()["error"]["message"]
        assert response.status_code == 400
        assert message.startswith("adapter 'legal' was refused:")
        assert str(tiny.root) not in message.replace(str(path), "")
    (broken / "adapter_config.json").unlink()
    message = tiny.load("legal", "broken").json()["error"]["message"]
    assert message.startswith("adapter 'legal' was refused:")
    assert str(tiny.root) not in message


def lora_on_the_head(tiny: Any, folder: Path, **config: Any) -> Path:
    """A LoRA adapter that this base's vLLM cannot take."""
    import torch
    from safetensors.torch import load_file, save_file

    source = tiny.adapters["lora-r4"].path
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(4, 128)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(128, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_what_the_engine_refuses_comes_with_its_reasons_alone(tiny: Any) -> None:
    lora_on_the_head(tiny, tiny.root / "head")
    response = tiny.load("legal", "head")
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert message.startswith("adapter 'legal' was refused:\n  - ")
    assert "head" in message
    for words in ("Call to add_lora", "stack trace", "Worker failed", str(tiny.root.parent)):
        assert words not in message


def test_the_lists_show_what_was_given_and_no_private_copy(tiny: Any) -> None:
    assert tiny.load("given", "smoa-r8-k2").status_code == 200
    try:
        cards = {card.id: card for card in tiny.client.models.list()}
        assert cards["given"].root == tiny.server.adapters()["given"]["path"] == "smoa-r8-k2"
        assert cards["given"].max_model_len == cards["base-model"].max_model_len > 0
        for path in ("/v1/models", "/v1/smoa/adapters", "/v1/smoa/policy", "/metrics"):
            text = httpx.get(f"{tiny.server.url}{path}", headers=tiny.server.headers, timeout=60).text
            assert "store/" not in text, path
    finally:
        tiny.unload("given")


# ---- resolvers, without vLLM's variable ----


@pytest.fixture
def resolvable(tiny: Any) -> Iterator[Callable[..., Path]]:
    """Puts LoRA adapters where vLLM's filesystem resolver looks."""
    made: list[str] = []

    def put(name: str, folder: Path | None = None, config: Mapping[str, Any] = {}) -> Path:
        folder = folder or tiny.resolved / name
        shutil.copytree(tiny.adapters["lora-r4"].path, folder)
        file = folder / "adapter_config.json"
        written = json.loads(file.read_text()) | {"base_model_name_or_path": str(tiny.base)} | config
        file.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
        made.append(name)
        return folder

    yield put
    for name in made:
        tiny.unload(name)
    for entry in tiny.resolved.iterdir():
        entry.unlink() if entry.is_symlink() or entry.is_file() else shutil.rmtree(entry)
    assert set(tiny.adapters) == set(tiny.server.adapters())


def asked(tiny: Any, model: str) -> httpx.Response:
    response: httpx.Response = tiny.server.post("/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 1})
    return response


def test_a_resolver_finds_adapters_without_vllms_variable(tiny: Any, resolvable: Callable[..., Path]) -> None:
    resolvable("found/deep")
    assert tiny.ask("found/deep", PROMPT, TOKENS).differs(tiny.solo("lora-r4", PROMPT, TOKENS)) is None
    assert tiny.server.adapters()["found/deep"]["path"] == "found/deep"
    assert str(tiny.resolved) not in str(tiny.client.models.list())


def test_no_name_leads_a_resolver_out_of_its_folder(tiny: Any, resolvable: Callable[..., Path]) -> None:
    resolvable("ok")
    outside = resolvable("outside", tiny.resolved.parent / "outside")
    try:
        for name in ("ok/../../outside", "../outside", str(outside), "ok/../ok", "ok/.", "ok/", "./ok", "ok//"):
            response = asked(tiny, name)
            assert response.status_code == 404, (name, response.text)
        assert asked(tiny, "ok").status_code == 200
    finally:
        shutil.rmtree(outside)


def test_a_link_out_of_the_resolvers_folder_is_refused(tiny: Any, resolvable: Callable[..., Path]) -> None:
    outside = resolvable("outside", tiny.resolved.parent / "outside")
    (tiny.resolved / "linked").symlink_to(outside)
    weights = resolvable("linked-file") / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / weights.name)
    try:
        for name in ("linked", "linked-file"):
            response = asked(tiny, name)
            assert response.status_code == 400
            assert f"adapter '{name}' was refused" in response.text
            assert "lies outside its folder or is a link out of it" in response.text
            assert "outside/" not in response.text
    finally:
        shutil.rmtree(outside)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"peft_type": None}, "KeyError: 'peft_type'"), ({"base_model_name_or_path": None}, "base_model_name_or_path")],
)
def test_a_resolver_that_stumbles_is_a_client_error(
    config: dict[str, Any], reason: str, tiny: Any, resolvable: Callable[..., Path]
) -> None:
    resolvable("stumbles", config=config)
    response = asked(tiny, "stumbles")
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert message.startswith("adapter 'stumbles' was refused:\n  - FilesystemResolver could not use what it found")
    assert reason in message


def test_a_configuration_that_no_resolver_can_read_is_a_client_error(
    tiny: Any, resolvable: Callable[..., Path]
) -> None:
    for content in ("{", "[]", "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass").decode("latin-1")):
        folder = resolvable("unreadable")
        (folder / "adapter_config.json").write_text(content, encoding="utf-8")
        response = asked(tiny, "unreadable")
        assert response.status_code == 400, response.text
        assert str(tiny.resolved) not in response.text
        shutil.rmtree(folder)
    assert asked(tiny, "unreadable").status_code == 404


def test_what_a_resolver_finds_is_verified_like_any_other(tiny: Any, resolvable: Callable[..., Path]) -> None:
    folder = resolvable("bad")
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    response = asked(tiny, "bad")
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("adapter 'bad' was refused:")
    assert str(tiny.resolved) not in response.text


# ---- at start ----


def test_vllms_rust_frontend_is_refused_at_start(vectors: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        **{"VLLM_USE_RUST_FRONTEND": "1", "VLLM_PLUGINS": "smoa_serve", "HF_HUB_OFFLINE": "1"},
        **{"SMOA_STORE_DIR": str(tmp_path / "store"), "VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    base = str(vectors / "e2e/tiny-llama/base")
    for program in ("vllm", "smoa-serve"):
        line = [str(Path(sys.executable).with_name(program)), "serve", base, "--enforce-eager", "--port", "0"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0
        assert "VLLM_USE_RUST_FRONTEND=1 is set: smoa-serve cannot enter" in done.stdout + done.stderr


def test_several_api_servers_serve_what_is_named_at_start_and_refuse_changes(
    vectors: Path, serving: Callable[..., Any], makers: Any, tmp_path: Path
) -> None:
    base = vectors / "e2e/tiny-llama/base"
    adapters = makers.make_adapters(base, tmp_path, {"smoa": ("smoa", (4, 4)), "lora": ("lora", (8,))})
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base")
    lora = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--api-server-count", "2")
    modules = ("--lora-modules", *(f"{name}={path}" for name, path in adapters.items()))
    with serving(base, *arguments, *lora, *modules, SMOA_ADAPTER_ROOTS=str(tmp_path)) as server:
        answers: dict[str, set[str]] = {}
        for _ in range(12):  # each on a connection of its own: the kernel gives them to the processes in turn
            for model in ("base", *adapters):
                answers.setdefault(model, set()).add(repr(server.greedy(model, PROMPT, TOKENS)[0]))
            for path, body in (
                ("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "smoa"}),
                ("/v1/unload_lora_adapter", {"lora_name": "smoa"}),
                ("/v1/smoa/adapters/smoa/merge", {}),
                ("/v1/smoa/adapters/smoa/pin", {}),
            ):
                response = server.post(path, body)
                assert response.status_code == 501, response.text
                assert "2 API server processes share the engine" in response.json()["error"]["message"]
            assert set(server.adapters()) == set(adapters)
        assert {len(found) for found in answers.values()} == {1}
        assert len({repr(found) for found in answers.values()}) == 3
        pids = set(re.findall(r"ApiServer_\d+ pid=(\d+)", server.log.read_text()))
        assert len(pids) == 2
        assert "vllm:request_success_total" in httpx.get(f"{server.url}/metrics", timeout=60).text


def test_a_pooling_base_has_the_same_doors(
    vectors: Path, serving: Callable[..., Any], makers: Any, tmp_path: Path
) -> None:
    base, root = vectors / "e2e/tiny-llama/base", tmp_path / "adapters"
    makers.make_adapters(base, root, {"smoa": ("smoa", (4, 4)), "lora": ("lora", (8,))})
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base")
    pooling = ("--runner", "pooling", "--enable-lora", "--max-lora-rank", "8", "--api-key", KEY)
    resolver = {"VLLM_PLUGINS": "smoa_serve,lora_filesystem_resolver", "VLLM_LORA_RESOLVER_CACHE_DIR": str(root)}
    config = root / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    with serving(base, *arguments, *pooling, SMOA_ADAPTER_ROOTS=str(root), **resolver) as server:
        server.api_key = KEY

        def embedded(model: str) -> Any:
            return server.post("/v1/embeddings", {"model": model, "input": PROMPT})

        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json={}, timeout=60).status_code == 401
        assert httpx.post(f"{server.url}/pooling", json={}, timeout=60).status_code == 401
        plain = embedded("base").raise_for_status().json()["data"][0]["embedding"]
        assert server.post("/v1/load_lora_adapter", {"lora_name": "legal", "lora_path": "smoa"}).status_code == 200
        for model in ("legal", "lora"):  # the second is found by the resolver
            assert embedded(model).raise_for_status().json()["data"][0]["embedding"] != plain
        before = embedded("legal").json()["data"][0]["embedding"]
        assert set(server.adapters()) == {"legal", "lora"}
        assert server.post("/v1/smoa/adapters/legal/merge", {"check": True}).status_code == 409
        assert server.post("/v1/smoa/adapters/legal/resident", {}).json()["step"] == "resident"
        assert embedded("legal").json()["data"][0]["embedding"] == pytest.approx(before, rel=1e-3, abs=1e-3)
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "legal"}).status_code == 200
        for model in ("legal", "lora/../lora", "nobody"):
            assert embedded(model).status_code in {400, 404}
