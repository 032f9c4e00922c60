"""The `vllm.general_plugins` entry point: enters vLLM in every process.

Nothing of vLLM is imported here. Each seam is replaced right after vLLM first imports its module, so that the order of
vLLM's own imports stays as it is; a seam that cannot be replaced fails that import, and with it the start of the server.
"""

import logging
from types import ModuleType

import wrapt

logger = logging.getLogger(__name__)


def register() -> None:
    """Arrange the three replacements. Safe to call more than once."""
    for module, hook in _HOOKS.items():
        if module not in _registered:
            _registered.add(module)
            wrapt.register_post_import_hook(hook, module)


def _enter_worker_manager(module: ModuleType) -> None:
    from smoa_serve.engine.seams import check_worker_seams
    from smoa_serve.engine.worker_manager import SmoaWorkerManager

    check_worker_seams(module)
    module.LRUCacheWorkerLoRAManager = SmoaWorkerManager  # type: ignore[attr-defined]
    logger.info("smoa-serve manages the adapters of this worker")


def _enter_worker(module: ModuleType) -> None:
    from smoa_serve.engine import rpc

    module.WorkerBase.smoa_status = rpc.smoa_status


def _enter_serving_models(module: ModuleType) -> None:
    from smoa_serve.http.serving_models import SmoaServingModels

    module.OpenAIServingModels = SmoaServingModels  # type: ignore[attr-defined]


_registered: set[str] = set()
_HOOKS = {
    "vllm.v1.worker.lora_model_runner_mixin": _enter_worker_manager,
    "vllm.v1.worker.worker_base": _enter_worker,
    "vllm.entrypoints.openai.models.serving": _enter_serving_models,
}
