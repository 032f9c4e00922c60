"""The ladder's moves, on an engine of two ranks that may refuse, fail or forget at any call."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_serve.engine.messages import AdapterStatus, Residence, WorkerStatus
from smoa_serve.errors import MoveAbandonedError, MoveFailedError, MoveRefusedError, WorkerError
from smoa_serve.residence.ladder import Ladder
from smoa_serve.settings import MergePolicy

RANKS, PIECES = 2, 3


@dataclass
class Rank:
    """One worker, by the rules of `engine/rpc.py`: what fails on it is undone on it."""

    loaded: set[int] = field(default_factory=set)
    staged: tuple[int, int] | None = None
    merged: int | None = None
    forming: tuple[int, int] | None = None
    resident: set[int] = field(default_factory=set)

    @property
    def held(self) -> tuple[Any, ...]:
        """What moves hold here."""
        return self.staged, self.merged, self.forming, sorted(self.resident)

    def add_lora(self, number: int) -> None:
        self.loaded.add(number)

    def remove_lora(self, number: int) -> None:
        self.loaded.discard(number)
        self.smoa_demote(number, None)

    def smoa_stage(self, number: int, target: str, _: float) -> dict[str, Any]:
        report = {"refused": [], "lasting": False, "failed": None, "ready": False, "lost": {}}
        if number not in self.loaded:
            return report | {"refused": ["it is not in the engine"]}
        if target == "resident":
            done = (self.forming or (number, 0))[1] + 1
            ready = done >= PIECES
            self.forming = None if ready else (number, done)
            self.resident |= {number} if ready else set()
        else:
            if self.merged not in (None, number):
                return report | {"refused": ["another adapter is merged; un-merge it first"]}
            done = self.staged[1] + 1 if self.staged is not None and self.staged[0] == number else 1
            ready, self.staged = done >= PIECES, (number, done)
        return report | {"ready": ready, "lost": {"layer": 0.01} if ready else {}}

    def smoa_merge(self, _: str) -> dict[str, Any]:
        assert self.staged is not None
        assert self.staged[1] >= PIECES, "a half-staged adapter was committed"
        self.merged = self.staged[0]
        return {"bytes": 8}

    def smoa_demote(self, number: int, target: str | None) -> dict[str, Any]:
        if target != "resident" and self.staged is not None and self.staged[0] == number:
            self.staged = self.merged = None
        if target != "merged":
            self.resident.discard(number)
            if self.forming is not None and self.forming[0] == number:
                self.forming = None
        return {}

    def smoa_status(self) -> dict[str, Any]:
        residence = {str(number): "slot" for number in self.loaded} | {str(n): "resident" for n in self.resident}
        if self.merged is not None:
            residence[str(self.merged)] = "merged"
        adapters = {
            int(number): AdapterStatus(Residence(where), resident_bytes=8 * (int(number) in self.resident))
            for number, where in residence.items()
        }
        return WorkerStatus("1", lora=True, adapters=adapters).to_wire()


class Engine:
    """Of `RANKS` workers.

    Attributes:
        calls: what was asked for, in order.
        fault: what happens at a call instead: (rank, index among `calls`, kind).
    """

    errored = False

    def __init__(self, fault: tuple[int, int, str] | None = None) -> None:
        self.ranks = [Rank() for _ in range(RANKS)]
        self.calls: list[str] = []
        self.fault = fault

    async def add_lora(self, request: Any) -> None:
        self._all("add_lora", request)

    async def remove_lora(self, number: int) -> None:
        self._all("remove_lora", number)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return self._all(method, *args)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Every rank does its part, then the first error of one is raised: as vLLM's executor."""
        place = len(self.calls)
        self.calls.append(method)
        answers = [self._one(rank, place, method, arguments) for rank in range(RANKS)]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _one(self, rank: int, place: int, method: str, arguments: tuple[Any, ...]) -> Any:
        worker = self.ranks[rank]
        kind = self.fault[2] if self.fault is not None and self.fault[:2] == (rank, place) else None
        if kind == "forget" and method == "smoa_stage":
            worker.remove_lora(arguments[0])
        if kind == "refuse" and method == "smoa_stage":
            return {"refused": ["its weight is packed"], "lasting": True, "failed": None, "ready": False, "lost": {}}
        if kind == "fail" and method == "smoa_stage":
            worker.smoa_demote(arguments[0], arguments[1])
            return {"refused": [], "lasting": False, "failed": "OutOfMemoryError: no", "ready": False, "lost": {}}
        if kind in ("raise", "raise after"):
            if kind == "raise after":
                getattr(worker, method)(*arguments)
            failed = f"{method} failed on rank {rank}"
            # As `engine/rpc.py` and as vLLM's own calls do.
            return {"raised": failed} if method.startswith("smoa_") else RuntimeError(failed)
        return getattr(worker, method)(*arguments)


REVISION: Any = SimpleNamespace(name="legal", lora_int_id=1, request=lambda: 1)
OTHER: Any = SimpleNamespace(name="other", lora_int_id=2, request=lambda: 2)


def ladder_of(engine: Engine, released: list[Any] | None = None, **current: Any) -> Ladder:
    names = {"legal": REVISION, "other": OTHER} | current
    return Ladder(engine, names.get, (released if released is not None else []).append)


async def merge(ladder: Ladder, wanted: Callable[[], bool] = lambda: True, max_lost: float = 0.25) -> Any:
    return await ladder.merge(REVISION, MergePolicy.COMPENSATE, max_lost, wanted)


async def resident(ladder: Ladder, wanted: Callable[[], bool] = lambda: True) -> Any:
    return await ladder.make_resident(REVISION, wanted)


MOVES = {"merged": merge, "resident": resident}


def test_a_merge_is_staged_in_pieces_and_then_committed() -> None:
    engine = Engine()
    move = asyncio.run(merge(ladder_of(engine)))
    assert engine.calls == ["smoa_status", "add_lora", *["smoa_stage"] * PIECES, "smoa_merge"]
    assert (move.residence, move.bytes, move.lost) == ("merged", 8 * RANKS, 0.01)


@pytest.mark.parametrize("pieces", [1, PIECES], ids=["while it is staged", "when it is ready"])
def test_a_move_that_is_not_wanted_any_more_is_given_up(pieces: int) -> None:
    engine = Engine()
    answers = iter([True] * (pieces - 1) + [False])
    with pytest.raises(MoveAbandonedError, match="legal was pinned while it moved"):
        asyncio.run(merge(ladder_of(engine), lambda: next(answers)))
    assert engine.calls == ["smoa_status", "add_lora", *["smoa_stage"] * pieces, "smoa_demote"]
    assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS


def test_the_move_under_way_is_named_until_it_ends_or_fails() -> None:
    ladder = ladder_of(Engine())
    seen: list[str | None] = []

    def note() -> bool:
        seen.append(ladder.moving)
        return len(seen) < 2

    with pytest.raises(MoveAbandonedError):
        asyncio.run(resident(ladder, note))
    assert (seen, ladder.moving) == (["legal to resident"] * 2, None)
    asyncio.run(merge(ladder))
    assert ladder.moving is None


FAULTS = ("refuse", "fail", "forget", "raise", "raise after")


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("target", MOVES)
def test_a_move_that_fails_at_any_call_on_any_rank_is_undone_everywhere_and_can_be_repeated(
    target: str, kind: str
) -> None:
    move = MOVES[target]
    plain = Engine()
    asyncio.run(move(ladder_of(plain)))
    failed = 0
    for rank in range(RANKS):
        for place in range(len(plain.calls)):
            engine = Engine((rank, place, kind))
            ladder = ladder_of(engine)
            try:
                asyncio.run(move(ladder))
            except (MoveRefusedError, MoveFailedError, WorkerError):
                failed += 1
                assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS, (rank, place, engine.calls)
            engine.fault = None
            assert asyncio.run(move(ladder)).residence == target
            assert {rank.smoa_status()["residence"]["1"] for rank in engine.ranks} == {target}
    expected = {"refuse": PIECES, "fail": PIECES, "forget": PIECES}.get(kind, len(plain.calls))
    assert failed == RANKS * expected


@pytest.mark.parametrize("kind", ["raise", "raise after"])
def test_what_one_rank_could_not_undo_is_undone_before_the_next_move(kind: str) -> None:
    """Staging fails on one rank and giving up on the other: without it every later merge would be refused."""
    engine = Engine()

    async def twice() -> None:
        ladder = ladder_of(engine)
        answers = iter([True, False])
        engine.fault = (1, 4, kind)  # the demote that follows
        with pytest.raises(MoveAbandonedError):
            await merge(ladder, lambda: next(answers))
        assert engine.calls[4] == "smoa_demote"
        move = await ladder.merge(OTHER, MergePolicy.COMPENSATE, 0.25)
        assert move.residence == "merged"

    asyncio.run(twice())
    assert [rank.merged for rank in engine.ranks] == [2, 2]


def test_a_refused_merge_leaves_a_resident_adapter_resident() -> None:
    engine = Engine()

    async def both() -> None:
        ladder = ladder_of(engine)
        await resident(ladder)
        with pytest.raises(MoveRefusedError, match="rounding"):
            await merge(ladder, max_lost=0.001)
        assert await ladder.residence(REVISION) == "resident"

    asyncio.run(both())


def test_a_refused_second_merge_of_a_merged_adapter_leaves_it_merged() -> None:
    engine = Engine()

    async def both() -> None:
        ladder = ladder_of(engine)
        await merge(ladder)
        with pytest.raises(MoveRefusedError, match="rounding"):
            await merge(ladder, max_lost=0.001)
        assert await ladder.residence(REVISION) == "merged"

    asyncio.run(both())


def test_the_merged_adapter_is_named_to_who_wants_to_merge_another() -> None:
    async def both() -> None:
        ladder = ladder_of(Engine())
        await merge(ladder)
        with pytest.raises(MoveRefusedError, match="another adapter is merged: legal; un-merge it first") as refused:
            await ladder.merge(OTHER, MergePolicy.COMPENSATE, 0.25)
        assert not refused.value.lasting

    asyncio.run(both())


@pytest.mark.parametrize("target", MOVES)
@pytest.mark.parametrize("when", range(PIECES + 1), ids=lambda when: f"after piece {when}")
def test_a_revision_that_was_unloaded_or_replaced_while_its_move_waited_is_not_moved(target: str, when: int) -> None:
    engine, released = Engine(), []
    seen: list[int] = []
    names: dict[str, Any] = {"legal": REVISION if when else OTHER}
    ladder = Ladder(engine, names.get, released.append)

    def count() -> bool:
        seen.append(1)
        if len(seen) == when:
            del names["legal"]
        return True

    with pytest.raises(MoveRefusedError, match="unloaded or replaced"):
        asyncio.run(MOVES[target](ladder, count))
    assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS
    assert released == [REVISION]


def test_unmerging_by_name_reaches_an_earlier_revision_that_is_still_merged() -> None:
    engine = Engine()
    names: dict[str, Any] = {"legal": REVISION}
    newer: Any = SimpleNamespace(name="legal", lora_int_id=3, request=lambda: 3)

    async def replaced() -> None:
        ladder = Ladder(engine, names.get, [].append)
        await merge(ladder)
        names["legal"] = newer
        await ladder.to_slot(newer)

    asyncio.run(replaced())
    assert [rank.merged for rank in engine.ranks] == [None, None]


def test_an_unloaded_adapter_is_unmerged_at_once() -> None:
    engine = Engine()

    async def unloaded() -> None:
        ladder = ladder_of(engine)
        await merge(ladder)
        await ladder.forget(REVISION)

    asyncio.run(unloaded())
    assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS
