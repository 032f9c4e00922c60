"""vLLM's adapter manager, made to give back what a removed adapter held."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from smoa_serve.adapter import Adapter
from smoa_serve.engine.layers import SmoaLinearMixin
from smoa_serve.engine.traffic import Traffic


class SmoaModel(LoRAModel):
    """A SMoA or HiRA adapter in host memory, in the place where vLLM keeps a `LoRAModel`.

    Attributes:
        adapter: what was read.
    """

    adapter: Adapter


class FreeingManager(LRUCacheLoRAModelManager):
    """vLLM frees the number of a slot and leaves its content until the slot is used again. An evicted adapter's content
    may stay: it costs nothing but the slot, and what it shares is found again. A removed adapter's goes at once."""

    @cached_property
    def _contents(self) -> list[int | None]:
        """Slot -> the adapter whose content is in it, evicted or not."""
        return [None] * self.lora_slots

    @cached_property
    def traffic(self) -> Traffic:
        """What ran."""
        return Traffic()

    @property
    def _banks(self) -> Iterator[Any]:
        return (layer.smoa_bank for layer in self.modules.values() if isinstance(layer, SmoaLinearMixin))

    def activate_adapter(self, lora_id: int) -> bool:
        """Bring an adapter into a slot, unless it is in one."""
        activated: bool = False
        try:
            activated = super().activate_adapter(lora_id)
        finally:
            # Also where it failed half-way: what is in the slot then is this adapter's to clear.
            if lora_id in self.lora_index_to_id:
                slot = self.lora_index_to_id.index(lora_id)
                if self._contents[slot] != lora_id or activated:
                    self._contents[slot] = lora_id
                    for bank in self._banks:
                        bank.own(slot, lora_id)
        return activated

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter: slot, host memory, the blocks of W that nobody else uses, what was counted for it."""
        removed: bool = super().remove_adapter(adapter_id)
        for slot, content in enumerate(self._contents):
            if content == adapter_id and self.lora_index_to_id[slot] is None:
                self._empty(slot)
        for bank in self._banks:
            bank.forget(adapter_id)
        self.traffic.forget(adapter_id)
        return removed

    def remove_all_adapters(self) -> None:
        """Forget every adapter, slots included."""
        contents = {content for content in self._contents if content is not None}
        super().remove_all_adapters()
        for slot, content in enumerate(self._contents):
            if content is not None:
                self._empty(slot)
        for bank in self._banks:
            for content in contents:
                bank.forget(content)

    def _empty(self, slot: int) -> None:
        for module in self.modules.values():
            if hasattr(module, "reset_module_to_save"):  # a classification head in full
                module.reset_module_to_save(slot)
            module.reset_lora(slot)
        self._contents[slot] = None

    def memory(self) -> dict[str, Any]:
        """What adapters hold in this worker.

        Returns:
            host_bytes: str(lora_int_id) -> bytes of factors and block ids in host memory.
            contents: of each slot, the number of the adapter whose content is in it, or None.
            partitions: blocks of W held, counted by layer and slice.
        """
        return {
            "host_bytes": {str(lora_id): _host_bytes(model) for lora_id, model in self.list_adapters().items()},
            "contents": list(self._contents),
            "partitions": sum(bank.num_partitions for bank in self._banks),
        }


def _host_bytes(model: LoRAModel) -> int:
    if isinstance(model, SmoaModel):
        return model.adapter.nbytes
    found = (tensor for weights in model.loras.values() for tensor in (weights.lora_a, weights.lora_b))
    flat = (part for tensor in found for part in (tensor if isinstance(tensor, list) else [tensor]))
    return sum(part.nbytes for part in flat if part is not None)
