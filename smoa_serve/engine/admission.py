"""In the engine core: no step begins before its adapters are in their slots, and one that cannot be brought there fails
its own requests alone.

In stock vLLM a worker loads adapters inside the step, where any failure ends the engine for everybody.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from smoa_serve.engine.compat import check_signatures

logger = logging.getLogger(__name__)

# Begins `stop_reason` of a request that ended so; what follows is the reason.
FAILED = "smoa-serve: "
_ATTRIBUTE = "smoa_admission"


class AdapterAdmission:
    """Between the scheduler and the workers of one engine core.

    Args:
        core: vLLM's; changed in place.
    """

    def __init__(self, core: Any) -> None:
        self._scheduler, self._executor = core.scheduler, core.model_executor
        _check_seams(self._scheduler)
        self._schedule, self._update = self._scheduler.schedule, self._scheduler.update_from_output
        # What is in the slots of all workers, number -> path; None when something else may have changed it.
        self._active: dict[int, str] | None = None
        self._failed: dict[str, str] = {}  # request -> reason
        self._scheduler.schedule = self.schedule
        self._scheduler.update_from_output = self.update_from_output
        for name in ("add_lora", "remove_lora", "pin_lora", "collective_rpc"):
            setattr(core, name, self._noticed(getattr(core, name)))

    def _noticed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that may change what is in the slots."""

        @wraps(call)  # vLLM goes by its annotations
        def noticed(*args: Any, **kwargs: Any) -> Any:
            self._active = None
            return call(*args, **kwargs)

        return noticed

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's, and then the adapters of what it chose are made ready."""
        output = self._schedule(*args, **kwargs)
        new = {one.req_id for one in output.scheduled_new_reqs}
        wanted: dict[int, LoRARequest] = {}
        for request_id in output.num_scheduled_tokens:  # running requests come first: they keep their number
            lora = self._scheduler.requests[request_id].lora_request
            if lora is None:
                continue
            if lora.load_inplace and request_id not in new:
                lora = msgspec.structs.replace(lora, load_inplace=False)  # it was, in the request's first step
            first = wanted.setdefault(lora.lora_int_id, lora)
            if first.lora_path != lora.lora_path:
                reason = f"its number {lora.lora_int_id} is in use by {first.lora_name!r}; give each its own"
                self._fail(request_id, reason)
        if not self._are_ready(wanted):
            self._make_ready(output, wanted)
        return output

    def _are_ready(self, wanted: dict[int, LoRARequest]) -> bool:
        active = self._active
        if active is None:
            return not wanted
        return all(active.get(number) == lora.lora_path and not lora.load_inplace for number, lora in wanted.items())

    def _make_ready(self, output: Any, wanted: dict[int, LoRARequest]) -> None:
        answers = self._executor.collective_rpc("smoa_ready", args=(list(wanted.values()),))
        reasons: dict[int, str] = {}
        for answer in answers:
            reasons |= answer["failed"]
        first, *others = (answer["active"].items() for answer in answers)
        # After a failure the workers are asked again with the next step: what they leave out is for this one only.
        self._active = None if reasons else dict(set(first).intersection(*others))
        for request_id in output.num_scheduled_tokens:
            lora = self._scheduler.requests[request_id].lora_request
            if lora is not None and lora.lora_int_id in reasons:
                self._fail(request_id, reasons[lora.lora_int_id])

    def _fail(self, request_id: str, reason: str) -> None:
        """End a request when the step is over, as if its client had hung up meanwhile. What the step leaves in its
        blocks is not its adapter's: no other request may find it."""
        self._failed.setdefault(request_id, reason)
        manager = self._scheduler.kv_cache_manager
        blocks = {block for group in manager.get_block_ids(request_id) for block in group}
        manager.evict_blocks(blocks)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The scheduler's, without the requests that failed; their clients hear why."""
        ended: list[tuple[Any, str]] = []
        for request_id in [one for one in self._failed if one in scheduler_output.num_scheduled_tokens]:
            reason = self._failed.pop(request_id)
            request = self._scheduler.requests.get(request_id)
            if request is not None and not request.is_finished():
                self._scheduler.finish_requests([request_id], RequestStatus.FINISHED_ERROR)
                ended.append((request, reason))
        outputs = self._update(scheduler_output, model_runner_output)
        for request, reason in ended:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=FAILED + reason,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(output)
        return outputs


def _check_seams(scheduler: Any) -> None:
    check_signatures(
        {
            "Scheduler.update_from_output": (
                scheduler.update_from_output,
                ("scheduler_output", "model_runner_output"),
            ),
            "Scheduler.finish_requests": (scheduler.finish_requests, ("request_ids", "finished_status")),
            "KVCacheManager.evict_blocks": (scheduler.kv_cache_manager.evict_blocks, ("block_ids",)),
        }
    )


def admit(wrapped: Callable[..., Any], core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `EngineCore.step` and `step_with_batch_queue`: with the first step, as vLLM loads its plugins when
    the core's `__init__` has begun."""
    if not hasattr(core, _ATTRIBUTE):
        setattr(core, _ATTRIBUTE, AdapterAdmission(core) if core.vllm_config.lora_config is not None else None)
    return wrapped(*args, **kwargs)
