"""Moves adapters up and down the ladder of residence: stored, host, slot, resident, merged."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from prometheus_client import Gauge

from smoa_serve.adapters.rounding import too_much_lost
from smoa_serve.engine.messages import Committed, Residence, StageReport, Undone, WorkerStatus, on_all_workers
from smoa_serve.errors import (
    EngineGoneError,
    MoveAbandonedError,
    MoveFailedError,
    MoveRefusedError,
    SmoaError,
    WorkerError,
)
from smoa_serve.registry.revisions import Revision
from smoa_serve.residence.engine_client import ask_workers, bring_in
from smoa_serve.settings import OthersGet

logger = logging.getLogger(__name__)

# How long the workers stage between two engine steps: less than a decode step of a small model.
BUDGET_S = 0.01
WAIT_S = 0.2  # idle workers answer within milliseconds; probes give a server a second

BYTES = Gauge("smoa_adapter_bytes", "Bytes that a resident or merged adapter takes, all workers", ["adapter"])
STEP = Gauge("smoa_adapter_step", "0 stored, 1 host, 2 slot, 3 resident, 4 merged", ["adapter"])
LONGEST = Gauge("smoa_move_longest_call_seconds", "Longest that one piece of the last move kept the engine")


@dataclass(frozen=True)
class Move:
    """What a move did.

    Attributes:
        residence: where the adapter resides now.
        seconds: from the first piece of work to the last.
        longest_call_ms: longest that one piece kept the engine from its next step, the way to it included.
        bytes: held for it now, all workers.
        lost: share of the update that rounding to the weights' dtype removed, worst layer; None unless merged.
    """

    residence: Residence
    seconds: float
    longest_call_ms: float
    bytes: int
    lost: float | None = None


class Ladder:
    """The moves of one server; one at a time. A move that fails is undone on every worker.

    Args:
        engine: vLLM's client.
        revisions: name -> the revision that it means now; kept by others.
        release: called with a revision that a move brought back into the engine and that nobody can ask for any more.

    Attributes:
        pinned: adapters that the automatic policy leaves where they are.
        moving: the move that is under way, in words; None when none is.
    """

    def __init__(self, engine: Any, revisions: Mapping[str, Revision], release: Callable[[Revision], None]) -> None:
        self._engine, self._revisions, self._release = engine, revisions, release
        self._lock = asyncio.Lock()
        self._merged: Revision | None = None
        # Moves that some worker could not undo; tried again before the next move.
        self._leftover: dict[int, Revision] = {}
        self._known: dict[int, Residence] = {}
        self._asking: asyncio.Task[None] | None = None
        self.pinned: set[str] = set()
        self.moving: str | None = None

    async def statuses(self) -> list[WorkerStatus]:
        """What all workers know.

        Raises:
            EngineGoneError: the engine ended.
        """
        return await ask_workers(self._engine, WorkerStatus)

    async def residence(self, revision: Revision) -> Residence:
        """Where an adapter resides now."""
        return on_all_workers(await self.statuses(), revision.lora_int_id).residence

    async def known(self) -> Mapping[int, Residence]:
        """lora_int_id -> where it resides now, or did when the workers answered last: told at once however long their
        step takes.

        An adapter is missing until they were asked after it was loaded. One question is under way at most.
        """
        if self._revisions and not self._engine.errored:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.wait({self._asking}, timeout=WAIT_S)
        return self._known

    async def _ask(self) -> None:
        numbers = [revision.lora_int_id for revision in self._revisions.values()]
        with suppress(EngineGoneError, WorkerError):  # which are told elsewhere
            statuses = await self.statuses()
            self._known = {number: on_all_workers(statuses, number).residence for number in numbers}

    async def merge(
        self, revision: Revision, policy: OthersGet, max_lost: float, wanted: Callable[[], bool] = lambda: True
    ) -> Move:
        """Fold an adapter into the base weights of all workers, between two steps.

        Args:
            revision: of the adapter.
            policy: for other requests.
            max_lost: largest share of a layer's update that rounding may remove.
            wanted: asked while it is staged; once it is not, the adapter goes back to its slot.

        Raises:
            MoveAbandonedError: it was not wanted any more.
            MoveFailedError: a worker failed half-way; no worker keeps anything of it.
            MoveRefusedError: it cannot be merged, or rounding would remove too much; the numbers.
        """
        return await self._climb(revision, Residence.MERGED, wanted, policy, max_lost)

    async def make_resident(self, revision: Revision, wanted: Callable[[], bool] = lambda: True) -> Move:
        """Keep an adapter's blocks of dW beside the weights. Arguments and errors are those of `merge`."""
        return await self._climb(revision, Residence.RESIDENT, wanted)

    async def _climb(
        self,
        revision: Revision,
        target: Residence,
        wanted: Callable[[], bool],
        policy: OthersGet = OthersGet.COMPENSATE,
        max_lost: float = 1.0,
    ) -> Move:
        """Stage on all workers until all are ready, then commit on all; or undo on all."""
        async with self._under_way(revision, target):
            before = await self.residence(revision)
            if before.rung > target.rung:
                raise MoveRefusedError(revision.name, ["it is merged; un-merge it first"])
            async with self._or_undone(revision, target, before):
                if target is Residence.MERGED:
                    await self._refuse_second(revision)
                begin, longest, lost = await self._stage(revision, target, wanted)
                reasons = too_much_lost(lost, max_lost, "serve it resident, or allow more with max_lost")
                if reasons:
                    raise MoveRefusedError(revision.name, reasons, lasting=True)
                start = monotonic()
                held = await ask_workers(self._engine, Committed, revision.lora_int_id, target.value, policy.value)
                longest = max(longest, monotonic() - start)
                self._require_current(revision)
            if target is Residence.MERGED:
                self._merged = revision
            worst = max(lost.values(), default=0.0) if target is Residence.MERGED else None
            return self._moved(revision, target, begin, longest, sum(one.bytes for one in held), worst)

    async def to_slot(self, revision: Revision) -> Move:
        """Un-merge an adapter, or give its resident blocks back. An earlier revision of its name that is still merged
        is un-merged too. The workers check every weight's checksum.

        Raises:
            MoveFailedError: a worker failed half-way; asked again, it goes on.
        """
        async with self._under_way(revision, Residence.SLOT):
            begin = monotonic()
            if self._merged is not None and self._merged.name == revision.name:
                await self._undo(self._merged)
            await self._undo(revision)
            return self._moved(revision, await self.residence(revision), begin, monotonic() - begin, 0)

    async def forget(self, revision: Revision) -> None:
        """An adapter was unloaded or replaced: what it holds beyond its slot is given back."""
        async with self._under_way(revision, Residence.SLOT):
            await self._undo(revision)
        self._known.pop(revision.lora_int_id, None)

    @asynccontextmanager
    async def _under_way(self, revision: Revision, target: Residence) -> AsyncIterator[None]:
        """For the length of one move."""
        async with self._lock:
            self.moving = f"{revision.name} to {target}"
            try:
                for left in list(self._leftover.values()):
                    await self._undo(left)
                yield
            finally:
                self.moving = None

    @asynccontextmanager
    async def _or_undone(self, revision: Revision, target: Residence, before: Residence) -> AsyncIterator[None]:
        """What is raised inside leaves nothing of the move on any worker. An adapter that was there before, and still
        is on all workers, stays."""
        try:
            yield
        except EngineGoneError:
            raise
        except BaseException as error:
            try:
                if before is not target or await self.residence(revision) is not target:
                    await self._undo(revision, target)
            except SmoaError:
                self._leftover[revision.lora_int_id] = revision
                logger.exception("Undoing the move of %s failed on a worker; it is tried again", revision.name)
            if self._revisions.get(revision.name) != revision:
                self._release(revision)
            ours = isinstance(error, SmoaError) and not isinstance(error, WorkerError)
            if ours or not isinstance(error, Exception):
                raise
            raise MoveFailedError(
                f"moving adapter {revision.name!r} failed and was undone: {error}; ask again"
            ) from error

    def _require_current(self, revision: Revision) -> None:
        if self._revisions.get(revision.name) != revision:
            raise MoveRefusedError(revision.name, ["it was unloaded or replaced while it waited to be moved"])

    async def _refuse_second(self, revision: Revision) -> None:
        """With the name of the merged adapter, which a worker does not know."""
        merged = self._merged
        if merged is None or merged.lora_int_id == revision.lora_int_id:
            return
        if await self.residence(merged) is Residence.MERGED:
            raise MoveRefusedError(revision.name, [f"another adapter is merged: {merged.name}; un-merge it first"])
        self._merged = None

    async def _stage(
        self, revision: Revision, target: Residence, wanted: Callable[[], bool]
    ) -> tuple[float, float, dict[str, float]]:
        """Work between steps until all workers are ready.

        Returns:
            When it began, the longest call, and layer -> share of the update that rounding removes.
        """
        self._require_current(revision)
        # Back from eviction, if it was evicted.
        await bring_in(self._engine, revision.request())
        begin, longest = monotonic(), 0.0
        while True:
            start = monotonic()
            reports = await ask_workers(self._engine, StageReport, revision.lora_int_id, target.value, BUDGET_S)
            longest = max(longest, monotonic() - start)
            failed = sorted({report.failed for report in reports if report.failed})
            if failed:
                raise WorkerError("; ".join(failed))
            reasons = sorted({reason for report in reports for reason in report.refused})
            if reasons:
                raise MoveRefusedError(revision.name, reasons, lasting=any(report.lasting for report in reports))
            self._require_current(revision)
            if not wanted():
                raise MoveAbandonedError(f"adapter {revision.name} was pinned while it moved; it is in its slot")
            if all(report.ready for report in reports):
                shares = sorted(share for report in reports for share in report.lost.items())
                return begin, longest, dict(shares)  # of each layer, the worst is last
            await asyncio.sleep(0)

    async def _undo(self, revision: Revision, target: Residence | None = None) -> None:
        """Back to the slot on every worker, from one rung or (None) from any.

        Raises:
            EngineGoneError: the engine ended.
            MoveFailedError: a worker could not; it is tried again before the next move.
        """
        self._leftover[revision.lora_int_id] = revision
        try:
            await ask_workers(self._engine, Undone, revision.lora_int_id, target and target.value)
        except EngineGoneError:
            raise
        except Exception as error:
            raise MoveFailedError(
                f"adapter {revision.name!r} could not be brought back to its slot: {error}; ask again"
            ) from error
        del self._leftover[revision.lora_int_id]
        if self._merged is not None and self._merged.lora_int_id == revision.lora_int_id:
            self._merged = None

    def _moved(
        self, revision: Revision, where: Residence, begin: float, longest_s: float, size: int, lost: float | None = None
    ) -> Move:
        self._known[revision.lora_int_id] = where
        move = Move(where, monotonic() - begin, longest_s * 1e3, size, lost)
        BYTES.labels(revision.name).set(size)
        STEP.labels(revision.name).set(where.rung)
        LONGEST.set(longest_s)
        logger.info(
            "Adapter %s is %s now: %.1f s, %.1f ms at a time, %d bytes", revision.name, where, move.seconds,
            move.longest_call_ms, size,
        )  # fmt: skip
        return move


def forget_metrics(name: str) -> None:
    """Take away what is shown of an adapter that has left."""
    BYTES.remove(name)
    STEP.remove(name)
