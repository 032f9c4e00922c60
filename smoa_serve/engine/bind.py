"""An adapter's modules against the layers that vLLM wrapped on this rank."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel

from smoa_serve.adapters.model import Adapter, ModuleUpdate
from smoa_serve.base.checkpoint import unwrapped
from smoa_serve.engine.linear import SmoaLayerWeights, SmoaLinearMixin
from smoa_serve.errors import AdapterError


def bind_modules(manager: Any, adapter: Adapter, source: str) -> dict[str, SmoaLayerWeights]:
    """Sort an adapter's updates by vLLM layer and packed slice.

    Args:
        manager: the `SmoaModelManager` of this rank.
        adapter: canonical adapter, named by Hugging Face modules.
        source: path for messages.

    Returns:
        vLLM module name -> its updates, in full (unsharded) coordinates.

    Raises:
        AdapterError: the engine serves none, or a module has no layer here, or does not fit it; every reason.
    """
    if manager.smoa_refusal is not None:
        raise AdapterError(source, manager.smoa_refusal)
    rename, places = module_renamer(manager.model), Places(manager)
    reasons: list[str] = []
    unfit: dict[str, list[str]] = {}  # reason -> modules: one cause often holds for all layers
    slices: dict[str, dict[int, ModuleUpdate]] = {}
    for module, update in adapter.modules.items():
        name = rename(module)
        place = places.find(name)
        if place is None:
            if not _elsewhere(manager, name):
                reasons.append(f"{module} is no linear layer that this engine serves adapters on")
            continue
        layer_name, index = place
        for reason in _unfit(manager, layer_name, index, update):
            unfit.setdefault(reason, []).append(module)
        slices.setdefault(layer_name, {})[index] = update
    for reason, modules in unfit.items():
        others = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
        reasons.append(f"{modules[0]}{others}: {reason}")
    reasons += _rank_reasons(manager, adapter)
    if not slices and not reasons and manager._pipeline_size == 1:
        reasons.append("no module of it meets a layer of this engine")
    if reasons:
        raise AdapterError(source, reasons)
    return {
        name: SmoaLayerWeights(tuple(parts.get(i) for i in range(manager.modules[name].n_slices)))
        for name, parts in slices.items()
    }


class Places:
    """Where the layers of this rank are, by the name of a module.

    Args:
        manager: the `SmoaModelManager` of this rank.
    """

    def __init__(self, manager: Any) -> None:
        packed = manager.packed_modules
        self._places = {name: (name, 0) for name in manager.modules} | {
            part: (name, i) for name, parts in packed.items() for i, part in enumerate(parts)
        }
        self._unwrapped: dict[str, list[str]] = {}
        for name in self._places:
            self._unwrapped.setdefault(unwrapped(name), []).append(name)

    def known_as(self, name: str) -> str | None:
        """The name here of a module: its own, or the only one that differs in how the language model is wrapped."""
        names = self._unwrapped.get(unwrapped(name), [])
        return name if name in self._places else names[0] if len(names) == 1 else None

    def find(self, name: str) -> tuple[str, int] | None:
        """The wrapped layer and the packed slice of a module, named as vLLM does; None where it is not here."""
        known = self.known_as(name)
        return None if known is None else self._places[known]


def check_lora_names(manager: Any, names: Iterable[str], source: str) -> None:
    """Refuse a LoRA adapter with factors that vLLM would refuse as a whole, or leave out in silence.

    Args:
        manager: the `SmoaModelManager` of this rank.
        names: modules, named as vLLM does.
        source: path for messages.

    Raises:
        AdapterError: every reason.
    """
    places = Places(manager)
    reasons = []
    for name in dict.fromkeys(name.removesuffix(".base_layer") for name in names):
        place = places.find(name)
        if place is None:
            if not _elsewhere(manager, name):
                reasons.append(f"{name} is no layer that this engine serves adapters on")
        elif isinstance(manager.modules[place[0]], LogitsProcessorWithLoRA):
            reasons.append(f"{name} is the output head; adapters on it are not supported")
        elif place[0] in manager.absorbed:
            reasons.append(f"{name}: {manager.unattached[place[0]]}")
    if reasons:
        raise AdapterError(source, reasons)


def check_lora_factors(manager: Any, lora: LoRAModel, source: str) -> None:
    """Give the modules of a LoRA adapter the names of their layers, and refuse factors that vLLM would cut to size or
    that are not finite as served.

    Args:
        manager: the `SmoaModelManager` of this rank.
        lora: as vLLM read it, not packed yet; its names may change.
        source: path for messages.

    Raises:
        AdapterError: every reason.
    """
    places = Places(manager)
    reasons = []
    for name, weights in list(lora.loras.items()):
        a, b = weights.lora_a, weights.lora_b
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            reasons.append(f"{name}: its factors are not finite in {str(b.dtype).removeprefix('torch.')}")
        known = places.known_as(name)
        if known is None:
            continue
        layer_name, index = places.find(name) or (known, 0)
        shape = _lora_shape(manager, layer_name, index)
        if shape is not None and (int(b.shape[0]), int(a.shape[1])) != shape:
            reasons.append(f"{name}: the update is {b.shape[0]}x{a.shape[1]}, the layer is {shape[0]}x{shape[1]}")
        if known != name:
            lora.loras[known] = lora.loras.pop(name)
    if reasons:
        raise AdapterError(source, reasons)


def _lora_shape(manager: Any, layer_name: str, index: int) -> tuple[int, int] | None:
    """(H_out, H_in) of a slice; None where a layer's slices are no modules of their own, or heads are replicated."""
    layer = manager.modules[layer_name]
    if not isinstance(layer, BaseLinearLayerWithLoRA):
        return None
    if len(manager.packed_modules.get(layer_name, [0])) != layer.n_slices:
        return None
    if layer.n_slices == 1 and getattr(layer.base_layer, "num_kv_head_replicas", 1) > 1:
        return None
    return full_shape(layer, index)


def rename_mapper(model: Any) -> Any:
    """The model's weights mapper with its renames alone, not the stacking of q/k/v; None where names stay."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    # 0.29 and later, 0.28.
    for method in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, method):
            return getattr(mapper, method)()
    return mapper


def module_renamer(model: Any) -> Callable[[str], str]:
    """Hugging Face module name -> vLLM module name, by the model's own weights mapper."""
    mapper = rename_mapper(model)
    if mapper is None:
        return lambda name: name

    def rename(name: str) -> str:
        mapped = mapper._map_name(f"{name}.weight")
        return name if mapped is None else str(mapped).removesuffix(".weight")

    return rename


def _elsewhere(manager: Any, name: str) -> bool:
    """Whether another pipeline rank holds the layer: ranks wrap their own layers only, so the suffix decides."""
    if manager._pipeline_size == 1:
        return False
    known = set(manager.supported_lora_modules)
    for packed_name, parts in manager.packed_modules_mapping.items():
        if packed_name in known:
            known.update(parts)
    return name.rsplit(".", 1)[-1] in known


def _unfit(manager: Any, layer_name: str, index: int, update: ModuleUpdate) -> list[str]:
    layer, packed_parts = manager.modules[layer_name], len(manager.packed_modules.get(layer_name, [0]))
    if layer_name in manager.unattached:
        return [manager.unattached[layer_name]]
    if not isinstance(layer, SmoaLinearMixin):
        return [f"vLLM wraps it as {type(layer).__name__}, which takes LoRA only"]
    if packed_parts != layer.n_slices:  # type: ignore[attr-defined]
        return [f"vLLM packs it in {layer.n_slices} slices for {packed_parts} modules, which is not supported"]  # type: ignore[attr-defined]
    refusal = layer.smoa_weight.refusal()
    if refusal is not None:
        return [refusal]
    h_out, h_in = full_shape(layer, index)
    if update.shape != (h_out, h_in):
        return [f"the update is {update.shape[0]}x{update.shape[1]}, the layer is {h_out}x{h_in}"]
    return []


def full_shape(layer: Any, index: int) -> tuple[int, int]:
    """(H_out, H_in) of a packed slice before tensor parallelism cuts it."""
    base = layer.base_layer
    outputs = getattr(base, "output_sizes", None)
    if layer.n_slices > 1 and outputs is not None:
        # Replicated key/value heads count once per rank in `output_sizes`.
        replicas = int(getattr(base, "num_kv_head_replicas", 1)) if index > 0 else 1
        return int(outputs[index]) // replicas, int(base.input_size)
    return int(base.output_size), int(base.input_size)


def _rank_reasons(manager: Any, adapter: Adapter) -> list[str]:
    limit = manager.lora_config.max_lora_rank
    if adapter.max_rank > limit:
        return [
            f"its widest branch has rank {adapter.max_rank}, the slots hold {limit}; "
            f"start the server with --max-lora-rank {adapter.max_rank} or more"
        ]
    return []
