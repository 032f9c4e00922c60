"""Worker methods for `collective_rpc`, put on vLLM's `WorkerBase`."""

import dataclasses
from collections.abc import Collection
from time import monotonic
from typing import Any

from smoa_serve import __version__
from smoa_serve.errors import AdapterError
from smoa_serve.merge_policy import MergePolicy


def smoa_status(worker: Any) -> dict[str, Any]:
    """What one worker knows: proof that the plugin is in this process, and where each adapter resides.

    Returns:
        version: of smoa-serve.
        lora: whether adapters are enabled.
        refusal: why SMoA is not served, or None.
        residence: str(lora_int_id) -> "merged", "resident", "slot" or "host".
        resident_bytes: str(lora_int_id) -> bytes held for the first two.
        steps: engine steps so far; tokens: str(lora_int_id) -> tokens they took, "0" for the base.
        alone, alone_steps: str(lora_int_id) -> tokens in steps that had no others, and these steps.
        switches_freely: steps may run on merged or original weights as suits them.
        cost: the kernels' cost model, None where no layer takes SMoA.
        block_bytes: str(lora_int_id) -> bytes of the blocks of W that an adapter in a slot uses.
        weight_bytes: of all weights of the layers that take SMoA; layers: how many there are.
        host_bytes, contents, partitions: see `FreeingManager.memory`.
        partition_bytes: device bytes of the weight blocks and orders kept for their partitions.
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
        "steps": manager.traffic.steps,
        "tokens": {str(lora_id): count for lora_id, count in manager.traffic.tokens().items()},
        "alone": {str(lora_id): count for lora_id, count in manager.traffic.alone().items()},
        "alone_steps": {str(lora_id): count for lora_id, count in manager.traffic.alone_steps().items()},
        "switches_freely": manager.merger.switches_freely,
        "resident_bytes": {str(lora_id): size for lora_id, size in manager.resident_bytes().items()},
        "cost": dataclasses.asdict(smoa_layers[0].smoa_bank.cost) if smoa_layers else None,
        "block_bytes": {str(lora_id): size for lora_id, size in manager.block_bytes().items()},
        "weight_bytes": sum(layer.smoa_weight.dequantized_bytes for layer in smoa_layers),
        "layers": len(smoa_layers),
        **manager.memory(),
        "partition_bytes": sum(layer.smoa_bank.partition_bytes for layer in smoa_layers),
    }


def smoa_ready(worker: Any, requests: Collection[Any]) -> dict[str, Any]:
    """Bring the adapters of the next step into slots; see `SmoaWorkerManager.ready`.

    Args:
        worker: vLLM's.
        requests: LoRA requests of all adapters of the step.

    Returns:
        failed: lora_int_id -> why; active: lora_int_id -> requested path, of all adapters in slots.
    """
    from smoa_serve.engine.worker_manager import SmoaWorkerManager

    workers_manager = worker.model_runner.lora_manager
    if not isinstance(workers_manager, SmoaWorkerManager):  # vLLM's own loads inside the step
        return {"failed": {}, "active": {request.lora_int_id: request.lora_path for request in requests}}
    return {"failed": workers_manager.ready(requests), "active": workers_manager.active}


def smoa_stage(worker: Any, lora_int_id: int, target: str, budget_s: float) -> dict[str, Any]:
    """Work for about `budget_s` towards an adapter being merged or resident. Called again and again between steps, so
    that no running request waits for longer.

    Args:
        worker: vLLM's.
        lora_int_id: of the adapter.
        target: "merged" or "resident".
        budget_s: seconds.

    Returns:
        refused: every reason why it cannot be moved, and then nothing else; ready, finished and layers (of `layers`);
        when a merge is ready: lost, layer -> share of the update that rounding removes.
    """
    manager = _manager(worker)
    try:
        if target == "resident":
            return _stage_resident(worker, manager, lora_int_id, budget_s)
        manager.begin_merge(lora_int_id)
        report: dict[str, Any] = manager.merger.work(budget_s)
    except AdapterError as error:
        return {"refused": error.reasons}
    return report | {"refused": []}


def _stage_resident(worker: Any, manager: Any, lora_int_id: int, budget_s: float) -> dict[str, Any]:
    deadline, layers = monotonic() + budget_s, len(manager.merger.layers)
    state: tuple[int | None, Any, int] = getattr(worker, "_smoa_resident_work", (None, None, 0))
    lora_id, work, finished = state
    if lora_id != lora_int_id:
        work, finished = manager.make_resident(lora_int_id), 0
    ready = False
    while not ready and monotonic() < deadline:
        ready = next(work, "end") == "end"
        finished += not ready
    worker._smoa_resident_work = (None, None, 0) if ready else (lora_int_id, work, finished)
    return {"refused": [], "ready": ready, "finished": finished, "layers": layers, "lost": {}}


def smoa_merge(worker: Any, policy: str) -> dict[str, Any]:
    """Let the staged adapter be merged from the next step on; the work is done, this switches.

    Returns:
        bytes: held for it on this worker.
    """
    manager = _manager(worker)
    manager.commit_merge(MergePolicy(policy))
    return {"bytes": manager.merger.nbytes}


def smoa_demote(worker: Any, lora_int_id: int) -> None:
    """Back to the slot: un-merge (bit for bit, checked) or give resident blocks back; nothing if it is there."""
    manager = _manager(worker)
    worker._smoa_resident_work = (None, None, 0)
    if manager.merger.lora_id == lora_int_id:
        manager.end_merge()
    manager.drop_resident(lora_int_id)


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager
