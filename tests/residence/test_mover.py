"""One rank's mover by itself: every arrow of its machine that is drawn in docs/explain/residence.md."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from smoa_serve.engine.exchange import PlainExchange
from smoa_serve.engine.merging import WeightChecksumError
from smoa_serve.engine.messages import Residence
from smoa_serve.engine.mover import State
from smoa_serve.errors import AdapterBusyError, AdapterError
from smoa_serve.settings import OthersGet
from tests.residence.fakes import PIECES, Rank

pytestmark = pytest.mark.usefixtures("ranks")
BOTH = pytest.mark.parametrize("target", [Residence.MERGED, Residence.RESIDENT])
EXCLUSIVE = OthersGet.EXCLUSIVE


def rank_with(*numbers: int) -> Rank:
    rank = Rank()
    for number in numbers:
        rank.add_lora(number)
    return rank


def stage(rank: Rank, number: int, target: Residence, pieces: int | None = None) -> bool:
    """So many pieces, or all; whether it is ready."""
    ready = False
    for _ in range(PIECES[target] if pieces is None else pieces):
        ready = rank.mover.stage(number, target, 0.01).ready
    return ready


@BOTH
def test_staging_ends_ready_and_a_commit_brings_it_up(target: Residence) -> None:
    rank = rank_with(1)
    assert not stage(rank, 1, target, PIECES[target] - 1)
    assert (rank.mover.state, rank.mover.moving, rank.mover.committed) == (State.STAGING, 1, {})
    assert stage(rank, 1, target, 1)
    assert (rank.mover.state, rank.mover.moving, rank.mover.committed) == (State.STAGED, 1, {})
    assert rank.mover.commit(1, target, EXCLUSIVE) > 0
    assert (rank.mover.state, rank.mover.moving, rank.mover.committed) == (State.IDLE, None, {1: target})
    assert stage(rank, 1, target, 1), "what is there already is ready"
    assert rank.mover.state is State.IDLE
    rank.mover.undo(1, target)
    assert rank.held == Rank().held


@BOTH
@pytest.mark.parametrize("short", [0, 1], ids=["nothing", "a piece too few"])
def test_what_is_not_staged_is_not_committed(target: Residence, short: int) -> None:
    rank = rank_with(1)
    stage(rank, 1, target, short * (PIECES[target] - 1))
    with pytest.raises(AdapterBusyError, match="the adapter is not staged yet"):
        rank.mover.commit(1, target, EXCLUSIVE)
    assert rank.mover.committed == {}


@BOTH
def test_another_adapter_or_rung_than_the_staged_one_is_not_committed(target: Residence) -> None:
    rank = rank_with(1, 2)
    stage(rank, 1, target)
    (other,) = {Residence.MERGED, Residence.RESIDENT} - {target}
    for number, rung in ((2, target), (1, other)):
        with pytest.raises(AdapterBusyError):
            rank.mover.commit(number, rung, EXCLUSIVE)
    assert rank.mover.committed == {}


@BOTH
@pytest.mark.parametrize("pieces", [1, None], ids=["staging", "staged"])
@pytest.mark.parametrize("end", ["undo", "forget", "forget_all", "a refusal", "a failure", "another", "lost slot"])
def test_whatever_ends_what_is_in_progress_leaves_nothing(target: Residence, pieces: int | None, end: str) -> None:
    rank = rank_with(1, 2)
    stage(rank, 1, target, pieces)
    ends: dict[str, Callable[[], object]] = {
        "undo": lambda: rank.mover.undo(1),
        "forget": lambda: rank.remove_lora(1),
        "forget_all": rank.mover.forget_all,
        "a refusal": lambda: setattr(rank, "refuses", True) or rank.mover.stage(1, target, 0.01),
        "a failure": lambda: setattr(rank, "fails_at", 0) or rank.mover.stage(1, target, 0.01),
        "another": lambda: stage(rank, 2, target) and rank.mover.undo(2),
        "lost slot": lambda: rank.take_slot(1),
    }
    raises = end in ("a refusal", "a failure")
    with pytest.raises((AdapterError, RuntimeError)) if raises else nullcontext():
        ends[end]()
    if end == "lost slot" and target is Residence.MERGED:
        assert rank.mover.moving == 1, "what is staged of a merge does not lie in the slot"
        rank.mover.undo(1)
    if end == "forget_all":
        rank.take_slot(1)
    assert rank.held == Rank().held


def test_beside_a_merged_adapter_no_other_is_merged() -> None:
    rank = rank_with(1, 2)
    stage(rank, 1, Residence.MERGED)
    rank.mover.commit(1, Residence.MERGED, EXCLUSIVE)
    with pytest.raises(AdapterBusyError, match="another adapter is merged; un-merge it first"):
        stage(rank, 2, Residence.MERGED, 1)
    assert stage(rank, 2, Residence.RESIDENT)
    rank.mover.commit(2, Residence.RESIDENT, EXCLUSIVE)
    assert (rank.seen(1), rank.seen(2)) == (Residence.MERGED, Residence.RESIDENT)


def test_what_cannot_be_given_back_is_untidy_and_the_next_merge_tidies_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_with(1, 2)
    stage(rank, 1, Residence.MERGED)
    with monkeypatch.context() as patch:
        patch.setattr(type(rank.layers[0].smoa_bank), "drop_merged", lambda bank: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank.mover.undo(1)
    assert (rank.mover.state, rank.mover.moving) == (State.UNTIDY, None)
    assert stage(rank, 2, Residence.MERGED)
    assert rank.mover.commit(2, Residence.MERGED, EXCLUSIVE) > 0


def test_a_weight_that_is_not_the_original_breaks_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_with(1)
    stage(rank, 1, Residence.MERGED)
    rank.mover.commit(1, Residence.MERGED, EXCLUSIVE)
    monkeypatch.setattr(PlainExchange, "checksum", lambda exchange: b"another")
    with pytest.raises(WeightChecksumError, match="restart the server"):
        rank.mover.undo(1)
    assert rank.mover.state is State.BROKEN
