"""Where adapters reside, as far as it is known: told at once however long the workers' step takes."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from smoa_serve.engine.messages import Residence, WorkerStatus, on_all_workers
from smoa_serve.errors import EngineGoneError, WorkerError
from smoa_serve.registry.revisions import Revision
from smoa_serve.residence.engine_client import ask_workers

WAIT_S = 0.2  # idle workers answer within milliseconds; probes give a server a second


class KnownResidence:
    """What the workers said last.

    Args:
        engine: vLLM's client.
        revisions: name -> revision, kept by others.
    """

    def __init__(self, engine: Any, revisions: Mapping[str, Revision]) -> None:
        self._engine, self._revisions = engine, revisions
        self._places: dict[int, Residence] = {}
        self._asking: asyncio.Task[None] | None = None

    async def places(self) -> Mapping[int, Residence]:
        """lora_int_id -> where it resides, as of now or of the last time that the workers answered.

        An adapter is missing until they were asked after it was loaded. One question is under way at most.
        """
        if self._revisions and not self._engine.errored:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.wait({self._asking}, timeout=WAIT_S)
        return self._places

    def note(self, lora_int_id: int, where: Residence) -> None:
        """Take over where a move brought an adapter."""
        self._places = {**self._places, lora_int_id: where}

    async def _ask(self) -> None:
        numbers = [revision.lora_int_id for revision in self._revisions.values()]
        with suppress(EngineGoneError, WorkerError):  # which are told elsewhere
            statuses = await ask_workers(self._engine, WorkerStatus)
            self._places = {number: on_all_workers(statuses, number).residence for number in numbers}
