"""Slots and per-step maps: vLLM's LoRA manager, taught about SMoA adapters."""

import dataclasses
from typing import Any

import numpy as np
import torch
from smoa_kernels import StepPlan
from vllm.config import VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping, LoRAMappingType, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
from vllm.utils.platform_utils import is_pin_memory_available

from smoa_serve.adapter import Adapter, ModuleUpdate
from smoa_serve.engine import compiling, layers, logits, quantized
from smoa_serve.engine.binding import bind_modules
from smoa_serve.engine.freeing import SmoaModel
from smoa_serve.engine.merging import WeightChecksumError
from smoa_serve.engine.moving import MovingManager
from smoa_serve.errors import AdapterError
from smoa_serve.overflow import overflow_reasons
from smoa_serve.settings import Settings


class SmoaModelManager(MovingManager):
    """Keeps SMoA, HiRA and LoRA adapters in the same slots and caches.

    Attributes:
        plan: which tokens of the current step use which SMoA slot.
        smoa_refusal: why this engine serves no SMoA adapters at all; None when it does.
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
        self._whole = Settings.from_environment().one_pass
        self.plan = StepPlan(self.max_num_batched_tokens, self.lora_slots, self.device)
        self._seen: object = None
        self.begin_moving()

    def _refusal(self, vllm_config: VllmConfig) -> str | None:
        self.captured = self.device.type != "cpu" and not vllm_config.model_config.enforce_eager
        if self.captured and not Settings.from_environment().cuda_graphs:
            return (
                "deltas inside CUDA graphs are not proven on a GPU yet; start the server with --enforce-eager, or set "
                "SMOA_CUDA_GRAPHS=1 to try them"
            )
        if self.lora_config.fully_sharded_loras:
            return "--fully-sharded-loras cuts factors along the rank; start the server without it"
        if self.lora_config.lora_dtype not in (None, self._model_dtype):
            return (
                f"--lora-dtype is {self.lora_config.lora_dtype} and the model runs in {self._model_dtype}; "
                "start the server without --lora-dtype"
            )
        return None

    def register_module(self, module_name: str, module: BaseLayerWithLoRA) -> None:
        """Called by vLLM for every layer it wrapped."""
        if isinstance(module, LogitsProcessorWithLoRA):
            logits.leave_out(module)
        elif self.device.type == "cpu":
            self._register_cpu_module(module_name, module)
        if self.smoa_refusal is None and isinstance(module, BaseLinearLayerWithLoRA) and self._is_language(module_name):
            layers.attach(
                module, module_name, self.plan, self.lora_slots, self._model_dtype, self.captured, self._whole
            )
            self._static_context[layers.layer_key(module_name)] = module
        super().register_module(module_name, module)

    def _register_cpu_module(self, module_name: str, module: BaseLayerWithLoRA) -> None:
        if hasattr(module, "lora_b_stacked"):
            layers.add_empty_slot(module)
        if isinstance(module, VocabParallelEmbeddingWithLoRA):
            compiling.make_opaque(module, layers.layer_key(module_name))
            self._static_context[layers.layer_key(module_name)] = module
        elif not layers.can_be_opaque(module) or not self._is_language(module_name):
            compiling.forbid_compilation(self.model)

    def _is_language(self, module_name: str) -> bool:
        """Whether the layer sees the language model's tokens: towers and connectors have token maps of their own."""
        wrapper = self._get_punica_wrapper(module_name)
        key = self.mm_mapping.language_model[0] if self.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        return wrapper is self.punica_wrapper_mapping[key]

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
        """Refuse what vLLM's LoRA path cannot serve exactly here, or would bind in part.

        Raises:
            AdapterError: every reason.
        """
        heads = [name for name in lora.loras if isinstance(self.modules.get(name), LogitsProcessorWithLoRA)]
        reasons = [f"{name} is the output head; adapters on it are not supported" for name in heads]
        if reasons:
            raise AdapterError(source, reasons)

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._content_version += 1
        if isinstance(lora, SmoaModel):
            # Already packed and bound: vLLM's packing of LoRA weights does not apply.
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        """Write the step's maps, unless nothing changed: neither the batch, nor the slots, nor what they hold."""
        if self.merger.broken is not None:
            raise WeightChecksumError(self.merger.broken)
        seen = (mapping, tuple(self.lora_index_to_id), self._content_version)
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
            self.plan.describe(slot, adapter.max_rank, lora_id in self._resident)
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
        merged_id = self.merger.lora_id
        wanted = self.merger.wants(token_lora_ids, smoa_slots) if merged_id is not None else False
        active = self.merger.settle(wanted)
        if active and merged_id is not None:
            smoa_slots = smoa_slots | {merged_id: self.lora_slots}
        self.plan.update(_token_slots(token_lora_ids, smoa_slots), merged=active)

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
