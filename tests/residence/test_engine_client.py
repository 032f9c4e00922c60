"""Calls of all workers: every data-parallel replica answers, and one that fails is heard."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_serve.engine.messages import StageReport
from smoa_serve.errors import WorkerError
from smoa_serve.residence.engine_client import ask_workers, bring_in


class Core:
    """vLLM's client of two replicas behind its own load balancer: every replica does what is called, in its time. Of
    vLLM's own call only the first one's answer is returned.

    Attributes:
        done: (replica, method) in the order of ending.
    """

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.core_engines = [b"first", b"second"]
        self._answers = answers
        self.done: list[tuple[bytes, str]] = []

    async def _call_utility_async(self, method: str, *arguments: Any, engine: bytes) -> Any:
        rank = self.core_engines.index(engine)
        called = arguments[0] if method == "collective_rpc" else method
        answer = self._answers[called][rank]
        await asyncio.sleep(0.01 * rank)
        self.done.append((engine, called))
        if isinstance(answer, Exception):
            raise answer
        return answer


def engine_of(core: Core) -> Any:
    async def add_lora(request: Any) -> Any:
        answers = await asyncio.gather(*(core._call_utility_async("add_lora", engine=one) for one in core.core_engines))
        return answers[0]

    async def remove_lora(number: int) -> Any:
        core.done.append((b"all", "remove_lora"))

    return SimpleNamespace(engine_core=core, errored=False, add_lora=add_lora, remove_lora=remove_lora)


def test_the_answers_of_all_replicas_are_gathered() -> None:
    core = Core({"smoa_stage": [[{"ready": True}], [{"ready": False}]]})
    assert asyncio.run(ask_workers(engine_of(core), StageReport, 1)) == [
        StageReport(ready=True),
        StageReport(ready=False),
    ]


@pytest.mark.parametrize("failed", [[{"raised": "no room"}], RuntimeError("no room")], ids=["told", "raised"])
@pytest.mark.parametrize("replica", [0, 1])
def test_what_fails_on_one_replica_fails_the_call_when_all_have_ended(failed: Any, replica: int) -> None:
    answers: list[Any] = [[{"ready": True}], [{"ready": True}]]
    answers[replica] = failed
    core = Core({"smoa_stage": answers})
    with pytest.raises((WorkerError, RuntimeError), match="no room"):
        asyncio.run(ask_workers(engine_of(core), StageReport, 1))
    assert len(core.done) == 2


def test_an_adapter_that_one_replica_refuses_is_on_none() -> None:
    core = Core({"add_lora": [True, RuntimeError("no room")]})
    with pytest.raises(RuntimeError, match="no room"):
        asyncio.run(bring_in(engine_of(core), SimpleNamespace(lora_int_id=1)))
    assert core.done[-1] == (b"all", "remove_lora")
