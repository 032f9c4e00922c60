"""Worker methods for `collective_rpc`, put on vLLM's `WorkerBase`."""

from typing import Any

from smoa_serve import __version__


def smoa_status(worker: Any) -> dict[str, Any]:
    """What one worker knows: proof that the plugin is in this process, and where each adapter resides.

    Returns:
        version of smoa-serve; lora: whether adapters are enabled; refusal: why SMoA is not served, or None;
        residence: str(lora_int_id) -> "slot" or "host"; layers: how many layers take SMoA; partition_bytes: device
        bytes of the weight blocks and orders kept for their partitions.
    """
    status: dict[str, Any] = {"version": __version__, "lora": worker.lora_config is not None}
    if worker.lora_config is None:
        return status
    from smoa_serve.engine.layers import SmoaLinearMixin
    from smoa_serve.engine.worker_manager import SmoaWorkerManager

    workers_manager = worker.model_runner.lora_manager
    if not isinstance(workers_manager, SmoaWorkerManager):
        status["refusal"] = f"vLLM's own {type(workers_manager).__name__} manages the adapters"
        return status
    manager = workers_manager._adapter_manager
    smoa_layers = [layer for layer in manager.modules.values() if isinstance(layer, SmoaLinearMixin)]
    return status | {
        "refusal": manager.smoa_refusal,
        "residence": {str(lora_id): where for lora_id, where in manager.residence().items()},
        "layers": len(smoa_layers),
        "partition_bytes": sum(layer.smoa_bank.partition_bytes for layer in smoa_layers),
    }
