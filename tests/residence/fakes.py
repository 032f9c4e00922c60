"""An engine of two ranks with the real mover, merger, exchange and worker methods on each. Layers are a few numbers; a
rank may refuse, fail, forget or raise at any call."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from smoa_kernels import DEFAULT_COST, MergedBlock
from torch import Tensor

from smoa_serve.engine import rpc
from smoa_serve.engine.messages import AdapterStatus, Residence, WorkerStatus
from smoa_serve.engine.mover import Mover, State
from smoa_serve.errors import AdapterBusyError, AdapterError
from smoa_serve.residence.ladder import BUDGET_S

RANKS, LAYERS, SLOTS = 2, 2, 2
SIZE = 4
LOST = 0.01  # share of an update that goes missing in a merged weight
# Calls of `smoa_stage` until a move is ready, when each does one piece: for each layer a merge takes a checksum, the
# first time, then it opens, puts one block, packs and holds.
PIECES = {"merged": LAYERS * 5 + 1, "resident": LAYERS + 1}
# What a rank may do instead of what it is asked. "fail": while an adapter is brought into a slot; "fail in a layer": at
# the first change of a bank, which not every piece makes.
FAULTS = ("refuse", "fail", "fail in a layer", "forget", "raise", "raise after")
BANK_CHANGES = {"merged": 2 * LAYERS, "resident": LAYERS}


def ticking() -> Callable[[], float]:
    """A clock by which each call of `smoa_stage` does one piece."""
    ticks = itertools.count(step=BUDGET_S / 1.5)
    return lambda: next(ticks)


@dataclass(frozen=True)
class Entry:
    """What a slot holds of one adapter."""

    lora_id: int
    resident: Tensor | None = None
    rank: int = 1
    idle: bool = False
    partition: None = None


class Bank:
    """As `LayerBank`: slots, blocks of dW, blocks for the merged adapter. `reach` may raise at every change."""

    cost, slices = DEFAULT_COST, (SIZE,)

    def __init__(self, weight: Tensor, reach: Callable[[], None]) -> None:
        self.original, self._reach = weight.clone(), reach
        self.slots: list[tuple[Entry | None]] = [(None,) for _ in range(SLOTS)]
        self.merged: int | None = None

    @staticmethod
    def delta(lora_id: int) -> Tensor:
        return torch.full((2, 2), float(lora_id))

    def whole_partition(self, _: int) -> object:
        return object()

    def lacks_resident(self, slot: int) -> bool:
        (entry,) = self.slots[slot]
        return entry is not None and entry.resident is None

    def make_resident(self, slot: int) -> None:
        (entry,) = self.slots[slot]
        assert entry is not None
        self._reach()
        self.slots[slot] = (replace(entry, resident=self.delta(entry.lora_id)),)

    def drop_resident(self, slot: int) -> None:
        self._reach()
        (entry,) = self.slots[slot]
        self.slots[slot] = (entry and replace(entry, resident=None),)

    def resident_bytes(self, slot: int) -> int:
        (entry,) = self.slots[slot]
        return 0 if entry is None or entry.resident is None else entry.resident.nbytes

    def merged_blocks(self, slot: int) -> Iterator[MergedBlock]:
        (entry,) = self.slots[slot]
        assert entry is not None
        self._reach()
        update, before = self.delta(entry.lora_id), self.original[:2, :2]
        yield MergedBlock(0, torch.arange(2), torch.arange(2), update, before, before + (1 - LOST) * update)

    def hold_merged(self, slot: int, back: Sequence[Sequence[Tensor]]) -> None:
        self._reach()
        assert self.merged is None
        (entry,) = self.slots[slot]
        assert entry is not None
        self.merged = entry.lora_id

    def drop_merged(self) -> None:
        self._reach()
        self.merged = None

    @property
    def merged_bytes(self) -> int:
        return 0 if self.merged is None else 8


class Weight:
    """As `ServedWeight`, of a weight that lies in the open."""

    def __init__(self, weight: Tensor) -> None:
        self.served = weight
        self.original: Callable[[], AbstractContextManager[None]] = nullcontext

    def merge_refusal(self) -> None:
        return None

    def plain(self) -> Tensor:
        return self.served

    def close(self) -> None:
        pass

    def reset_original(self) -> None:
        self.original = nullcontext


class Rank:
    """A worker, and its manager: who is here, who has a slot, and the mover.

    Attributes:
        refuses: no adapter can be moved here.
        fails_at: how many uses of a slot or changes of a bank go well before one raises; None for all.
    """

    lora_config = object()

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self.refuses = False
        self.fails_at: int | None = None
        weights = [torch.arange(SIZE * SIZE, dtype=torch.float32).view(SIZE, SIZE) + index for index in range(LAYERS)]
        layers = {
            f"layer-{index}": SimpleNamespace(
                base_layer=SimpleNamespace(), smoa_weight=Weight(weight), smoa_bank=Bank(weight, self._reach)
            )
            for index, weight in enumerate(weights)
        }
        self.layers: list[Any] = list(layers.values())
        mover: Any = Mover
        self.mover: Mover = mover(layers, self, None)
        self._adapter_manager = self
        self.model_runner = SimpleNamespace(lora_manager=self)

    def _reach(self) -> None:
        if self.fails_at is not None:
            self.fails_at -= 1
            if self.fails_at < 0:
                self.fails_at = None
                raise torch.OutOfMemoryError("no room")

    def slot_of(self, lora_id: int) -> int:
        self._reach()
        if self.refuses:
            raise AdapterError(f"adapter {lora_id}", "its weight is packed")
        if lora_id not in self.registered:
            raise AdapterBusyError(f"adapter {lora_id}", "it is not in the engine")
        if lora_id not in self.lora_index_to_id:
            if None not in self.lora_index_to_id:
                self.take_slot(self.lora_index_to_id[0] or 0)
            slot = self.lora_index_to_id.index(None)
            self.lora_index_to_id[slot] = lora_id
            for layer in self.layers:
                layer.smoa_bank.slots[slot] = (Entry(lora_id),)
        return self.lora_index_to_id.index(lora_id)

    def take_slot(self, lora_id: int) -> None:
        """Others need it."""
        if lora_id in self.lora_index_to_id:
            self.mover.lose_slot(lora_id)
            slot = self.lora_index_to_id.index(lora_id)
            self.lora_index_to_id[slot] = None
            for layer in self.layers:
                layer.smoa_bank.slots[slot] = (None,)

    def add_lora(self, lora_id: int) -> None:
        self.registered.add(lora_id)

    def remove_lora(self, lora_id: int) -> None:
        self.mover.forget(lora_id)
        self.take_slot(lora_id)
        self.registered.discard(lora_id)

    def status(self) -> WorkerStatus:
        held = self.mover.held_bytes()
        where = {
            lora_id: Residence.SLOT if lora_id in self.lora_index_to_id else Residence.HOST
            for lora_id in self.registered
        } | self.mover.committed
        adapters = {number: AdapterStatus(rung, held.get(number, 0)) for number, rung in where.items()}
        return WorkerStatus("1", lora=True, adapters=adapters)

    @property
    def held(self) -> tuple[Any, ...]:
        """What moves hold here, counted where it lies."""
        banks = [layer.smoa_bank for layer in self.layers]
        blocks = sum(bank.resident_bytes(slot) for bank in banks for slot in range(SLOTS))
        return self.mover.state, self.mover.moving, blocks, self.mover.merger.nbytes, [bank.merged for bank in banks]

    def seen(self, lora_id: int) -> Residence:
        """Where an adapter resides, by what lies in the layers while nothing is in progress."""
        assert self.mover.state is State.IDLE
        banks = [layer.smoa_bank for layer in self.layers]
        if all(bank.merged == lora_id for bank in banks):
            return Residence.MERGED
        if lora_id not in self.lora_index_to_id:
            return Residence.HOST if lora_id in self.registered else Residence.STORED
        slot = self.lora_index_to_id.index(lora_id)
        return Residence.SLOT if any(bank.lacks_resident(slot) for bank in banks) else Residence.RESIDENT

    def step(self, token_lora_ids: Sequence[int]) -> bool:
        """An engine step; whether it ran on merged weights."""
        slots = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        return self.mover.merger.for_step(token_lora_ids, slots)

    def answer(self, kind: str | None, method: str, arguments: tuple[Any, ...]) -> Any:
        """What a call comes to: a fault of `FAULTS`, or None for what is asked."""

        def called() -> Any:
            if method.startswith("smoa_"):
                return getattr(rpc, method)(self, *arguments)
            return getattr(self, method)(*arguments)

        if kind == "raise after":
            called()
        if kind in ("raise", "raise after"):
            failed = f"{method} failed on a rank"
            # As `engine/rpc.py` and as vLLM's own calls do.
            return {"raised": failed} if method.startswith("smoa_") else RuntimeError(failed)
        if method == "smoa_stage":
            if kind == "forget":
                self.remove_lora(arguments[0])
            self.refuses, self.fails_at = kind == "refuse", {"fail": 0, "fail in a layer": 1}.get(kind or "")
        try:
            return called()
        finally:
            self.refuses, self.fails_at = False, None


class Engine:
    """vLLM's client.

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
        await self._all("add_lora", request)

    async def remove_lora(self, number: int) -> None:
        await self._all("remove_lora", number)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return await self._all(method, *args)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self.serve(method, arguments, *self._fault())

    def _fault(self) -> tuple[int | None, str | None]:
        fault, place = self.fault, len(self.calls)
        return (fault[0], fault[2]) if fault is not None and fault[1] == place else (None, None)

    def serve(self, method: str, arguments: tuple[Any, ...], faulty: int | None, kind: str | None) -> list[Any]:
        """Every rank does its part, then the first error of one is raised: as vLLM's executor."""
        self.calls.append(method)
        answers = [
            rank.answer(kind if index == faulty else None, method, arguments) for index, rank in enumerate(self.ranks)
        ]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers
