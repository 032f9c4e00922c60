"""Requests are counted under the adapter that serves them, however they bring it."""

import asyncio
import functools
from typing import Any

import pytest

from smoa_serve.residence.engine_client import enter_request, served

pytestmark = [pytest.mark.engine, pytest.mark.matrix]


def test_a_request_counts_for_its_adapter_however_it_is_given() -> None:
    import wrapt
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    def adapter(name: str) -> Any:
        return LoRARequest(lora_name=name, lora_int_id=1, lora_path="x")

    def rendered(lora: Any) -> Any:
        facts = dict.fromkeys(EngineCoreRequest.__struct_fields__[: -len(EngineCoreRequest.__struct_defaults__)])
        return EngineCoreRequest(**facts | {"lora_request": lora, "sampling_params": settings})

    class Engine:
        @functools.wraps(AsyncLLM.add_request)
        async def add_request(self, *args: Any, **kwargs: Any) -> str:
            return "added"

    async def add(*args: Any, **kwargs: Any) -> None:
        assert await engine.add_request(*args, **kwargs) == "added"

    wrapt.wrap_function_wrapper(Engine, "add_request", enter_request)
    engine, settings = Engine(), SamplingParams()
    prompt = {"prompt_token_ids": [1]}
    asyncio.run(add("1", prompt, settings, lora_request=adapter("by keyword")))
    asyncio.run(add("2", prompt, settings, None, adapter("in its place")))
    asyncio.run(add("3", rendered(adapter("rendered")), settings))
    asyncio.run(add("4", prompt=rendered(adapter("rendered")), params=settings, lora_request=adapter("not that one")))
    asyncio.run(add(request_id="5", prompt=prompt, params=settings))
    asyncio.run(add("6", rendered(None), settings))
    assert served(engine) == {"by keyword": 1, "in its place": 1, "rendered": 2}
