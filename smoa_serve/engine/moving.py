"""vLLM's adapter manager with a longer ladder: adapters that are resident, and one that is merged."""

from collections.abc import Iterator
from functools import cached_property

from smoa_serve.engine.freeing import FreeingManager, SmoaModel
from smoa_serve.engine.layers import SmoaLinearMixin
from smoa_serve.engine.merging import Merger, WeightChecksumError
from smoa_serve.errors import AdapterError
from smoa_serve.merge_policy import MergePolicy


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
        self._broken: str | None = None
        self._block_bytes: tuple[object, dict[int, int]] = (None, {})

    @cached_property
    def merger(self) -> Merger:
        """The merged state; first asked for when every layer is registered."""
        return Merger({name: layer for name, layer in self.modules.items() if isinstance(layer, SmoaLinearMixin)})

    def begin_merge(self, lora_id: int) -> None:
        """Start, or go on, to fold an adapter into the base weights.

        Raises:
            AdapterError: it cannot be merged; every reason.
        """
        if self.captured:
            reason = "the differences for other requests are in no captured CUDA graph; start with --enforce-eager"
            raise AdapterError(f"adapter {lora_id}", reason)
        self.merger.begin(lora_id, self._slot_of(lora_id))

    def commit_merge(self, policy: MergePolicy) -> None:
        """From the next step on, the staged adapter is merged."""
        self.merger.commit(policy)
        self._content_version += 1

    def end_merge(self) -> None:
        """Serve the original weights again. A weight that is not the original ends the engine with the next step."""
        try:
            self.merger.end()
        except WeightChecksumError as error:
            self._broken = str(error)
            raise
        finally:
            self._content_version += 1

    def make_resident(self, lora_id: int) -> Iterator[None]:
        """Form an adapter's blocks of dW, a layer at a time. Losing its slot takes them away again; when that happens
        meanwhile, the work begins anew in another slot.

        Raises:
            AdapterError: it cannot be resident here.
        """
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

    def drop_resident(self, lora_id: int) -> None:
        """Give an adapter's blocks of dW back."""
        self._resident.discard(lora_id)
        if lora_id in self.lora_index_to_id:
            for layer in self.merger.layers.values():
                layer.smoa_bank.drop_resident(self.lora_index_to_id.index(lora_id))
        self._content_version += 1

    def _slot_of(self, lora_id: int) -> int:
        """The slot of a SMoA or HiRA adapter, which is brought into one if it is in none.

        Raises:
            AdapterError: there is no such adapter here.
        """
        if self.smoa_refusal is not None:
            raise AdapterError(f"adapter {lora_id}", self.smoa_refusal)
        model = self._registered_adapters.cache.get(lora_id)
        if not isinstance(model, SmoaModel):
            reason = "it is not in the engine" if model is None else "only SMoA and HiRA adapters can be moved"
            raise AdapterError(f"adapter {lora_id}", reason)
        self.activate_adapter(lora_id)
        return int(self.lora_index_to_id.index(lora_id))

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self._resident:
            self.drop_resident(lora_id)
        super()._deactivate_adapter(lora_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter. Under its number other content may come: what is merged of it ends."""
        if self.merger.lora_id == adapter_id:
            self.end_merge()
        removed: bool = super().remove_adapter(adapter_id)
        return removed

    def remove_all_adapters(self) -> None:
        """Forget every adapter, slots included."""
        if self.merger.lora_id is not None:
            self.end_merge()
        self._resident.clear()
        super().remove_all_adapters()
        self._content_version += 1

    def residence(self) -> dict[int, str]:
        """lora_int_id -> "merged", "resident", "slot" or "host"."""
        found = {lora_id: "slot" if lora_id in self._active_adapters else "host" for lora_id in self.list_adapters()}
        found |= dict.fromkeys(self._resident, "resident")
        return found | ({self.merger.lora_id: "merged"} if self.merger.merged and self.merger.lora_id else {})

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
