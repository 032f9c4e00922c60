"""The seams of vLLM's worker that this project relies on, checked before they are used."""

from types import ModuleType

from smoa_serve.engine.host.compat import check_signatures, check_version
from smoa_serve.errors import CompatibilityError


def check_worker_seams(mixin_module: ModuleType) -> None:
    """Refuse a vLLM whose version or whose LoRA seams are not the known ones.

    Raises:
        CompatibilityError: with every difference.
    """
    from vllm import __version__ as version
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LRUCacheLoRAModelManager as Manager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as WorkerManager

    check_version(version)
    if getattr(mixin_module, "LRUCacheWorkerLoRAManager", None) is None:
        raise CompatibilityError("vllm.v1.worker.lora_model_runner_mixin no longer names LRUCacheWorkerLoRAManager")
    check_signatures(
        {
            "WorkerLoRAManager.__init__": (
                WorkerManager.__init__,
                ("vllm_config", "device", "embedding_modules", "lora_model_cls"),
            ),
            "WorkerLoRAManager._load_adapter": (WorkerManager._load_adapter, ("lora_request",)),
            "WorkerLoRAManager._apply_adapters": (WorkerManager._apply_adapters, ("lora_requests",)),
            "LoRAModelManager._init_punica_wrapper": (
                Manager._init_punica_wrapper,
                ("max_num_batched_tokens", "vllm_config"),
            ),
            "LoRAModelManager.register_module": (Manager.register_module, ("module_name", "module")),
            "LoRAModelManager._add_adapter": (Manager._add_adapter, ("lora",)),
            "LoRAModelManager.set_adapter_mapping": (Manager.set_adapter_mapping, ("mapping",)),
            "LoRAModelManager._set_adapter_mapping": (Manager._set_adapter_mapping, ("mapping",)),
            "LoRAModelManager.remove_all_adapters": (Manager.remove_all_adapters, ()),
            "BaseLinearLayerWithLoRA.apply": (BaseLinearLayerWithLoRA.apply, ("x", "bias")),
            "BaseLinearLayerWithLoRA.set_lora": (BaseLinearLayerWithLoRA.set_lora, ("index", "lora_a", "lora_b")),
            "BaseLinearLayerWithLoRA.reset_lora": (BaseLinearLayerWithLoRA.reset_lora, ("index",)),
        }
    )
