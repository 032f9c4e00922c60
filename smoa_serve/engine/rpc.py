"""Worker methods for `collective_rpc`, put on vLLM's `WorkerBase`. They answer what was raised instead of raising it.

vLLM's executor stops reading at the first worker that raised. The answers of the others stay in their queues, and the
next call takes them for its own.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

from smoa_serve import __version__
from smoa_serve.errors import AdapterBusyError, AdapterError, SmoaError
from smoa_serve.settings import MergePolicy

logger = logging.getLogger(__name__)


def _answering(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """With `raised`, what was raised, in place of everything else where something was."""

    @functools.wraps(method)
    def answer(worker: Any, *arguments: Any) -> dict[str, Any]:
        try:
            return method(worker, *arguments)
        except Exception as error:
            logger.exception("%s failed on a worker", method.__name__)
            return {"raised": str(error) if isinstance(error, SmoaError) else f"{type(error).__name__}: {error}"}

    return answer


@_answering
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
    from smoa_serve.engine.linear import SmoaLinearMixin
    from smoa_serve.engine.worker import SmoaWorkerManager

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


@_answering
def smoa_ready(worker: Any, requests: Collection[Any]) -> dict[str, Any]:
    """Bring adapters into slots; see `SmoaWorkerManager.ready`.

    Args:
        worker: vLLM's.
        requests: LoRA requests of all adapters of the next step, or of one that is loaded.

    Returns:
        failed: lora_int_id -> reasons; active: lora_int_id -> requested path, of all adapters in slots.
    """
    from smoa_serve.engine.worker import SmoaWorkerManager

    workers_manager = worker.model_runner.lora_manager
    if not isinstance(workers_manager, SmoaWorkerManager):  # vLLM's own loads inside the step
        return {"failed": {}, "active": {request.lora_int_id: request.lora_path for request in requests}}
    return {"failed": workers_manager.ready(requests), "active": workers_manager.active}


@_answering
def smoa_remove(worker: Any, lora_int_id: int) -> dict[str, Any]:
    """Forget an adapter.

    Returns:
        removed: whether it was here.
    """
    return {"removed": worker.model_runner.lora_manager.remove_adapter(lora_int_id)}


@_answering
def smoa_leave_out(worker: Any, lora_int_ids: Collection[int]) -> dict[str, Any]:
    """Forget adapters that another worker could not bring into a slot; the step that is next has none of theirs."""
    worker.model_runner.lora_manager.leave_out(lora_int_ids)
    return {}


@_answering
def smoa_merged(worker: Any) -> dict[str, Any]:
    """What is merged into this worker's weights.

    Returns:
        merged: lora_int_id, or None.
    """
    merger = _manager(worker).merger
    return {"merged": merger.lora_id if merger.merged else None}


@_answering
def smoa_stage(worker: Any, lora_int_id: int, target: str, budget_s: float) -> dict[str, Any]:
    """Work for about `budget_s` towards an adapter being merged or resident. Called again and again between steps, so
    that no running request waits for longer. A worker on which it fails has undone it.

    Args:
        worker: vLLM's.
        lora_int_id: of the adapter.
        target: "merged" or "resident".
        budget_s: seconds.

    Returns:
        refused: every reason why it cannot be moved; lasting: the same adapter would be refused again; failed: what was
        raised, None when nothing was; ready, finished and layers (of `layers`) otherwise;
        when a merge is ready: lost, layer -> share of the update that rounding removes.
    """
    manager = _manager(worker)
    stage = manager.stage_resident if target == "resident" else manager.stage_merge
    report: dict[str, Any] = {"refused": [], "lasting": False, "failed": None, "ready": False, "lost": {}}
    try:
        report |= stage(lora_int_id, budget_s)
    except AdapterError as error:
        report |= {"refused": error.reasons, "lasting": not isinstance(error, AdapterBusyError)}
    except Exception as error:
        logger.exception("Adapter %d could not be made %s", lora_int_id, target)
        report["failed"] = f"{type(error).__name__}: {error}"
    return report


@_answering
def smoa_merge(worker: Any, policy: str) -> dict[str, Any]:
    """Let the staged adapter be merged from the next step on; the work is done, this switches.

    Returns:
        bytes: held for it on this worker.
    """
    manager = _manager(worker)
    manager.commit_merge(MergePolicy(policy))
    return {"bytes": manager.merger.nbytes}


@_answering
def smoa_demote(worker: Any, lora_int_id: int, target: str | None = None) -> dict[str, Any]:
    """Back to the slot: un-merge (bit for bit, checked) or give resident blocks back; nothing if it is there.

    Args:
        worker: vLLM's.
        lora_int_id: of the adapter.
        target: "merged" or "resident": only what belongs to that step, finished or not; None for both.
    """
    manager = _manager(worker)
    if target != "resident":
        manager.leave_merged(lora_int_id)
    if target != "merged":
        manager.leave_resident(lora_int_id)
    return {}


METHODS = (smoa_status, smoa_ready, smoa_remove, smoa_leave_out, smoa_merged, smoa_stage, smoa_merge, smoa_demote)


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager
