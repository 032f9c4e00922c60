"""Moves adapters up and down the ladder of residence: stored, host, slot, resident, merged."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
from smoa_serve.settings import MergePolicy

logger = logging.getLogger(__name__)

# How long the workers stage between two engine steps: less than a decode step of a small model.
BUDGET_S = 0.01

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
        current: name -> the revision that it means now, None when it means none.
        release: called with a revision that a move brought back into the engine and that nobody can ask for any more.

    Attributes:
        pinned: adapters that the automatic policy leaves where they are.
        moving: the move that is under way, in words; None when none is.
    """

    def __init__(
        self, engine: Any, current: Callable[[str], Revision | None], release: Callable[[Revision], None]
    ) -> None:
        self._engine, self._current, self._release = engine, current, release
        self._lock = asyncio.Lock()
        self._merged: Revision | None = None
        # Moves that some worker could not undo; tried again before the next move.
        self._leftover: dict[int, Revision] = {}
        self.pinned: set[str] = set()
        self.moving: str | None = None

    @asynccontextmanager
    async def _under_way(self, revision: Revision, target: Residence) -> AsyncIterator[None]:
        """For the length of one move."""
        async with self._lock:
            self.moving = f"{revision.name} to {target}"
            try:
                for left in list(self._leftover.values()):
                    await self._demote(left)
                yield
            finally:
                self.moving = None

    async def merge(
        self, revision: Revision, policy: MergePolicy, max_lost: float, wanted: Callable[[], bool] = lambda: True
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
        async with (
            self._under_way(revision, Residence.MERGED),
            self._undone(revision, Residence.MERGED, unless=await self.residence(revision) is Residence.MERGED),
        ):
            await self._refuse_second(revision)
            begin, longest, reports = await self._stage(revision, Residence.MERGED, wanted)
            lost: dict[str, float] = {}
            for report in reports:
                lost |= {name: max(share, lost.get(name, 0.0)) for name, share in report.lost.items()}
            reasons = too_much_lost(lost, max_lost, "serve it resident, or allow more with max_lost")
            if reasons:
                raise MoveRefusedError(revision.name, reasons, lasting=True)
            worst = max(lost.values(), default=0.0)
            start = monotonic()
            held = await ask_workers(self._engine, Committed, policy.value)
            longest = max(longest, monotonic() - start)
            self._require_current(revision)
            self._merged = revision
            return self._moved(revision, Residence.MERGED, begin, longest, sum(one.bytes for one in held), worst)

    async def make_resident(self, revision: Revision, wanted: Callable[[], bool] = lambda: True) -> Move:
        """Keep an adapter's blocks of dW beside the weights.

        Args:
            revision: of the adapter.
            wanted: as for `merge`.

        Raises:
            MoveAbandonedError: it was not wanted any more.
            MoveFailedError: a worker failed half-way; no worker keeps anything of it.
            MoveRefusedError: it is merged, or no SMoA or HiRA adapter.
        """
        async with self._under_way(revision, Residence.RESIDENT):
            before = await self.residence(revision)
            if before is Residence.MERGED:
                raise MoveRefusedError(revision.name, ["it is merged; un-merge it first"])
            async with self._undone(revision, Residence.RESIDENT, unless=before is Residence.RESIDENT):
                begin, longest, _ = await self._stage(revision, Residence.RESIDENT, wanted)
                statuses = await self.statuses()
                self._require_current(revision)
            size = on_all_workers(statuses, revision.lora_int_id).resident_bytes
            return self._moved(revision, Residence.RESIDENT, begin, longest, size)

    async def to_slot(self, revision: Revision) -> Move:
        """Un-merge an adapter, or give its resident blocks back. An earlier revision of its name that is still merged
        is un-merged too. The workers check every weight's checksum.

        Raises:
            MoveFailedError: a worker failed half-way; asked again, it goes on.
        """
        async with self._under_way(revision, Residence.SLOT):
            begin = monotonic()
            if self._merged is not None and self._merged.name == revision.name:
                await self._demote(self._merged)
            await self._demote(revision)
            return self._moved(revision, await self.residence(revision), begin, monotonic() - begin, 0)

    async def forget(self, revision: Revision) -> None:
        """An adapter was unloaded or replaced: what it holds beyond its slot is given back."""
        async with self._under_way(revision, Residence.SLOT):
            await self._demote(revision)

    @asynccontextmanager
    async def _undone(self, revision: Revision, target: Residence, *, unless: bool) -> AsyncIterator[None]:
        """What is raised inside leaves nothing of the move on any worker, unless the adapter was there before."""
        try:
            yield
        except EngineGoneError:
            raise
        except BaseException as error:
            try:
                if not unless:
                    await self._demote(revision, target)
            except SmoaError:
                logger.exception("Undoing the move of %s failed on a worker; it is tried again", revision.name)
            if self._current(revision.name) != revision:
                self._release(revision)
            ours = isinstance(error, SmoaError) and not isinstance(error, WorkerError)
            if ours or not isinstance(error, Exception):
                raise
            raise MoveFailedError(
                f"moving adapter {revision.name!r} failed and was undone: {error}; ask again"
            ) from error

    def _require_current(self, revision: Revision) -> None:
        if self._current(revision.name) != revision:
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
    ) -> tuple[float, float, list[StageReport]]:
        """Work between steps until all workers are ready: (when it began, longest call, their reports)."""
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
                return begin, longest, reports
            await asyncio.sleep(0)

    async def statuses(self) -> list[WorkerStatus]:
        """What all workers know.

        Raises:
            EngineGoneError: the engine ended.
        """
        return await ask_workers(self._engine, WorkerStatus)

    async def _demote(self, revision: Revision, target: Residence | None = None) -> None:
        """Back to the slot on every worker, from one step of the ladder or (None) from any.

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

    async def residence(self, revision: Revision) -> Residence:
        """Where an adapter resides now."""
        return on_all_workers(await self.statuses(), revision.lora_int_id).residence

    def _moved(
        self, revision: Revision, where: Residence, begin: float, longest_s: float, size: int, lost: float | None = None
    ) -> Move:
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
