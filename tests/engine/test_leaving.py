"""What the API server remembers of adapters goes with them. On an engine that keeps a record and can be slow."""

import asyncio
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_serve.adapters.model import AdapterKind
from smoa_serve.store import StagedAdapter

pytestmark = pytest.mark.engine


class Engine:
    """Knows which numbers are loaded, and which requests run."""

    errored = False

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.output_processor = SimpleNamespace(request_states={})
        self.slow: asyncio.Event | None = None
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(_api_process_count=1))

    async def add_lora(self, request: Any) -> bool:
        self.loaded[request.lora_int_id] = request.lora_name
        return True

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        assert method == "smoa_undo"
        return [{}]

    async def remove_lora(self, number: int) -> bool:
        if self.slow is not None:
            await self.slow.wait()
        return self.loaded.pop(number, None) is not None

    def begin(self, request: str, lora: Any) -> None:
        self.loaded[lora.lora_int_id] = lora.lora_name  # as a worker reads what is not there
        self.output_processor.request_states[request] = SimpleNamespace(lora_name=lora.lora_name)

    def end(self, request: str) -> None:
        del self.output_processor.request_states[request]


def staged(path: Path, *_: object) -> StagedAdapter:
    facts: dict[str, Any] = dict.fromkeys(("rank", "max_rank", "num_blocks", "parameters", "bytes"), 1)
    digest = path.name * 64
    return StagedAdapter(
        kind=AdapterKind.SMOA, digest=digest, path=path, order=None, order_error=0.0, source=str(path), **facts
    )


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    # vLLM's module first, as in a server: where the plugin is registered, its import brings ours.
    import vllm.entrypoints.openai.models.serving  # noqa: F401

    from smoa_serve.residence import ladder
    from smoa_serve.server import models as serving_models

    for gauge in (ladder.BYTES, ladder.STEP):  # other tests' adapters
        gauge.clear()
    monkeypatch.setattr(serving_models, "_DRAIN_POLL_S", 0.001)
    models: Any = object.__new__(serving_models.SmoaServingModels)
    models.engine_client, models.lora_requests = Engine(), {}
    numbers = count(1)
    models.lora_id_counter, models.base_model_paths = SimpleNamespace(inc=lambda step: next(numbers)), []
    models.begin()
    models._stage = lambda name, path, requested_path: staged(path)
    models._copies._stage = staged
    models._copies._store = SimpleNamespace(entry=staged)
    return models


async def load(models: Any, name: str, content: str) -> Any:
    async with models.lora_resolver_lock[name]:
        await models._load(name, Path(content), content)
    return models.lora_requests[name]


async def unload(models: Any, name: str) -> None:
    answer = await models.unload_lora_adapter(SimpleNamespace(lora_name=name, lora_int_id=None))
    assert isinstance(answer, str), answer


async def settled(models: Any) -> None:
    while models._draining or models._tasks:
        await asyncio.sleep(0.001)


def remembered(models: Any) -> dict[str, Any]:
    """Everything that could grow."""
    from smoa_serve.residence.engine_client import served
    from smoa_serve.residence.ladder import BYTES, STEP

    counted = {name for name in served(models.engine_client) if name}
    shown = {labels for gauge in (BYTES, STEP) for labels in gauge._metrics}
    own = {name: list(value) for name, value in vars(models).items() if isinstance(value, dict | set)}
    copies = {name: list(value) for name, value in vars(models._copies).items() if isinstance(value, dict | set)}
    grown = own | copies | {"counted": counted, "shown": shown, "locks": list(models.lora_resolver_lock)}
    return {name: value for name, value in grown.items() if value}


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def enter(models: Any, lora: Any, request: str) -> None:
    """What a request does on its way into the engine."""
    from smoa_serve.residence.engine_client import enter_request

    async def add_request(*args: Any, lora_request: Any) -> None:
        await asyncio.sleep(0)
        models.engine_client.begin(request, lora_request)

    await enter_request(add_request, models.engine_client, (), {"lora_request": lora})


def test_nothing_is_remembered_of_adapters_that_have_left(models: Any) -> None:
    from smoa_serve.residence.ladder import BYTES, STEP

    async def test() -> None:
        for place in range(50):
            name = f"name-{place}"
            for content in "ab":
                lora = await load(models, name, content)
                await enter(models, lora, f"request-{place}")
                models.engine_client.end(f"request-{place}")
            STEP.labels(name).set(3)
            BYTES.labels(name).set(8)
            await unload(models, name)
        assert remembered(models)
        await settled(models)
        assert models.engine_client.loaded == {}
        assert remembered(models) == {}

    run(test)


def test_a_request_that_was_looked_up_before_its_adapter_left_leaves_nothing_either(models: Any) -> None:
    async def test() -> None:
        late = await load(models, "late", "a")
        await unload(models, "late")
        await settled(models)
        await enter(models, late, "request")
        assert models.engine_client.loaded
        await asyncio.sleep(0.02)
        assert models.engine_client.loaded, "it still runs"
        models.engine_client.end("request")
        await settled(models)
        assert models.engine_client.loaded == {}
        assert remembered(models) == {}

    run(test)


def test_a_late_request_has_the_number_that_its_content_came_back_with(models: Any) -> None:
    async def test() -> None:
        late = await load(models, "name", "a")
        first = late.lora_int_id
        await unload(models, "name")
        await settled(models)
        again = await load(models, "name", "a")
        assert again.lora_int_id != first
        await enter(models, late, "request")
        assert set(models.engine_client.loaded.values()) == {again.lora_name}
        assert set(models.engine_client.loaded) == {again.lora_int_id}
        models.engine_client.end("request")
        await unload(models, "name")
        await settled(models)
        assert (models.engine_client.loaded, remembered(models)) == ({}, {})

    run(test)


def test_content_that_comes_back_while_it_leaves_stays(models: Any) -> None:
    async def test() -> None:
        lora = await load(models, "name", "a")
        models.engine_client.slow = asyncio.Event()
        await unload(models, "name")
        await asyncio.sleep(0.02)  # it is being removed
        coming = asyncio.create_task(load(models, "name", "a"))
        await asyncio.sleep(0.02)
        models.engine_client.slow.set()
        again = await coming
        await settled(models)
        assert models.engine_client.loaded == {again.lora_int_id: again.lora_name}
        assert lora.lora_name == again.lora_name

    run(test)


def test_an_adapter_stays_while_a_request_is_on_its_way(models: Any) -> None:
    async def test() -> None:
        lora = await load(models, "name", "a")
        async with models.entering(lora):
            await unload(models, "name")
            await asyncio.sleep(0.02)
            assert models.engine_client.loaded
        await settled(models)
        assert models.engine_client.loaded == {}

    run(test)
