"""An adapter's modules against the layers that vLLM wrapped on this rank."""

from typing import Any

from smoa_serve.adapter import Adapter, ModuleUpdate
from smoa_serve.engine.layers import SmoaLayerWeights, SmoaLinearMixin
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
    rename = _renamer(manager.model)
    packed = {part: (name, i) for name, parts in manager.packed_modules.items() for i, part in enumerate(parts)}
    reasons: list[str] = []
    unfit: dict[str, list[str]] = {}  # reason -> modules: one cause often holds for all layers
    slices: dict[str, dict[int, ModuleUpdate]] = {}
    for module, update in adapter.modules.items():
        name = rename(module)
        layer_name, index = packed.get(name, (name, 0))
        layer = manager.modules.get(layer_name)
        if layer is None:
            if not _elsewhere(manager, name):
                reasons.append(f"{module} is no linear layer that this engine serves adapters on")
            continue
        for reason in _unfit(layer, index, len(manager.packed_modules.get(layer_name, [0])), update):
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


def _renamer(model: Any) -> Any:
    """Hugging Face module name -> vLLM module name, by the model's own weights mapper."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    # 0.29 and later, 0.28, before: only the renames, not the stacking of q/k/v.
    for method in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, method):
            mapper = getattr(mapper, method)()
            break

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


def _unfit(layer: Any, index: int, packed_parts: int, update: ModuleUpdate) -> list[str]:
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
