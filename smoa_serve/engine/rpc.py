"""Worker methods for `collective_rpc`, put on vLLM's `WorkerBase`: a thin face of the managers, which answers messages.

They answer what was raised instead of raising it, see `messages.raised`.
"""

import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

from smoa_serve import __version__
from smoa_serve.engine.messages import (
    Answer,
    Committed,
    LeftOut,
    Merged,
    ReadyReport,
    Removed,
    Residence,
    StageReport,
    Undone,
    WorkerStatus,
    raised,
)
from smoa_serve.errors import AdapterBusyError, AdapterError
from smoa_serve.settings import OthersGet

logger = logging.getLogger(__name__)


def _answering(method: Callable[..., Answer]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(method)
    def answer(worker: Any, *arguments: Any) -> dict[str, Any]:
        try:
            return method(worker, *arguments).to_wire()
        except Exception as error:
            logger.exception("%s failed on a worker", method.__name__)
            return raised(error)

    return answer


@_answering
def smoa_status(worker: Any) -> WorkerStatus:
    """What one worker knows."""
    if worker.lora_config is None:
        return WorkerStatus(__version__, lora=False)
    workers_manager = worker.model_runner.lora_manager
    if not _is_ours(workers_manager):
        refusal = f"vLLM's own {type(workers_manager).__name__} manages the adapters"
        return WorkerStatus(__version__, lora=True, refusal=refusal)
    status: WorkerStatus = _manager(worker).status()
    return status


@_answering
def smoa_ready(worker: Any, requests: Collection[Any]) -> ReadyReport:
    """Bring adapters into slots; see `SmoaWorkerManager.ready`.

    Args:
        worker: vLLM's.
        requests: LoRA requests of all adapters of the next step, or of one that is loaded.
    """
    workers_manager = worker.model_runner.lora_manager
    if not _is_ours(workers_manager):  # vLLM's own loads inside the step
        return ReadyReport({}, {request.lora_int_id: request.lora_path for request in requests})
    return ReadyReport(workers_manager.ready(requests), workers_manager.active)


@_answering
def smoa_remove(worker: Any, lora_int_id: int) -> Removed:
    """Forget an adapter."""
    return Removed(worker.model_runner.lora_manager.remove_adapter(lora_int_id))


@_answering
def smoa_leave_out(worker: Any, lora_int_ids: Collection[int]) -> LeftOut:
    """Forget adapters that another worker could not bring into a slot; the step that is next has none of theirs."""
    worker.model_runner.lora_manager.leave_out(lora_int_ids)
    return LeftOut()


@_answering
def smoa_merged(worker: Any) -> Merged:
    """What is merged into this worker's weights."""
    merger = _manager(worker).mover.merger
    return Merged(merger.lora_id if merger.merged else None)


@_answering
def smoa_stage(worker: Any, lora_int_id: int, target: str, budget_s: float) -> StageReport:
    """Work for about `budget_s` towards an adapter being merged or resident. Called again and again between steps, so
    that no running request waits for longer. A worker on which it fails has undone it.

    Args:
        worker: vLLM's.
        lora_int_id: of the adapter.
        target: "merged" or "resident".
        budget_s: seconds.
    """
    try:
        report: StageReport = _manager(worker).mover.stage(lora_int_id, Residence(target), budget_s)
        return report
    except AdapterError as error:
        return StageReport(refused=error.reasons, lasting=not isinstance(error, AdapterBusyError))
    except Exception as error:
        logger.exception("Adapter %d could not be made %s", lora_int_id, target)
        return StageReport(failed=f"{type(error).__name__}: {error}")


@_answering
def smoa_commit(worker: Any, lora_int_id: int, target: str, policy: str) -> Committed:
    """Let the staged adapter be there from the next step on; see `Mover.commit`."""
    return Committed(_manager(worker).mover.commit(lora_int_id, Residence(target), OthersGet(policy)))


@_answering
def smoa_undo(worker: Any, lora_int_id: int, target: str | None = None) -> Undone:
    """Bring an adapter back to its slot; see `Mover.undo`."""
    _manager(worker).mover.undo(lora_int_id, target and Residence(target))
    return Undone()


METHODS = (smoa_status, smoa_ready, smoa_remove, smoa_leave_out, smoa_merged, smoa_stage, smoa_commit, smoa_undo)


def _is_ours(workers_manager: Any) -> bool:
    from smoa_serve.engine.worker import SmoaWorkerManager

    return isinstance(workers_manager, SmoaWorkerManager)


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager
