"""Moves adapters up and down the ladder of residence: stored, host, slot, resident, merged."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from prometheus_client import Gauge

from smoa_serve.errors import MoveAbandonedError, MoveRefusedError
from smoa_serve.http.engine_calls import answered, ask_workers
from smoa_serve.http.revisions import Revision
from smoa_serve.merge_loss import too_much_lost
from smoa_serve.merge_policy import MergePolicy

logger = logging.getLogger(__name__)

STEPS = ("stored", "host", "slot", "resident", "merged")
# How long the workers stage between two engine steps: less than a decode step of a small model.
BUDGET_S = 0.01

BYTES = Gauge("smoa_adapter_bytes", "Bytes that a resident or merged adapter takes, all workers", ["adapter"])
STEP = Gauge("smoa_adapter_step", "0 stored, 1 host, 2 slot, 3 resident, 4 merged", ["adapter"])
LONGEST = Gauge("smoa_move_longest_call_seconds", "Longest that one piece of the last move kept the engine")


@dataclass(frozen=True)
class Move:
    """What a move did.

    Attributes:
        step: where the adapter resides now.
        seconds: from the first piece of work to the last.
        longest_call_ms: longest that one piece kept the engine from its next step, the way to it included.
        bytes: held for it now, all workers.
        lost: share of the update that rounding to the weights' dtype removed, worst layer; None unless merged.
    """

    step: str
    seconds: float
    longest_call_ms: float
    bytes: int
    lost: float | None = None


class Ladder:
    """The moves of one server; one at a time.

    Args:
        engine: vLLM's client.

    Attributes:
        pinned: adapters that the automatic policy leaves where they are.
        moving: the move that is under way, in words; None when none is.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()
        self.pinned: set[str] = set()
        self.moving: str | None = None

    @asynccontextmanager
    async def _under_way(self, revision: Revision, step: str) -> AsyncIterator[None]:
        """For the length of one move."""
        async with self._lock:
            self.moving = f"{revision.name} to {step}"
            try:
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
            MoveRefusedError: it cannot be merged, or rounding would remove too much; the numbers.
        """
        async with self._under_way(revision, "merged"):
            begin, longest, reports = await self._stage(revision, "merged", wanted)
            lost: dict[str, float] = {}
            for report in reports:
                lost |= {name: max(share, lost.get(name, 0.0)) for name, share in report["lost"].items()}
            reasons = too_much_lost(lost, max_lost, "serve it resident, or allow more with max_lost")
            if reasons:
                await self._demote(revision)
                raise MoveRefusedError(revision.name, reasons)
            worst = max(lost.values(), default=0.0)
            start = monotonic()
            held = await self.call("smoa_merge", policy.value)
            longest = max(longest, monotonic() - start)
            return self._moved(revision, "merged", begin, longest, sum(one["bytes"] for one in held), worst)

    async def make_resident(self, revision: Revision, wanted: Callable[[], bool] = lambda: True) -> Move:
        """Keep an adapter's blocks of dW beside the weights.

        Args:
            revision: of the adapter.
            wanted: as for `merge`.

        Raises:
            MoveAbandonedError: it was not wanted any more.
            MoveRefusedError: it is merged, or no SMoA or HiRA adapter.
        """
        async with self._under_way(revision, "resident"):
            if await self.step(revision) == "merged":
                raise MoveRefusedError(revision.name, ["it is merged; un-merge it first"])
            begin, longest, _ = await self._stage(revision, "resident", wanted)
            status = await self.call("smoa_status")
            size = sum(one["resident_bytes"].get(str(revision.lora_int_id), 0) for one in status)
            return self._moved(revision, "resident", begin, longest, size)

    async def to_slot(self, revision: Revision) -> Move:
        """Un-merge an adapter, or give its resident blocks back. The workers check every weight's checksum."""
        async with self._under_way(revision, "slot"):
            begin = monotonic()
            await self._demote(revision)
            return self._moved(revision, await self.step(revision), begin, monotonic() - begin, 0)

    async def _stage(
        self, revision: Revision, target: str, wanted: Callable[[], bool]
    ) -> tuple[float, float, list[dict[str, Any]]]:
        """Work between steps until all workers are ready: (when it began, longest call, their reports)."""
        # Back from eviction, if it was evicted.
        await answered(self._engine, self._engine.add_lora(revision.request()), "add_lora")
        begin, longest = monotonic(), 0.0
        while True:
            start = monotonic()
            reports = await self.call("smoa_stage", revision.lora_int_id, target, BUDGET_S)
            longest = max(longest, monotonic() - start)
            reasons = sorted({reason for report in reports for reason in report["refused"]})
            if reasons:
                raise MoveRefusedError(revision.name, reasons)
            if not wanted():
                await self._demote(revision)
                raise MoveAbandonedError(f"adapter {revision.name} was pinned while it moved; it is in its slot")
            if all(report["ready"] for report in reports):
                return begin, longest, reports
            await asyncio.sleep(0)

    async def call(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        """Ask all workers.

        Raises:
            EngineGoneError: the engine ended.
        """
        return await ask_workers(self._engine, method, *arguments)

    async def _demote(self, revision: Revision) -> None:
        await self.call("smoa_demote", revision.lora_int_id)

    async def step(self, revision: Revision) -> str:
        """Where an adapter resides now."""
        return step_of(await self.call("smoa_status"), revision.lora_int_id)

    def _moved(
        self, revision: Revision, step: str, begin: float, longest_s: float, size: int, lost: float | None = None
    ) -> Move:
        move = Move(step, monotonic() - begin, longest_s * 1e3, size, lost)
        BYTES.labels(revision.name).set(size)
        STEP.labels(revision.name).set(STEPS.index(step))
        LONGEST.set(longest_s)
        logger.info(
            "Adapter %s is %s now: %.1f s, %.1f ms at a time, %d bytes", revision.name, step, move.seconds,
            move.longest_call_ms, size,
        )  # fmt: skip
        return move


def forget_metrics(name: str) -> None:
    """Take away what is shown of an adapter that has left."""
    BYTES.remove(name)
    STEP.remove(name)


def step_of(statuses: list[dict[str, Any]], lora_int_id: int) -> str:
    """Where an adapter resides: the lowest step of all workers."""
    found: list[str] = [status.get("residence", {}).get(str(lora_int_id), "stored") for status in statuses]
    return min(found, key=STEPS.index)
