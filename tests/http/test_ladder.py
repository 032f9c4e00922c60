"""The ladder's moves, on an engine that only keeps a record."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_serve.errors import MoveAbandonedError
from smoa_serve.http.ladder import Ladder
from smoa_serve.merge_policy import MergePolicy


class Engine:
    """Ready after some pieces of staging."""

    errored = False

    def __init__(self, pieces: int) -> None:
        self.calls: list[str] = []
        self._pieces = pieces

    async def add_lora(self, request: object) -> None:
        self.calls.append("add_lora")

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        self.calls.append(method)
        if method == "smoa_stage":
            ready = self.calls.count(method) >= self._pieces
            return [{"refused": [], "ready": ready, "lost": {"layer": 0.01} if ready else {}}]
        return [{"bytes": 8, "residence": {"1": "slot"}}]


REVISION: Any = SimpleNamespace(name="legal", lora_int_id=1, request=object)


def test_a_merge_is_staged_in_pieces_and_then_committed() -> None:
    engine = Engine(3)
    move = asyncio.run(Ladder(engine).merge(REVISION, MergePolicy.COMPENSATE, 0.25))
    assert engine.calls == ["add_lora", *["smoa_stage"] * 3, "smoa_merge"]
    assert (move.step, move.bytes, move.lost) == ("merged", 8, 0.01)


@pytest.mark.parametrize("pieces", [2, 9], ids=["when it is ready", "while it is staged"])
def test_a_move_that_is_not_wanted_any_more_is_given_up(pieces: int) -> None:
    engine = Engine(pieces)
    answers = iter([True, False])
    with pytest.raises(MoveAbandonedError, match="legal was pinned while it moved"):
        asyncio.run(Ladder(engine).merge(REVISION, MergePolicy.COMPENSATE, 0.25, lambda: next(answers)))
    assert engine.calls == ["add_lora", "smoa_stage", "smoa_stage", "smoa_demote"]


def test_the_move_under_way_is_named_until_it_ends_or_fails() -> None:
    ladder = Ladder(Engine(3))
    seen: list[str | None] = []

    def note() -> bool:
        seen.append(ladder.moving)
        return len(seen) < 2

    with pytest.raises(MoveAbandonedError):
        asyncio.run(ladder.make_resident(REVISION, note))
    assert (seen, ladder.moving) == (["legal to resident"] * 2, None)
    asyncio.run(ladder.merge(REVISION, MergePolicy.COMPENSATE, 0.25))
    assert ladder.moving is None
