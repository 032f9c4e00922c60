"""Slots and per-step maps: vLLM's LoRA manager, taught about SMoA adapters."""

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
import torch
from smoa_kernels import StepPlan
from vllm.config import VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping, LoRAMappingType, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.models import supports_multimodal
from vllm.utils.platform_utils import is_pin_memory_available

from smoa_serve import __version__
from smoa_serve.adapters.model import Adapter, ModuleUpdate
from smoa_serve.adapters.overflow import overflow_reasons
from smoa_serve.engine import linear as layers
from smoa_serve.engine import quantized
from smoa_serve.engine.bind import bind_modules, check_lora_factors
from smoa_serve.engine.freeing import FreeingManager, SmoaModel
from smoa_serve.engine.host import compiling, logits
from smoa_serve.engine.merging import WeightChecksumError
from smoa_serve.engine.messages import AdapterStatus, Residence, WorkerStatus
from smoa_serve.engine.mover import Mover
from smoa_serve.errors import AdapterError
from smoa_serve.settings import process_settings


class SmoaModelManager(FreeingManager):
    """Keeps SMoA, HiRA and LoRA adapters in the same slots and caches.

    Attributes:
        plan: which tokens of the current step use which SMoA slot.
        unattached: layer -> why it takes no SMoA adapters though vLLM wraps it.
        absorbed: layers whose update would be lost, whatever adds it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.smoa_refusal is None:
            wrapped = (layer for layer in self.modules.values() if isinstance(layer, layers.SmoaLinearMixin))
            quantized.report(wrapped, self._model_dtype)

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self._static_context = vllm_config.compilation_config.static_forward_context
        self._pipeline_size = vllm_config.parallel_config.pipeline_parallel_size
        self._model_dtype: torch.dtype = vllm_config.model_config.dtype
        self.smoa_refusal = self._refusal(vllm_config)
        self.unattached: dict[str, str] = {}
        self.absorbed: set[str] = set()
        self._whole = process_settings().engine.one_pass
        self.plan = StepPlan(self.max_num_batched_tokens, self.lora_slots, self.device)
        self._seen: object = None
        self._added = 0
        self._block_bytes: tuple[object, dict[int, int]] = (None, {})

    def _refusal(self, vllm_config: VllmConfig) -> str | None:
        self.captured = self.device.type != "cpu" and not vllm_config.model_config.enforce_eager
        if self.captured and not process_settings().engine.cuda_graphs:
            return (
                "deltas inside CUDA graphs are not proven on a GPU yet; start the server with --enforce-eager, or set "
                "SMOA_CUDA_GRAPHS=1 to try them"
            )
        if vllm_config.model_config.is_encoder_decoder:
            return "the encoder's tokens have no adapters of their own in this encoder-decoder model"
        if self.lora_config.fully_sharded_loras:
            return "--fully-sharded-loras cuts factors along the rank; start the server without it"
        if self.lora_config.lora_dtype not in (None, self._model_dtype):
            return (
                f"--lora-dtype is {self.lora_config.lora_dtype} and the model runs in {self._model_dtype}; "
                "start the server without --lora-dtype"
            )
        return None

    @cached_property
    def mover(self) -> Mover:
        """Moves adapters above their slots; first asked for when every layer is registered."""
        graphs = "the differences for other requests are in no captured CUDA graph; start with --enforce-eager"
        wrapped = {name: layer for name, layer in self.modules.items() if isinstance(layer, layers.SmoaLinearMixin)}
        return Mover(wrapped, self, merge_refusal=graphs if self.captured else None)

    def register_module(self, module_name: str, module: BaseLayerWithLoRA) -> None:
        """Called by vLLM for every layer it wrapped."""
        reason = self._unattachable(module_name, module)
        if isinstance(module, LogitsProcessorWithLoRA):
            logits.leave_out(module)
        elif self.device.type == "cpu":
            self._register_cpu_module(module_name, module, attached=reason is None)
        if reason is None:
            layers.attach(
                module, module_name, self.plan, self.lora_slots, self._model_dtype, self.captured, self._whole
            )
            self._static_context[layers.layer_key(module_name)] = module
        else:
            self.unattached[module_name] = reason
        super().register_module(module_name, module)

    def _unattachable(self, module_name: str, module: BaseLayerWithLoRA) -> str | None:
        """Why a layer takes no SMoA and HiRA adapters; None when it does."""
        if self._is_absorbed(module_name):
            self.absorbed.add(module_name)
            return "MLA multiplies it into the attention when the model is loaded, so an update of it would be lost"
        if self.smoa_refusal is not None:
            return self.smoa_refusal
        if not isinstance(module, BaseLinearLayerWithLoRA):
            return f"vLLM wraps it as {type(module).__name__}, which takes LoRA only"
        if not self._is_language(module_name):
            return "it belongs to a tower or connector, whose tokens are not the language model's"
        return layers.dtype_refusal(module, self._model_dtype)

    def _is_absorbed(self, module_name: str) -> bool:
        """Whether the attention beside the layer works on matrices made from its weight."""
        parent, _, name = module_name.rpartition(".")
        if name != "kv_b_proj":
            return False
        around = self.model.get_submodule(parent).modules()
        return any(cls.__name__ == "MLAAttention" for module in around for cls in type(module).__mro__)

    def _register_cpu_module(self, module_name: str, module: BaseLayerWithLoRA, *, attached: bool) -> None:
        if hasattr(module, "lora_b_stacked"):
            layers.add_empty_slot(module)
        if isinstance(module, VocabParallelEmbeddingWithLoRA):
            compiling.make_opaque(module, layers.layer_key(module_name))
            self._static_context[layers.layer_key(module_name)] = module
        elif not (attached and layers.can_be_opaque(module)):
            compiling.forbid_compilation(self.model)

    def _is_language(self, module_name: str) -> bool:
        """Whether the layer sees the language model's tokens: towers and connectors have token maps of their own."""
        if not self.supports_mm:
            return self._language_prefix is not None and module_name.startswith(self._language_prefix)
        wrapper = self._get_punica_wrapper(module_name)
        return wrapper is self.punica_wrapper_mapping[self.mm_mapping.language_model[0]]

    @cached_property
    def _language_prefix(self) -> str | None:
        """How the language model's modules begin where vLLM knows no token maps; None where it does not tell either."""
        if not supports_multimodal(self.model):
            return ""
        try:
            language = self.model.get_language_model()
        except NotImplementedError:
            return None
        names = [f"{name}." if name else "" for name, module in self.model.named_modules() if module is language]
        return names[0] if names else None

    def make_model(self, adapter: Adapter, lora_id: int, source: str) -> SmoaModel:
        """Bind an adapter's modules to this rank's layers; in pinned memory, where a device copies from it.

        Raises:
            AdapterError: this engine cannot serve it; every reason.
        """
        reasons = overflow_reasons(adapter.modules, self._model_dtype)
        if reasons:
            raise AdapterError(source, reasons)
        if self.device.type == "cuda" and is_pin_memory_available():
            modules = {name: pinned(update) for name, update in adapter.modules.items()}
            adapter = dataclasses.replace(adapter, modules=modules)
        bound = bind_modules(self, adapter, source)
        model = SmoaModel(lora_id, max(adapter.max_rank, 1), bound)
        model.adapter = adapter
        return model

    def check_lora(self, lora: LoRAModel, source: str) -> None:
        """Refuse what vLLM's LoRA path would not serve exactly here.

        Raises:
            AdapterError: every reason.
        """
        check_lora_factors(self, lora, source)

    def _deactivate_adapter(self, lora_id: int) -> None:
        self.mover.lose_slot(lora_id)
        super()._deactivate_adapter(lora_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter, and what is merged of it."""
        self.mover.forget(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        """Forget every adapter, slots included."""
        self.mover.forget_all()
        super().remove_all_adapters()
        self.mover.changes += 1

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._added += 1
        if isinstance(lora, SmoaModel):
            # Already packed and bound: vLLM's packing of LoRA weights does not apply.
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        """Write the step's maps, unless nothing changed: neither the batch, nor the slots, nor what they hold."""
        if self.mover.merger.broken is not None:
            raise WeightChecksumError(self.mover.merger.broken)
        seen = (mapping, tuple(self.lora_index_to_id), self._added, self.mover.changes)
        if seen != self._seen:
            self._set_adapter_mapping(mapping)
            self.traffic.begin(mapping.index_mapping)
            self._seen = seen
        self.traffic.step()

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        smoa_slots = {
            lora_id: slot
            for slot, lora_id in enumerate(self.lora_index_to_id)
            if lora_id is not None and isinstance(self._registered_adapters.cache.get(lora_id), SmoaModel)
        }
        for lora_id, slot in smoa_slots.items():
            adapter = self._registered_adapters.cache[lora_id].adapter
            self.plan.describe(slot, adapter.max_rank, lora_id in self.mover.residents)
        if mapping.type is LoRAMappingType.LANGUAGE:
            self._update_plan(mapping.index_mapping, smoa_slots)
        if smoa_slots:
            mapping = LoRAMapping(
                index_mapping=tuple(0 if i in smoa_slots else i for i in mapping.index_mapping),
                prompt_mapping=tuple(0 if i in smoa_slots else i for i in mapping.prompt_mapping),
                is_prefill=mapping.is_prefill,
                type=mapping.type,
            )
        super()._set_adapter_mapping(mapping)

    def _update_plan(self, token_lora_ids: tuple[int, ...], smoa_slots: dict[int, int]) -> None:
        """The step's map, and with it the weights that the step runs on: every rank sees the same tokens."""
        merger = self.mover.merger
        active = merger.for_step(token_lora_ids, smoa_slots)
        if active and merger.lora_id is not None:
            smoa_slots = smoa_slots | {merger.lora_id: self.lora_slots}
        self.plan.update(_token_slots(token_lora_ids, smoa_slots), merged=active)

    def status(self) -> WorkerStatus:
        """What this worker knows."""
        layers = list(self.mover.layers.values())
        return WorkerStatus(
            __version__,
            lora=True,
            refusal=self.smoa_refusal,
            switches_freely=self.mover.merger.switches_freely,
            cost=layers[0].smoa_bank.cost if layers else None,
            steps=self.traffic.steps,
            layers=len(layers),
            weight_bytes=sum(layer.smoa_weight.dequantized_bytes for layer in layers),
            contents=list(self.lora_index_to_id),
            partitions=sum(layer.smoa_bank.num_partitions for layer in layers),
            partition_bytes=sum(layer.smoa_bank.partition_bytes for layer in layers),
            adapters=self._adapter_statuses(),
        )

    def _adapter_statuses(self) -> dict[int, AdapterStatus]:
        columns: dict[str, dict[int, Any]] = {
            "residence": self._residence(),
            "resident_bytes": self.mover.held_bytes(),
            "block_bytes": self._bytes_of_blocks(),
            "host_bytes": self.host_bytes(),
            "tokens": self.traffic.tokens(),
            "alone": self.traffic.alone(),
            "alone_steps": self.traffic.alone_steps(),
        }
        return {
            lora_id: AdapterStatus(**{name: found[lora_id] for name, found in columns.items() if lora_id in found})
            for lora_id in set().union(*columns.values())
        }

    def _residence(self) -> dict[int, Residence]:
        active, known = self._active_adapters, self.list_adapters()
        below = {lora_id: Residence.SLOT if lora_id in active else Residence.HOST for lora_id in known}
        return below | self.mover.committed

    def _bytes_of_blocks(self) -> dict[int, int]:
        """lora_int_id -> bytes of the blocks of W that an adapter in a slot uses."""
        state = self._added, self.mover.changes, tuple(self.lora_index_to_id)
        if state != self._block_bytes[0]:  # the policy asks every few seconds, and a step waits meanwhile
            self._block_bytes = state, self._count_block_bytes()
        return self._block_bytes[1]

    def _count_block_bytes(self) -> dict[int, int]:
        return {
            lora_id: sum(
                entry.partition.block_numbers * layer.smoa_bank.dtype.itemsize
                for layer in self.mover.layers.values()
                for entry in layer.smoa_bank.slots[slot]
                if entry is not None
            )
            for slot, lora_id in enumerate(self.lora_index_to_id)
            if lora_id is not None and isinstance(self._registered_adapters.cache.get(lora_id), SmoaModel)
        }

    def touch_active(self, lora_ids: set[int]) -> None:
        """Mark adapters as just used, so that making room for others of the same step takes none of them."""
        for lora_id in lora_ids:
            if lora_id in self._active_adapters:
                self._active_adapters.touch(lora_id)
            if lora_id in self._registered_adapters:
                self._registered_adapters.touch(lora_id)


def pinned(update: ModuleUpdate) -> ModuleUpdate:
    """With factors in pinned memory."""
    return dataclasses.replace(update, a=update.a.pin_memory(), b=update.b.pin_memory())


def _token_slots(token_lora_ids: tuple[int, ...], slots: dict[int, int]) -> Any:
    """[T] slot of each token, -1 where its adapter is none of ours."""
    ids = np.asarray(token_lora_ids, dtype=np.int64)
    result = np.full(ids.shape, -1, dtype=np.int64)
    for lora_id, slot in slots.items():
        result[ids == lora_id] = slot
    return result
