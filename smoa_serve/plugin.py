"""The `vllm.general_plugins` entry point: enters vLLM in every process.

Nothing of vLLM is imported here. Each seam is replaced right after vLLM first imports its module, so that the order
of vLLM's own imports stays as it is; a seam that cannot be replaced fails that import, and with it the start.
"""

import logging
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import wrapt

from smoa_serve.engine.host.logs import share_logging
from smoa_serve.errors import CompatibilityError
from smoa_serve.settings import process_settings

logger = logging.getLogger(__name__)


def register() -> None:
    """Arrange the replacements. Safe to call more than once.

    Raises:
        CompatibilityError: vLLM would serve by a program that none of this can enter.
        ConfigError: a variable SMOA_* that is not known, or a value that cannot be used.
    """
    check_frontend(os.environ)
    limit = process_settings().engine.kernels_isa
    if limit is not None:
        os.environ["SMOA_KERNELS_ISA"] = limit  # the kernels, which know nothing of serving, read it themselves
    for module, hook in _HOOKS.items():
        if module not in _registered:
            _registered.add(module)
            wrapt.register_post_import_hook(hook, module)


def check_frontend(environment: Mapping[str, str]) -> None:
    """Refuse vLLM's Rust frontend: it has routes and adapters of its own, and none of what is entered here.

    Raises:
        CompatibilityError: the environment asks for it.
    """
    value = environment.get("VLLM_USE_RUST_FRONTEND", "")
    if value.strip() not in {"", "0"}:
        raise CompatibilityError(
            f"VLLM_USE_RUST_FRONTEND={value} is set: smoa-serve cannot enter vLLM's Rust frontend, which would serve "
            "without the adapters' checks and routes. Unset it, or leave smoa_serve out of VLLM_PLUGINS"
        )


def _enter_worker_manager(module: ModuleType) -> None:
    share_logging()
    from smoa_serve.engine.host.seams import check_worker_seams
    from smoa_serve.engine.worker import SmoaWorkerManager

    check_worker_seams(module)
    module.LRUCacheWorkerLoRAManager = SmoaWorkerManager  # type: ignore[attr-defined]
    logger.info("smoa-serve manages the adapters of this worker")


def _enter_worker(module: ModuleType) -> None:
    from smoa_serve.engine import rpc

    for method in rpc.METHODS:
        setattr(module.WorkerBase, method.__name__, method)


def _enter_core(module: ModuleType) -> None:
    from smoa_serve.engine import admission

    for name, wrapper in {
        "step": admission.step,
        "step_with_batch_queue": admission.step,
        "add_lora": admission.add_lora,
        "remove_lora": admission.remove_lora,
        "collective_rpc": admission.collective_rpc,
        **dict.fromkeys(("pin_lora", "execute_dummy_batch", "sleep", "wake_up"), admission.moves),
    }.items():
        wrapt.wrap_function_wrapper(module, f"EngineCore.{name}", wrapper)


def _enter_cpu_platform(module: ModuleType) -> None:
    def allow(wrapped: Any, platform: Any, args: Any, kwargs: Any) -> None:
        from smoa_serve.engine.host.compiling import allow_compilation

        allow_compilation(wrapped, platform, args, kwargs)

    wrapt.wrap_function_wrapper(module, "CpuPlatform.check_and_update_config", allow)


def _enter_message_queue(module: ModuleType) -> None:
    from smoa_serve.engine.host.waiting import sleep_sooner

    if hasattr(module, "SpinCondition"):  # only time is at stake: a vLLM without it starts as well
        wrapt.wrap_function_wrapper(module, "SpinCondition.__init__", sleep_sooner)


def _enter_async_engine(module: ModuleType) -> None:
    from smoa_serve.residence.engine_client import enter_request

    wrapt.wrap_function_wrapper(module, "AsyncLLM.add_request", enter_request)


def _enter_output_processor(module: ModuleType) -> None:
    from smoa_serve.server.private_copies import report_failures

    wrapt.wrap_function_wrapper(module, "OutputProcessor.process_outputs", report_failures)


def _enter_metrics(module: ModuleType) -> None:
    from smoa_serve.server.lora_metric import keep_one_series

    wrapt.wrap_function_wrapper(module, "PrometheusStatLogger.__init__", keep_one_series)


def _enter_serving_models(module: ModuleType) -> None:
    # By then the API server holds references to the class, so its instances are turned instead of the name rebound.
    share_logging()

    def turn(wrapped: Any, models: Any, args: Any, kwargs: Any) -> None:
        from smoa_serve.server.models import enter  # which imports this very module of vLLM

        enter(wrapped, models, args, kwargs)

    wrapt.wrap_function_wrapper(module, "OpenAIServingModels.__init__", turn)


def _enter_app(module: ModuleType) -> None:
    # vLLM moved `build_app`; its old home imports it. The API server holds a reference to it by then, so what it calls
    # last is replaced in its module.
    if getattr(module, "build_app", None) is None or module.build_app.__module__ != module.__name__:
        return
    from smoa_serve.server.auth import guard_built_app

    wrapt.wrap_function_wrapper(module, "sagemaker_standards_bootstrap", guard_built_app)


def _enter_model_check(module: ModuleType) -> None:
    from smoa_serve.server.resolving import resolve_unknown

    wrapt.wrap_function_wrapper(module, "BaseServing._check_model", resolve_unknown)


def _enter_pooling_model_check(module: ModuleType) -> None:
    from smoa_serve.server.resolving import resolve_unknown_pooling

    wrapt.wrap_function_wrapper(module, "PoolingBaseServing._check_model", resolve_unknown_pooling)


_registered: set[str] = set()
_HOOKS = {
    "vllm.v1.worker.lora_model_runner_mixin": _enter_worker_manager,
    "vllm.v1.worker.worker_base": _enter_worker,
    "vllm.v1.engine.core": _enter_core,
    "vllm.platforms.cpu": _enter_cpu_platform,
    "vllm.distributed.device_communicators.shm_broadcast": _enter_message_queue,
    "vllm.v1.engine.async_llm": _enter_async_engine,
    "vllm.v1.engine.output_processor": _enter_output_processor,
    "vllm.v1.metrics.loggers": _enter_metrics,
    "vllm.entrypoints.openai.models.serving": _enter_serving_models,
    "vllm.entrypoints.openai.api_server": _enter_app,
    "vllm.entrypoints.launchers.app": _enter_app,
    "vllm.entrypoints.serve.engine.serving": _enter_model_check,
    "vllm.entrypoints.pooling.base.serving": _enter_pooling_model_check,
}
