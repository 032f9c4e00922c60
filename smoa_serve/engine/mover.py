"""What moves on one worker: one adapter at a time on its way to being resident or merged.

idle --stage--> staging --stage, the last piece--> staged --commit--> idle, the adapter a rung up. Whatever fails, is
undone, loses its slot or leaves brings back idle, and the adapter to where it was. docs/explain/residence.md draws it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from time import monotonic

from smoa_serve.engine.freeing import FreeingManager
from smoa_serve.engine.linear import SmoaLinearMixin
from smoa_serve.engine.merging import Merger, in_every_layer
from smoa_serve.engine.messages import Residence, StageReport
from smoa_serve.errors import AdapterBusyError, AdapterError
from smoa_serve.settings import OthersGet


class State(StrEnum):
    """Of a worker's moves.

    IDLE: nothing is in progress. STAGING: some layers are done. STAGED: all are, and `commit` only counts it in.
    UNTIDY: something could not be given back; that is tried again before the next merge.
    BROKEN: a weight is not the base's; the engine ends with the next step.
    """

    IDLE = "idle"
    STAGING = "staging"
    STAGED = "staged"
    UNTIDY = "untidy"
    BROKEN = "broken"


@dataclass
class _Move:
    """One in progress.

    Attributes:
        lora_id: vLLM's number of the adapter; slot: where its factors are.
        work: what is left to do, True for the last piece of a layer.
        layers: how many there are; finished: how many are done; staged: all work is.
    """

    lora_id: int
    target: Residence
    slot: int
    layers: int
    work: Iterator[bool]
    finished: int = 0
    staged: bool = False


class Mover:
    """The moves of one worker. What is committed stays until it is undone, or until the adapter leaves: the slot, for
    what is resident; the engine, for what is merged.

    Args:
        layers: module name -> layer that takes SMoA deltas.
        slots: who has them; brings adapters into them.
        merge_refusal: why nothing can be merged here, or None.

    Attributes:
        layers: as given.
        merger: the merged weights.
        residents: the adapters that are resident.
        changes: grows with whatever a step has to know of.
    """

    def __init__(
        self, layers: dict[str, SmoaLinearMixin], slots: FreeingManager, merge_refusal: str | None = None
    ) -> None:
        self.layers, self._slots, self._merge_refusal = layers, slots, merge_refusal
        self.merger = Merger(layers)
        self.residents: set[int] = set()
        self._move: _Move | None = None
        self.changes = 0

    @property
    def state(self) -> State:
        """Of what is in progress."""
        if self.merger.broken is not None:
            return State.BROKEN
        if self._move is None:
            return State.UNTIDY if self.merger.untidy else State.IDLE
        return State.STAGED if self._move.staged else State.STAGING

    @property
    def moving(self) -> int | None:
        """The adapter that is in progress."""
        return None if self._move is None else self._move.lora_id

    @property
    def committed(self) -> dict[int, Residence]:
        """lora_int_id -> where it resides, of adapters above their slots."""
        merged = {self.merger.lora_id: Residence.MERGED} if self.merger.merged and self.merger.lora_id else {}
        return dict.fromkeys(self.residents, Residence.RESIDENT) | merged

    def held_bytes(self) -> dict[int, int]:
        """lora_int_id -> bytes of its blocks of dW, or of all that a merge takes, finished or not."""
        found = {
            lora_id: sum(layer.smoa_bank.resident_bytes(slot) for layer in self.layers.values())
            for slot, lora_id in enumerate(self._slots.lora_index_to_id)
            if lora_id is not None and lora_id in self.residents
        }
        return found | ({self.merger.lora_id: self.merger.nbytes} if self.merger.lora_id is not None else {})

    def stage(self, lora_id: int, target: Residence, budget_s: float) -> StageReport:
        """Work for about so long towards an adapter being there. Another one in progress is given up.

        Raises:
            AdapterBusyError: another adapter is merged, or this one is not here now.
            AdapterError: it cannot be moved; every reason. Like whatever else is raised, this leaves nothing behind.
        """
        try:
            return self._stage(lora_id, target, budget_s)
        except BaseException:
            if self._move is not None:
                self.undo(self._move.lora_id, self._move.target)
            raise

    def _stage(self, lora_id: int, target: Residence, budget_s: float) -> StageReport:
        if target is Residence.MERGED and self._merge_refusal is not None:
            raise AdapterError(f"adapter {lora_id}", self._merge_refusal)
        slot = self._slots.slot_of(lora_id)
        if self._is_at(lora_id, target):
            return StageReport(ready=True, lost=self.merger.lost if target is Residence.MERGED else {})
        move = self._move
        if move is None or (move.lora_id, move.target) != (lora_id, target) or not (move.staged or move.slot == slot):
            move = self._begin(lora_id, target, slot)
        deadline = monotonic() + budget_s
        while not move.staged and monotonic() < deadline:
            piece = next(move.work, None)
            move.staged, move.finished = piece is None, move.finished + bool(piece)
        lost = self.merger.lost if move.staged and target is Residence.MERGED else {}
        return StageReport(ready=move.staged, finished=move.finished, layers=move.layers, lost=lost)

    def commit(self, lora_id: int, target: Residence, policy: OthersGet) -> int:
        """Count the staged adapter in from the next step on.

        Args:
            lora_id: vLLM's number of it.
            target: for which it was staged.
            policy: for other requests, of a merge.

        Returns:
            Bytes held for it.

        Raises:
            AdapterBusyError: it is not staged in every layer, or not any more.
        """
        if not self._is_at(lora_id, target):
            move = self._move
            if move is None or not move.staged or (move.lora_id, move.target) != (lora_id, target):
                raise AdapterBusyError(f"adapter {lora_id}", "the adapter is not staged yet")
            if target is Residence.MERGED:
                self.merger.commit()
            else:
                self.residents.add(lora_id)
            self._move = None
        if target is Residence.MERGED:
            self.merger.policy = policy
        self.changes += 1
        return self.held_bytes()[lora_id]

    def undo(self, lora_id: int, target: Residence | None = None) -> None:
        """Back to the slot: un-merge (bit for bit, checked) or give resident blocks back, finished or not. Nothing
        where there is nothing of it.

        Args:
            lora_id: vLLM's number of it.
            target: only what belongs to that rung; None for both.

        Raises:
            WeightChecksumError: a weight is not what it was.
            Exception: something could not be given back; to be called again.
        """
        self.changes += 1
        move = self._move
        if move is not None and move.lora_id == lora_id and target in (None, move.target):
            self._move = None
        if target is not Residence.RESIDENT and (self.merger.lora_id == lora_id or self.merger.untidy):
            self.merger.undo()
        if target is not Residence.MERGED:
            self.residents.discard(lora_id)
            if lora_id in self._slots.lora_index_to_id:
                slot = self._slots.lora_index_to_id.index(lora_id)
                in_every_layer([partial(layer.smoa_bank.drop_resident, slot) for layer in self.layers.values()])

    def lose_slot(self, lora_id: int) -> None:
        """Another adapter takes its slot, and with it the blocks of dW that are there."""
        self.changes += 1
        self.residents.discard(lora_id)
        if self._move is not None and (self._move.lora_id, self._move.target) == (lora_id, Residence.RESIDENT):
            self._move = None

    def forget(self, lora_id: int) -> None:
        """It leaves the engine. Under its number other content may come: what is merged of it ends."""
        if self.merger.lora_id == lora_id:
            self.undo(lora_id, Residence.MERGED)
        self.lose_slot(lora_id)

    def forget_all(self) -> None:
        """All leave the engine."""
        for lora_id in {*self.residents, self.moving, self.merger.lora_id}:
            if lora_id is not None:
                self.forget(lora_id)

    def _is_at(self, lora_id: int, target: Residence) -> bool:
        if target is Residence.MERGED:
            return self.merger.merged and self.merger.lora_id == lora_id
        return lora_id in self.residents

    def _begin(self, lora_id: int, target: Residence, slot: int) -> _Move:
        if self._move is not None:
            self.undo(self._move.lora_id, self._move.target)
        if target is Residence.MERGED:
            layers, work = self.merger.stage(lora_id, slot)
        else:
            layers, work = len(self.layers), self._form(slot)
        self._move = _Move(lora_id, target, slot, layers, work)
        return self._move

    def _form(self, slot: int) -> Iterator[bool]:
        for layer in self.layers.values():
            if layer.smoa_bank.lacks_resident(slot):
                layer.smoa_bank.make_resident(slot)
                yield True
