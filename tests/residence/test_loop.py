"""The policy's loop: what it remembers of a refusal, and what it counts."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from smoa_kernels import CostModel

from smoa_serve.adapters.model import AdapterKind
from smoa_serve.engine.messages import AdapterStatus, Residence, WorkerStatus
from smoa_serve.errors import MoveFailedError, MoveRefusedError
from smoa_serve.residence.ladder import Move
from smoa_serve.residence.loop import LadderLoop
from smoa_serve.settings import Settings


class Ladder:
    """Answers every move as it is told, and keeps a record.

    Attributes:
        tried: actions in order; answer: what comes of them.
    """

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.answer: Exception | None = None
        self.pinned: set[str] = set()
        self.steps = 0

    async def statuses(self) -> list[WorkerStatus]:
        self.steps += 10
        adapter = AdapterStatus(
            Residence.SLOT, block_bytes=8, tokens=self.steps * 8, alone=self.steps * 8, alone_steps=self.steps
        )
        cost = CostModel(form=5.0, form_per_rank=1.0, resident=4.0)
        return [WorkerStatus("1", lora=True, cost=cost, steps=self.steps, weight_bytes=64, adapters={1: adapter})]

    async def merge(self, *_: Any) -> Move:
        return self._moved("merge", Residence.MERGED)

    async def make_resident(self, *_: Any) -> Move:
        return self._moved("resident", Residence.RESIDENT)

    def _moved(self, action: str, where: Residence) -> Move:
        self.tried.append(action)
        if self.answer is not None:
            raise self.answer
        return Move(where, 0.0, 0.0, 0)


def revision(engine_name: str = "legal@1") -> Any:
    staged = SimpleNamespace(kind=AdapterKind.SMOA, max_rank=4, num_blocks=4)
    return SimpleNamespace(name="legal", engine_name=engine_name, lora_int_id=1, staged=staged)


def looks(answer: Exception | None, revisions: list[Any]) -> list[str]:
    """The actions that are tried while the loop looks once at each of `revisions`."""
    ladder: Any = Ladder()
    ladder.answer = answer
    engine: Any = SimpleNamespace(vllm_config=SimpleNamespace(device_config=SimpleNamespace(device_type="cpu")))
    loop = LadderLoop(engine, ladder, Settings(residence={"auto_merge": True}))

    async def run() -> None:
        for one in revisions:
            await loop.look({"legal": one})

    asyncio.run(run())
    tried: list[str] = ladder.tried
    return tried


@pytest.mark.parametrize(
    "answer",
    [
        MoveRefusedError("legal", "another adapter is merged: other; un-merge it first"),
        MoveFailedError("moving adapter 'legal' failed and was undone"),
    ],
    ids=["refused as things were", "failed"],
)
def test_what_may_go_well_another_time_is_tried_again(answer: Exception) -> None:
    assert looks(answer, [revision()] * 7)[:3] == ["merge"] * 3


def test_what_would_be_refused_again_is_not_tried_again_and_the_next_best_is() -> None:
    lasting = MoveRefusedError("legal", "its weight is packed", lasting=True)
    tried = looks(lasting, [revision()] * 9)
    assert tried == ["merge", "resident"]


def test_new_content_under_the_name_is_tried_anew() -> None:
    lasting = MoveRefusedError("legal", "its weight is packed", lasting=True)
    tried = looks(lasting, [revision()] * 9 + [revision("legal@2")] * 4)
    assert tried[:3] == ["merge", "resident", "merge"]
