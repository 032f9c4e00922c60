"""vLLM's adapter manager: a slot holds an adapter whole or nothing, and a removed adapter gives back what it held."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from smoa_serve.adapters.model import Adapter
from smoa_serve.engine.linear import SmoaLinearMixin
from smoa_serve.engine.traffic import Traffic
from smoa_serve.errors import AdapterBusyError, AdapterError

logger = logging.getLogger(__name__)


class SmoaModel(LoRAModel):
    """A SMoA or HiRA adapter in host memory, in the place where vLLM keeps a `LoRAModel`.

    Attributes:
        adapter: what was read.
    """

    adapter: Adapter


class FreeingManager(LRUCacheLoRAModelManager):
    """vLLM counts an adapter as in its slot before a layer has it, and frees a slot's number but not its content. Here
    an adapter is in its slot in every layer or in none, and a slot that nobody has is empty in every layer.

    Attributes:
        smoa_refusal: why this engine serves no SMoA adapters at all; None when it does.
    """

    smoa_refusal: str | None

    @cached_property
    def _unwiped(self) -> set[int]:
        """Slots that nobody has and that could not be emptied yet."""
        return set()

    @cached_property
    def traffic(self) -> Traffic:
        """What ran."""
        return Traffic()

    @property
    def _banks(self) -> Iterator[Any]:
        return (layer.smoa_bank for layer in self.modules.values() if isinstance(layer, SmoaLinearMixin))

    def activate_adapter(self, lora_id: int) -> bool:
        """Bring a registered adapter into a slot, unless it is in one. One that cannot be is forgotten, so that the
        next try begins afresh: what a slot held before would be served in its name."""
        try:
            for slot in sorted(self._unwiped):
                self._wipe(slot)
            activated: bool = super().activate_adapter(lora_id)
        except BaseException:
            self._own(lora_id)
            # Its slot first: `remove_adapter` stops at a merged weight that cannot be given back.
            self.deactivate_adapter(lora_id)
            self.remove_adapter(lora_id)
            raise
        if activated:
            self._own(lora_id)
        return activated

    def slot_of(self, lora_id: int) -> int:
        """The slot of a SMoA or HiRA adapter, which is brought into one if it is in none.

        Raises:
            AdapterBusyError: there is no such adapter here.
            AdapterError: it is of another kind.
        """
        if self.smoa_refusal is not None:
            raise AdapterError(f"adapter {lora_id}", self.smoa_refusal)
        model = self._registered_adapters.cache.get(lora_id)
        if model is None:
            raise AdapterBusyError(f"adapter {lora_id}", "it is not in the engine")
        if not isinstance(model, SmoaModel):
            raise AdapterError(f"adapter {lora_id}", "only SMoA and HiRA adapters can be moved")
        self.activate_adapter(lora_id)
        return int(self.lora_index_to_id.index(lora_id))

    def _own(self, lora_id: int) -> None:
        """Blocks of W that no slot uses are kept for an adapter to come back."""
        if lora_id in self.lora_index_to_id:
            for bank in self._banks:
                bank.own(self.lora_index_to_id.index(lora_id), lora_id)

    def _deactivate_adapter(self, lora_id: int) -> None:
        slot = self.lora_index_to_id.index(lora_id) if lora_id in self.lora_index_to_id else None
        super()._deactivate_adapter(lora_id)
        if slot is None:
            return
        self._unwiped.add(slot)
        for _ in range(2):
            try:
                self._wipe(slot)
                return
            except Exception:
                logger.exception("Slot %d could not be emptied; it is before it is used again", slot)

    def _wipe(self, slot: int) -> None:
        """Empty a slot in every layer, whatever one of them raises."""
        with ExitStack() as stack:
            for module in self.modules.values():
                if hasattr(module, "reset_module_to_save"):  # a classification head
                    stack.callback(module.reset_module_to_save, slot)
                stack.callback(module.reset_lora, slot)
        self._unwiped.discard(slot)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter: slot, host memory, the blocks of W that nobody else uses, what was counted for it."""
        removed: bool = super().remove_adapter(adapter_id)
        self._forget_blocks(adapter_id)
        self.traffic.forget(adapter_id)
        return removed

    def _forget_blocks(self, lora_id: int) -> None:
        for bank in self._banks:
            bank.forget(lora_id)

    def remove_all_adapters(self) -> None:
        """Forget every adapter, slots included."""
        known = {*self.list_adapters(), *(lora_id for lora_id in self.lora_index_to_id if lora_id is not None)}
        super().remove_all_adapters()
        for slot in range(self.lora_slots):
            self._wipe(slot)
        for lora_id in known:
            self._forget_blocks(lora_id)

    def host_bytes(self) -> dict[int, int]:
        """lora_int_id -> bytes of factors and block ids in host memory."""
        return {lora_id: _host_bytes(model) for lora_id, model in self.list_adapters().items()}


def _host_bytes(model: LoRAModel) -> int:
    if isinstance(model, SmoaModel):
        return model.adapter.nbytes
    found = (tensor for weights in model.loras.values() for tensor in (weights.lora_a, weights.lora_b))
    flat = (part for tensor in found for part in (tensor if isinstance(tensor, list) else [tensor]))
    return sum(part.nbytes for part in flat if part is not None)
