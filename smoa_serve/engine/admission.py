"""In the engine core: no step begins before its adapters are in their slots, and one that cannot be brought there fails
its own requests alone.

In stock vLLM a worker loads adapters inside the step, where any failure ends the engine for everybody. The core also
sees every call that moves adapters, and keeps the prefix cache free of what merged weights left in it.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from smoa_serve.engine.host.compat import check_signatures
from smoa_serve.engine.messages import Answer, Committed, LeftOut, Merged, ReadyReport, Removed, Undone, WorkerStatus
from smoa_serve.errors import AdapterError

logger = logging.getLogger(__name__)

# Begins `stop_reason` of a request that ended so; what follows is the reason.
FAILED = "smoa-serve: "
_ATTRIBUTE = "smoa_admission"
# Calls of all workers that move no adapter.
_WITHOUT_MOVES = frozenset({WorkerStatus.method, Merged.method})
Reply = TypeVar("Reply", bound=Answer)


class AdapterAdmission:
    """Between the scheduler and the workers of one engine core.

    Args:
        core: vLLM's, with adapters enabled; its scheduler is changed in place.
    """

    def __init__(self, core: Any) -> None:
        self._scheduler, self._executor = core.scheduler, core.model_executor
        _check_seams(self._scheduler)
        self._schedule, self._update = self._scheduler.schedule, self._scheduler.update_from_output
        # What is in the slots of all workers, number -> path; None when something else may have changed it.
        self._active: dict[int, str] | None = None
        self._failed: dict[str, str] = {}  # request -> reason
        # An adapter may be merged: blocks in the prefix cache may hold what was computed on its weights.
        self._tainted = False
        self._scheduler.schedule = self.schedule
        self._scheduler.update_from_output = self.update_from_output

    def notice(self) -> None:
        """What is in the slots may have changed."""
        self._active = None

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
        reasons = self.bring(wanted.values())
        for request_id in output.num_scheduled_tokens if reasons else ():
            lora = self._scheduler.requests[request_id].lora_request
            if lora is not None and lora.lora_int_id in reasons:
                self._fail(request_id, "; ".join(reasons[lora.lora_int_id]))

    def bring(self, requests: Collection[LoRARequest]) -> dict[int, list[str]]:
        """Bring adapters into slots on every worker, each on all of them or on none.

        Args:
            requests: of as many adapters as there are slots at most.

        Returns:
            lora_int_id -> every reason of every worker, for those that failed: the next step has none of theirs.
        """
        self.notice()
        answers = self.call(ReadyReport, list(requests))
        reasons: dict[int, list[str]] = {}
        for answer in answers:
            for number, found in answer.failed.items():
                known = reasons.setdefault(number, [])
                known.extend(reason for reason in found if reason not in known)
        if reasons:
            # Those that have one give it up: the next try begins afresh everywhere. What is in the slots is asked for
            # again with the next step.
            self.call(LeftOut, list(reasons))
        else:
            first, *others = (answer.active.items() for answer in answers)
            self._active = dict(set(first).intersection(*others))
        return reasons

    def _fail(self, request_id: str, reason: str) -> None:
        """End a request when the step is over, as if its client had hung up meanwhile."""
        self._failed.setdefault(request_id, reason)
        self._evict_blocks_of(request_id)

    def _evict_blocks_of(self, request_id: str) -> None:
        """What the step leaves in its blocks is not its adapter's: no other request may find it."""
        manager = self._scheduler.kv_cache_manager
        manager.evict_blocks({block for group in manager.get_block_ids(request_id) for block in group})

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The scheduler's, without the requests that failed; their clients hear why."""
        ended: list[tuple[Any, str]] = []
        for request_id in [one for one in self._failed if one in scheduler_output.num_scheduled_tokens]:
            reason = self._failed.pop(request_id)
            request = self._scheduler.requests.get(request_id)
            if request is not None and not request.is_finished():
                self._evict_blocks_of(request_id)  # also of a step that was scheduled meanwhile
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

    def may_taint(self) -> None:
        """An adapter may be merged from now on."""
        self._tainted = True

    def clean(self) -> None:
        """Where nothing is merged any more, nothing that was computed on merged weights is found in the prefix cache:
        rounded into the model's dtype, they are not quite the base's plus the update."""
        if not self._tainted or any(answer.merged is not None for answer in self.call(Merged)):
            return
        manager = self._scheduler.kv_cache_manager
        manager.evict_blocks(set(range(len(manager.block_pool.blocks))))
        for request in self._scheduler.running:
            # What it adds to the cache rests on such blocks.
            request.cache_salt = uuid4().hex
            request.block_hashes.clear()
            request.update_block_hashes()
        self._tainted = False

    def call(self, kind: type[Reply], *arguments: Any) -> list[Reply]:
        """Ask all workers.

        Raises:
            WorkerError: one failed.
        """
        return kind.of_workers(self._executor.collective_rpc(kind.method, args=arguments))


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


def _admission(core: Any) -> AdapterAdmission | None:
    """Of an engine core; None where adapters are not enabled. Made at need: vLLM loads its plugins when the core's
    `__init__` has begun."""
    if not hasattr(core, _ATTRIBUTE):
        setattr(core, _ATTRIBUTE, AdapterAdmission(core) if core.vllm_config.lora_config is not None else None)
    admission: AdapterAdmission | None = getattr(core, _ATTRIBUTE)
    return admission


def step(wrapped: Callable[..., Any], core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `EngineCore.step` and `step_with_batch_queue`: its scheduler is watched from the first step on."""
    _admission(core)
    return wrapped(*args, **kwargs)


def add_lora(wrapped: Callable[..., Any], core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place of `EngineCore.add_lora`: on all workers or on none.

    Raises:
        AdapterError: every reason of every worker.
    """
    admission = _admission(core)
    if admission is None:
        return wrapped(*args, **kwargs)  # refused there
    request: LoRARequest = args[0] if args else kwargs["lora_request"]
    failed = admission.bring([request])
    admission.clean()  # its content may take the place of what was merged
    if failed:
        raise AdapterError(request.lora_name, failed[request.lora_int_id])
    return True


def remove_lora(wrapped: Callable[..., Any], core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place of `EngineCore.remove_lora`.

    Raises:
        WorkerError: a worker could not; the others have removed it.
    """
    admission = _admission(core)
    if admission is None:
        return wrapped(*args, **kwargs)
    admission.notice()
    try:
        return any(answer.removed for answer in admission.call(Removed, args[0] if args else kwargs["lora_id"]))
    finally:
        admission.clean()


def collective_rpc(wrapped: Callable[..., Any], core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `EngineCore.collective_rpc`."""
    admission, method = _admission(core), args[0] if args else kwargs["method"]
    if admission is None or method in _WITHOUT_MOVES:
        return wrapped(*args, **kwargs)
    admission.notice()
    if method == Committed.method:
        admission.may_taint()
    try:
        return wrapped(*args, **kwargs)
    finally:
        if method == Undone.method:
            admission.clean()


def moves(wrapped: Callable[..., Any], core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of other methods of `EngineCore` that may move adapters."""
    admission = _admission(core)
    if admission is not None:
        admission.notice()
    return wrapped(*args, **kwargs)
