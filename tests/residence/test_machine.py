"""Random sequences of everything that may happen to adapters' residence, on the real ladder and on two ranks with the
real mover, against a model that knows only which calls all ranks answered."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from smoa_serve.engine.messages import Residence, on_all_workers
from smoa_serve.engine.mover import State
from smoa_serve.errors import MoveRefusedError, SmoaError
from smoa_serve.residence.ladder import Ladder
from smoa_serve.settings import OthersGet
from tests.residence.fakes import FAULTS, LOST, RANKS, SLOTS, Bank, Engine, Rank

NAMES = ("legal", "other")
MERGED, RESIDENT = Residence.MERGED, Residence.RESIDENT
ABOVE = (MERGED, RESIDENT)


class Waiting(Engine):
    """Each call waits until it is served, so that anything may happen between two of a move.

    Attributes:
        queue: calls that wait, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[tuple[str, tuple[Any, ...], asyncio.Future[Any]]] = []

    async def _all(self, method: str, *arguments: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        self.queue.append((method, arguments, future))
        return await future


class Model:
    """What all ranks must hold, by the calls that they were served.

    Attributes:
        committed: (adapter, rung).
        unsure: pairs of which some rank alone has done or forgotten something; the next undo settles them.
        left: adapters of which a rank could not undo something.
    """

    def __init__(self) -> None:
        self.committed: set[tuple[int, Residence]] = set()
        self.unsure: set[tuple[int, Residence]] = set()
        self.left: set[int] = set()

    def served(self, method: str, arguments: tuple[Any, ...], kind: str | None) -> None:
        whole = kind not in ("raise", "raise after")
        number = arguments[0] if arguments else 0
        match method:
            case "smoa_stage" if kind == "forget":
                self.unsure |= {(number, rung) for rung in ABOVE} & self.committed
            case "smoa_commit":
                pair = (number, Residence(arguments[1]))
                if whole:
                    self.committed.add(pair)
                elif pair not in self.committed:
                    self.unsure.add(pair)
            case "smoa_undo" | "remove_lora":
                target = arguments[1] if method == "smoa_undo" else None
                pairs = {(number, rung) for rung in ABOVE if target in (None, rung)}
                if whole:
                    self.committed -= pairs
                    self.unsure -= pairs
                    self.left -= {number} if target is None else set()
                else:
                    self.left |= {number} if method == "smoa_undo" else set()
                    self.unsure |= pairs & (self.committed | self.unsure)

    def lost(self, number: int, *rungs: Residence) -> None:
        """On all ranks."""
        self.committed -= {(number, rung) for rung in rungs}
        self.unsure -= {(number, rung) for rung in rungs}


class Moves(RuleBasedStateMachine):
    """The machine that is drawn in docs/explain/residence.md."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine, self.model = Waiting(), Model()
        self.revisions: dict[str, Any] = {}
        self.pinned: set[str] = set()
        self.numbers = iter(range(1, 1000))
        self.ladder = Ladder(self.engine, self.revisions, self._release)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.known: set[int] = set()
        self.wrong: BaseException | None = None

    def teardown(self) -> None:
        for task in self.tasks:
            task.cancel()
        while self.tasks or self.engine.queue:
            self._settle()
            if self.engine.queue:
                self._serve(None, None)
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    # What the server does.

    def _release(self, revision: Any) -> None:
        self._start(self._leave(revision))

    async def _leave(self, revision: Any) -> None:
        """As `SmoaServingModels._drain`."""
        with suppress(SmoaError):
            await self.ladder.forget(revision)
        while True:
            with suppress(RuntimeError):
                await self.engine.remove_lora(revision.lora_int_id)
                return

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        self._settle()
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and isinstance(task.exception(), AssertionError):
            self.wrong = task.exception()

    def _settle(self) -> None:
        """Until everything that runs waits for the engine."""

        async def turns() -> None:
            for _ in range(15):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def _serve(self, rank: int | None, kind: str | None) -> None:
        method, arguments, future = self.engine.queue.pop(0)
        if future.done():  # who asked has given up
            return
        self.model.served(method, arguments, kind)
        try:
            future.set_result(self.engine.serve(method, arguments, rank, kind))
        except RuntimeError as error:
            future.set_exception(error)
        self._settle()

    def _next(self) -> str | None:
        """The method that is called next."""
        return self.engine.queue[0][0] if self.engine.queue else None

    def _serve_until(self, method: str) -> None:
        for _ in range(20):
            if self._next() not in (None, method):
                self._serve(None, None)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """To its end, while nothing fails."""
        task = self._start(work)
        for _ in range(1000):
            if task.done():
                return task.result()
            self._serve(None, None)
        raise AssertionError("it never ended")

    def _move(self, name: str, target: Residence, wanted: Any = lambda: True) -> Coroutine[Any, Any, Any]:
        revision = self.revisions[name]
        if target is MERGED:
            return self.ladder.merge(revision, OthersGet.EXCLUSIVE, 0.25, wanted)
        return self.ladder.make_resident(revision, wanted) if target is RESIDENT else self.ladder.to_slot(revision)

    async def _tried(self, name: str, target: Residence, wanted: Any) -> None:
        """A move; when it fails and no undoing failed with it, the adapter is not above where it was."""
        number = self.revisions[name].lora_int_id
        try:
            await self._move(name, target, wanted)
        except SmoaError:
            if number not in self.model.left and (number, target) not in self.model.committed | self.model.unsure:
                assert all(rank.mover.committed.get(number) is not target for rank in self.engine.ranks)
                assert all(rank.mover.moving != number for rank in self.engine.ranks)
        else:
            if target is not Residence.SLOT:
                assert (number, target) in self.model.committed
                assert all(rank.mover.committed[number] is target for rank in self.engine.ranks)

    # What may happen.

    @initialize()
    def begin(self) -> None:
        for name in NAMES:
            self.load(name)

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        """New content under a name: unloads what it meant."""
        number = next(self.numbers)
        revision = SimpleNamespace(name=name, lora_int_id=number, request=lambda: number)
        for rank in self.engine.ranks:
            rank.add_lora(number)
        self.known.add(number)
        before = self.revisions.get(name)
        self.revisions[name] = revision
        if before is not None:
            self._release(before)

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if name in self.revisions:
            self._release(self.revisions.pop(name))

    @precondition(lambda self: len(self.tasks) < 3 and self.revisions)
    @rule(
        data=st.data(),
        rung=st.sampled_from((MERGED, RESIDENT, MERGED, RESIDENT, Residence.SLOT)),
        by_policy=st.booleans(),
        goes_wrong=st.booleans(),
    )
    def move(self, data: st.DataObject, rung: Residence, by_policy: bool, goes_wrong: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.revisions)))
        self._start(self._tried(name, rung, lambda: not by_policy or name not in self.pinned))
        if goes_wrong:
            self.fault(data)
        else:
            self.work(data.draw(st.integers(0, 8)))

    @rule(name=st.sampled_from(NAMES))
    def pin_or_unpin(self, name: str) -> None:
        """What the policy moves is given up when it is pinned."""
        self.pinned ^= {name}

    @precondition(lambda self: self.engine.queue)
    @rule(calls=st.integers(1, 4) | st.just(100))
    def work(self, calls: int) -> None:
        """The engine answers, and nothing fails."""
        for _ in range(calls):
            if self.engine.queue:
                self._serve(None, None)

    @precondition(lambda self: self.engine.queue)
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        """In one of the next calls a rank refuses, fails, forgets or raises; perhaps again in what follows."""
        method = data.draw(st.sampled_from(("smoa_stage", "smoa_stage", "smoa_commit", "smoa_undo", "add_lora")))
        self._serve_until(method)
        for _ in range(data.draw(st.integers(0, 5)) if method == "smoa_stage" else 0):
            if self._next() == method:
                self._serve(None, None)
        for _ in range(data.draw(st.integers(1, 2))):
            kinds = FAULTS if self._next() == "smoa_stage" else ("raise", "raise after")
            if self.engine.queue:
                self._serve(data.draw(st.integers(0, RANKS - 1)), data.draw(st.sampled_from(kinds)))
        self.work(data.draw(st.integers(0, 3)))

    @precondition(lambda self: not self.model.committed | self.model.unsure)
    @rule(rank=st.integers(0, RANKS - 1))
    def restart(self, rank: int) -> None:
        """A rank knows nothing any more, of what is being staged either."""
        self.engine.ranks[rank] = Rank()

    @rule(data=st.data(), whole=st.booleans(), calls=st.integers(0, 4))
    def make_room(self, data: st.DataObject, whole: bool, calls: int) -> None:
        """Others need its slot, or its place in host memory too, on all ranks."""
        current = [revision.lora_int_id for revision in self.revisions.values()]
        moving = [rank.mover.moving for rank in self.engine.ranks if rank.mover.moving is not None]
        number = data.draw(st.sampled_from(sorted([*moving * 3, *current * 3, *self.known])))
        for rank in self.engine.ranks:
            (rank.remove_lora if whole else rank.take_slot)(number)
        self.model.lost(number, *(ABOVE if whole else (RESIDENT,)))
        self.work(calls)

    @rule(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=3))
    def step(self, tokens: list[int]) -> None:
        """Every rank runs a step of the same tokens."""
        ran = [rank.step(tokens) for rank in self.engine.ranks]
        if not any(rung is MERGED for _, rung in self.model.unsure) and self.ladder.moving is None:
            assert len(set(ran)) == 1

    @precondition(lambda self: not self.tasks and self.revisions)
    @rule(data=st.data(), rung=st.sampled_from(ABOVE))
    def try_again(self, data: st.DataObject, rung: Residence) -> None:
        """Whatever went before, a move in peace succeeds, or is refused for what is merged."""
        name = data.draw(st.sampled_from(sorted(self.revisions)))
        number = self.revisions[name].lora_int_id
        refused = ""
        try:
            self._run(self._move(name, rung))
        except MoveRefusedError as error:
            refused = str(error)
        assert not self.model.left
        merged = {other for other, where in self.model.committed if where is MERGED}
        if refused:
            assert "un-merge it first" in refused
            assert merged == {number} if rung is RESIDENT else merged and number not in merged
        else:
            assert {rank.seen(number) for rank in self.engine.ranks} == {rung}

    # What always holds.

    @invariant()
    def no_move_ended_otherwise_than_it_said(self) -> None:
        if self.wrong is not None:
            raise self.wrong

    @invariant()
    def one_move_at_most_is_in_progress(self) -> None:
        assert len({rank.mover.moving for rank in self.engine.ranks} - {None}) <= 1

    @invariant()
    def every_weight_is_the_original_or_the_whole_merged_one(self) -> None:
        for rank in self.engine.ranks:
            merger = rank.mover.merger
            assert merger.broken is None
            for layer in rank.layers:
                expected = layer.smoa_bank.original.clone()
                if merger.active:
                    expected[:2, :2] += (1 - LOST) * Bank.delta(merger.lora_id or 0)
                assert torch.equal(layer.smoa_weight.served, expected)

    @invariant()
    def nothing_committed_is_half_done_and_nothing_is_held_for_nobody(self) -> None:
        for rank in self.engine.ranks:
            mover, banks = rank.mover, [layer.smoa_bank for layer in rank.layers]
            if mover.merger.merged:
                assert {bank.merged for bank in banks} == {mover.merger.lora_id}
            elif mover.state is State.IDLE or mover.merger.lora_id is None:
                assert ({bank.merged for bank in banks}, mover.merger.nbytes) == ({None}, 0)
            for slot in range(SLOTS):
                held = {bank.resident_bytes(slot) > 0 for bank in banks}
                if rank.lora_index_to_id[slot] in mover.residents:
                    assert held == {True}
                elif rank.lora_index_to_id[slot] != mover.moving:
                    assert held == {False}

    @invariant()
    def at_rest_all_ranks_hold_what_the_model_says_and_the_server_too(self) -> None:
        if self.tasks or self.model.left:
            return
        for rank in self.engine.ranks:
            assert rank.mover.state is State.IDLE
            found = {(number, rung) for number in self.known for rung in ABOVE if _holds(rank, number, rung)}
            assert found - self.model.unsure == self.model.committed - self.model.unsure
        said = self._run(self.ladder.statuses())
        for number in self.known:
            lowest = min((rank.seen(number) for rank in self.engine.ranks), key=lambda rung: rung.rung)
            assert on_all_workers(said, number).residence is lowest


def _holds(rank: Rank, number: int, rung: Residence) -> bool:
    if rung is MERGED:
        return rank.seen(number) is MERGED
    return number in rank.lora_index_to_id and number in rank.mover.residents


@pytest.mark.usefixtures("ranks")
def test_whatever_happens_no_move_is_left_half_done() -> None:
    # The machine's rules and invariants assert; this one raises what they find.
    run_state_machine_as_test(Moves, settings=settings(max_examples=300, stateful_step_count=40))
