"""vLLM's adapter manager with a longer ladder: adapters that are resident, and one that is merged."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from typing import Any

from smoa_serve.engine.freeing import FreeingManager, SmoaModel
from smoa_serve.engine.linear import SmoaLinearMixin
from smoa_serve.engine.merging import Merger
from smoa_serve.engine.messages import Residence
from smoa_serve.errors import AdapterBusyError, AdapterError
from smoa_serve.settings import MergePolicy


@dataclass
class _Forming:
    """An adapter on its way to being resident.

    Attributes:
        lora_id: vLLM's number of it.
        work: what is left to do; finished: layers done.
    """

    lora_id: int
    work: Iterator[None]
    finished: int = 0


class MovingManager(FreeingManager):
    """The moves of one worker.

    Attributes:
        smoa_refusal: why this engine serves no SMoA adapters at all; None when it does.
        captured: CUDA graphs are captured.
    """

    smoa_refusal: str | None
    captured: bool

    def begin_moving(self) -> None:
        """What `__init__` would do, before any layer is registered."""
        self._content_version = 0
        self._resident: set[int] = set()
        self._forming: _Forming | None = None
        self._block_bytes: tuple[object, dict[int, int]] = (None, {})

    @cached_property
    def merger(self) -> Merger:
        """The merged state; first asked for when every layer is registered."""
        return Merger({name: layer for name, layer in self.modules.items() if isinstance(layer, SmoaLinearMixin)})

    def _deactivate_adapter(self, lora_id: int) -> None:
        self._resident.discard(lora_id)
        self._content_version += 1
        super()._deactivate_adapter(lora_id)

    def stage_merge(self, lora_id: int, budget_s: float) -> dict[str, Any]:
        """Work for about so long towards an adapter being merged. What fails is undone here.

        Returns:
            See `Merger.work`.

        Raises:
            AdapterBusyError: another adapter is merged, or this one is not here now.
            AdapterError: it cannot be merged; every reason.
        """
        if self.captured:
            reason = "the differences for other requests are in no captured CUDA graph; start with --enforce-eager"
            raise AdapterError(f"adapter {lora_id}", reason)
        self.merger.begin(lora_id, self._slot_of(lora_id))
        return self.merger.work(budget_s)

    def commit_merge(self, policy: MergePolicy) -> None:
        """From the next step on, the staged adapter is merged."""
        self.merger.commit(policy)
        self._content_version += 1

    def end_merge(self) -> None:
        """Serve the original weights again. A weight that is not the original ends the engine with the next step."""
        try:
            self.merger.end()
        finally:
            self._content_version += 1

    def stage_resident(self, lora_id: int, budget_s: float) -> dict[str, Any]:
        """Work for about so long towards an adapter being resident. What fails is undone here.

        Returns:
            ready, finished and layers.

        Raises:
            AdapterBusyError: it is not here now.
            AdapterError: it cannot be resident here.
        """
        forming = self._forming
        if forming is None or forming.lora_id != lora_id:
            self._give_up_forming()
            forming = self._forming = _Forming(lora_id, self._form(lora_id))
        deadline, ready = monotonic() + budget_s, False
        try:
            while not ready and monotonic() < deadline:
                ready = next(forming.work, "end") == "end"
                forming.finished += not ready
        except BaseException:
            self._give_up_forming()
            raise
        if ready:
            self._forming = None
        return {"ready": ready, "finished": forming.finished, "layers": len(self.merger.layers)}

    def _give_up_forming(self) -> None:
        forming, self._forming = self._forming, None
        if forming is not None:
            self.drop_resident(forming.lora_id)

    def _form(self, lora_id: int) -> Iterator[None]:
        """Form an adapter's blocks of dW, a layer at a time. Losing its slot takes them away again; when that happens
        meanwhile, the work begins anew in another slot."""
        while True:
            slot = self._slot_of(lora_id)
            missing = (layer for layer in self.merger.layers.values() if layer.smoa_bank.lacks_resident(slot))
            layer = next(missing, None)
            if layer is None:
                break
            layer.smoa_bank.make_resident(slot)
            yield
        self._resident.add(lora_id)
        self._content_version += 1

    def leave_merged(self, lora_id: int) -> None:
        """Un-merge an adapter, or give up merging it; nothing if it is another one that is merged.

        Raises:
            WeightChecksumError: a weight is not what it was.
        """
        if self.merger.lora_id == lora_id or self.merger.untidy:
            self.end_merge()

    def leave_resident(self, lora_id: int) -> None:
        """Give an adapter's blocks of dW back, or give up forming them."""
        if self._forming is not None and self._forming.lora_id == lora_id:
            self._forming = None
        self.drop_resident(lora_id)

    def drop_resident(self, lora_id: int) -> None:
        """Give an adapter's blocks of dW back."""
        self._resident.discard(lora_id)
        self._content_version += 1
        if lora_id in self.lora_index_to_id:
            for layer in self.merger.layers.values():
                layer.smoa_bank.drop_resident(self.lora_index_to_id.index(lora_id))

    def _slot_of(self, lora_id: int) -> int:
        """The slot of a SMoA or HiRA adapter, which is brought into one if it is in none.

        Raises:
            AdapterError: there is no such adapter here.
        """
        if self.smoa_refusal is not None:
            raise AdapterError(f"adapter {lora_id}", self.smoa_refusal)
        model = self._registered_adapters.cache.get(lora_id)
        if not isinstance(model, SmoaModel):
            if model is None:
                raise AdapterBusyError(f"adapter {lora_id}", "it is not in the engine")
            raise AdapterError(f"adapter {lora_id}", "only SMoA and HiRA adapters can be moved")
        self.activate_adapter(lora_id)
        return int(self.lora_index_to_id.index(lora_id))

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter. Under its number other content may come: what is merged of it ends."""
        if self.merger.lora_id == adapter_id:
            self.end_merge()
        if self._forming is not None and self._forming.lora_id == adapter_id:
            self._forming = None
        removed: bool = super().remove_adapter(adapter_id)
        return removed

    def remove_all_adapters(self) -> None:
        """Forget every adapter, slots included."""
        if self.merger.lora_id is not None:
            self.end_merge()
        self._forming = None
        self._resident.clear()
        super().remove_all_adapters()
        self._content_version += 1

    def residence(self) -> dict[int, Residence]:
        """lora_int_id -> where it resides on this worker."""
        found = {
            lora_id: Residence.SLOT if lora_id in self._active_adapters else Residence.HOST
            for lora_id in self.list_adapters()
        }
        found |= dict.fromkeys(self._resident, Residence.RESIDENT)
        return found | ({self.merger.lora_id: Residence.MERGED} if self.merger.merged and self.merger.lora_id else {})

    def resident_bytes(self) -> dict[int, int]:
        """lora_int_id -> bytes of its blocks of dW, or of all that being merged takes."""
        found = {
            lora_id: sum(
                layer.smoa_bank.resident_bytes(self.lora_index_to_id.index(lora_id))
                for layer in self.merger.layers.values()
            )
            for lora_id in self._resident
        }
        return found | ({self.merger.lora_id: self.merger.nbytes} if self.merger.lora_id is not None else {})

    def block_bytes(self) -> dict[int, int]:
        """lora_int_id -> bytes of the blocks of W that an adapter in a slot uses: what blocks of its own would take."""
        state = self._content_version, tuple(self.lora_index_to_id)
        if state != self._block_bytes[0]:  # the policy asks every few seconds, and a step waits meanwhile
            self._block_bytes = state, self._count_block_bytes()
        return self._block_bytes[1]

    def _count_block_bytes(self) -> dict[int, int]:
        return {
            lora_id: sum(
                entry.partition.block_numbers * layer.smoa_bank.dtype.itemsize
                for layer in self.merger.layers.values()
                for entry in layer.smoa_bank.slots[slot]
                if entry is not None
            )
            for slot, lora_id in enumerate(self.lora_index_to_id)
            if lora_id is not None and isinstance(self._registered_adapters.cache.get(lora_id), SmoaModel)
        }
