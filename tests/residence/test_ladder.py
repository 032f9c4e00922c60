"""The ladder's moves, on an engine of two ranks that may refuse, fail or forget at any call."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_serve.errors import MoveAbandonedError, MoveFailedError, MoveRefusedError, WorkerError
from smoa_serve.residence.ladder import Ladder
from smoa_serve.settings import OthersGet
from tests.residence.fakes import BANK_CHANGES, FAULTS, LOST, PIECES, RANKS, Engine, Rank

pytestmark = pytest.mark.usefixtures("ranks")


REVISION: Any = SimpleNamespace(name="legal", lora_int_id=1, request=lambda: 1)
OTHER: Any = SimpleNamespace(name="other", lora_int_id=2, request=lambda: 2)


def ladder_of(engine: Engine, released: list[Any] | None = None, **current: Any) -> Ladder:
    names = {"legal": REVISION, "other": OTHER} | current
    return Ladder(engine, names, (released if released is not None else []).append)


async def merge(ladder: Ladder, wanted: Callable[[], bool] = lambda: True, max_lost: float = 0.25) -> Any:
    return await ladder.merge(REVISION, OthersGet.COMPENSATE, max_lost, wanted)


async def resident(ladder: Ladder, wanted: Callable[[], bool] = lambda: True) -> Any:
    return await ladder.make_resident(REVISION, wanted)


MOVES = {"merged": merge, "resident": resident}


def test_a_merge_is_staged_in_pieces_and_then_committed() -> None:
    engine = Engine()
    move = asyncio.run(merge(ladder_of(engine)))
    assert engine.calls == ["smoa_status", "add_lora", *["smoa_stage"] * PIECES["merged"], "smoa_commit"]
    assert (move.residence, move.bytes) == ("merged", sum(rank.mover.merger.nbytes for rank in engine.ranks))
    assert move.bytes > 0
    assert move.lost == pytest.approx(LOST, rel=1e-4)


@pytest.mark.parametrize("pieces", [1, PIECES["merged"]], ids=["while it is staged", "when it is ready"])
def test_a_move_that_is_not_wanted_any_more_is_given_up(pieces: int) -> None:
    engine = Engine()
    answers = iter([True] * (pieces - 1) + [False])
    with pytest.raises(MoveAbandonedError, match="legal was pinned while it moved"):
        asyncio.run(merge(ladder_of(engine), lambda: next(answers)))
    assert engine.calls == ["smoa_status", "add_lora", *["smoa_stage"] * pieces, "smoa_undo"]
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
            assert {rank.seen(1) for rank in engine.ranks} == {target}
    expected = dict.fromkeys(("refuse", "fail", "forget"), PIECES[target]) | {"fail in a layer": BANK_CHANGES[target]}
    assert failed == RANKS * expected.get(kind, len(plain.calls))


@pytest.mark.parametrize("kind", ["raise", "raise after"])
def test_what_one_rank_could_not_undo_is_undone_before_the_next_move(kind: str) -> None:
    """Staging fails on one rank and giving up on the other: without it every later merge would be refused."""
    engine = Engine()

    async def twice() -> None:
        ladder = ladder_of(engine)
        answers = iter([True, False])
        engine.fault = (1, 4, kind)  # the undo that follows
        with pytest.raises(MoveAbandonedError):
            await merge(ladder, lambda: next(answers))
        assert engine.calls[4] == "smoa_undo"
        move = await ladder.merge(OTHER, OthersGet.COMPENSATE, 0.25)
        assert move.residence == "merged"

    asyncio.run(twice())
    assert [rank.mover.merger.lora_id for rank in engine.ranks] == [2, 2]


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


@pytest.mark.parametrize("target", MOVES)
def test_an_adapter_that_a_rank_forgot_when_it_was_asked_there_again_is_there_on_no_rank(target: str) -> None:
    engine = Engine()

    async def again() -> None:
        ladder = ladder_of(engine)
        await MOVES[target](ladder)
        engine.fault = (1, len(engine.calls) + 2, "forget")
        with pytest.raises(MoveRefusedError, match="not in the engine"):
            await MOVES[target](ladder)
        assert (engine.calls[-3], engine.calls[-1]) == ("smoa_stage", "smoa_undo")

    asyncio.run(again())
    assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS


@pytest.mark.parametrize("other", [True, False], ids=["others come in", "it comes back at once"])
@pytest.mark.parametrize("target", MOVES)
def test_staging_begins_anew_where_it_has_to_when_the_slot_is_taken(target: str, other: bool) -> None:
    engine = Engine()
    seen: list[int] = []

    def lose() -> bool:
        seen.append(1)
        if len(seen) == 2:
            for rank in engine.ranks:
                rank.take_slot(1)
                rank.add_lora(9)
                if other:
                    rank.slot_of(9)
        return True

    assert asyncio.run(MOVES[target](ladder_of(engine), lose)).residence == target
    assert {rank.seen(1) for rank in engine.ranks} == {target}


@pytest.mark.parametrize("kind", ["take_slot", "remove_lora"])
@pytest.mark.parametrize("target", MOVES)
def test_what_a_rank_has_no_more_when_it_is_to_be_committed_is_undone_everywhere(target: str, kind: str) -> None:
    engine = Engine()
    seen: list[int] = []

    def lose() -> bool:
        seen.append(1)
        if len(seen) == PIECES[target]:  # all are ready
            getattr(engine.ranks[1], kind)(1)
        return True

    stays = (target, kind) == ("merged", "take_slot")  # it is in the weights
    ladder = ladder_of(engine)
    if stays:
        asyncio.run(MOVES[target](ladder, lose))
        assert {rank.seen(1) for rank in engine.ranks} == {"merged"}
        return
    with pytest.raises(MoveFailedError, match="the adapter is not staged yet"):
        asyncio.run(MOVES[target](ladder, lose))
    assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS


def test_the_merged_adapter_is_named_to_who_wants_to_merge_another() -> None:
    async def both() -> None:
        ladder = ladder_of(Engine())
        await merge(ladder)
        with pytest.raises(MoveRefusedError, match="another adapter is merged: legal; un-merge it first") as refused:
            await ladder.merge(OTHER, OthersGet.COMPENSATE, 0.25)
        assert not refused.value.lasting

    asyncio.run(both())


@pytest.mark.parametrize(("target", "when"), [(target, when) for target in MOVES for when in range(PIECES[target] + 1)])
def test_a_revision_that_was_unloaded_or_replaced_while_its_move_waited_is_not_moved(target: str, when: int) -> None:
    engine, released = Engine(), []
    seen: list[int] = []
    names: dict[str, Any] = {"legal": REVISION if when else OTHER}
    ladder = Ladder(engine, names, released.append)

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
        ladder = Ladder(engine, names, [].append)
        await merge(ladder)
        names["legal"] = newer
        await ladder.to_slot(newer)

    asyncio.run(replaced())
    assert [rank.mover.merger.lora_id for rank in engine.ranks] == [None, None]


def test_an_unloaded_adapter_is_unmerged_at_once() -> None:
    engine = Engine()

    async def unloaded() -> None:
        ladder = ladder_of(engine)
        await merge(ladder)
        await ladder.forget(REVISION)

    asyncio.run(unloaded())
    assert [rank.held for rank in engine.ranks] == [Rank().held] * RANKS
