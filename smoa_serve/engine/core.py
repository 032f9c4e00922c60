"""The engine core's part: adapters are in their slots before a step is scheduled, and one that cannot be fails alone.

vLLM brings an adapter into a slot inside the step that needs it. What is raised there (memory, a damaged file) ends the
engine for everybody, and a worker that returns nothing for a step cannot say so. So the core asks all workers first.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from uuid import uuid4

from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from smoa_serve.errors import NOT_IN_A_SLOT, AdapterError, WorkerError, raised_or

logger = logging.getLogger(__name__)

_GATE = "smoa_gate"
# Calls of all workers that move no adapter.
_WITHOUT_MOVES = frozenset({"smoa_status", "smoa_merged"})


class AdapterGate:
    """What the engine core knows of the adapters of its workers.

    Args:
        core: vLLM's engine core.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        # In a slot on every worker, as far as is known: adapters move when workers are called, never by themselves.
        self._ready: frozenset[int] = frozenset()
        # An adapter may be merged: blocks in the prefix cache may hold what was computed on its weights.
        self._tainted = False

    def forget_ready(self) -> None:
        """Workers were called for something that may have moved adapters."""
        self._ready = frozenset()

    def let_in(self) -> dict[int, Any]:
        """Bring the adapters of the next step into slots; finish the requests of those that cannot be.

        Returns:
            client -> vLLM's `EngineCoreOutputs` of the requests that ended so.
        """
        if self._core.vllm_config.lora_config is None:
            return {}
        wanted = _next_adapters(self._core.scheduler, self._core.vllm_config.lora_config.max_loras)
        if wanted.keys() <= self._ready:
            return {}
        failed = self.bring(wanted.values())
        return self._finish(failed) if failed else {}

    def bring(self, requests: Iterable[LoRARequest]) -> dict[int, list[str]]:
        """Bring adapters into slots on every worker, all or none of each.

        Returns:
            lora_int_id -> why it is on no worker now, for those that failed on one.
        """
        self.forget_ready()
        answers = self.call("smoa_bring", list(requests))
        failed: dict[int, list[str]] = {}
        for answer in answers:
            for number, reasons in answer["failed"].items():
                failed.setdefault(number, []).extend(r for r in reasons if r not in failed.get(number, []))
        for number in failed:
            # Those that have it give it up: the next try begins afresh everywhere.
            try:
                self.call("smoa_remove", number)
            except WorkerError:
                logger.exception("A worker keeps what it has of adapter %d", number)
        self._ready = frozenset.intersection(*(frozenset(answer["active"]) for answer in answers)) - failed.keys()
        return failed

    def _finish(self, failed: dict[int, list[str]]) -> dict[int, Any]:
        scheduler = self._core.scheduler
        ended = {
            request.request_id: request
            for request in scheduler.requests.values()
            if request.lora_request is not None and request.lora_request.lora_int_id in failed
        }
        scheduler.finish_requests(list(ended), RequestStatus.FINISHED_ERROR)
        by_client: dict[int, list[Any]] = defaultdict(list)
        for request in ended.values():
            reason = f"{NOT_IN_A_SLOT}: {'; '.join(failed[request.lora_request.lora_int_id])}"
            logger.error("Request %s of %s ends: %s", request.request_id, request.lora_request.lora_name, reason)
            by_client[request.client_index].append(
                EngineCoreOutput(
                    request.request_id, [], finish_reason=request.get_finished_reason(), stop_reason=reason
                )
            )
        return {
            client: EngineCoreOutputs(outputs=outputs, finished_requests={output.request_id for output in outputs})
            for client, outputs in by_client.items()
        }

    def may_taint(self) -> None:
        """An adapter may be merged from now on."""
        self._tainted = True

    def clean(self) -> None:
        """Where nothing is merged any more, nothing that was computed on merged weights is found in the prefix cache:
        rounded into the model's dtype, they are not quite the base's plus the update."""
        if not self._tainted or any(answer["merged"] is not None for answer in self.call("smoa_merged")):
            return
        scheduler = self._core.scheduler
        scheduler.kv_cache_manager.evict_blocks(set(range(len(scheduler.kv_cache_manager.block_pool.blocks))))
        for request in scheduler.running:
            # What it adds to the cache rests on such blocks.
            request.cache_salt = uuid4().hex
            request.block_hashes.clear()
            request.update_block_hashes()
        self._tainted = False

    def call(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        """Ask all workers.

        Raises:
            WorkerError: one failed.
        """
        return raised_or(self._core.model_executor.collective_rpc(method, args=arguments), method)


def gate_of(core: Any) -> AdapterGate:
    """The gate of an engine core."""
    gate: AdapterGate | None = getattr(core, _GATE, None)
    if gate is None:
        gate = AdapterGate(core)
        setattr(core, _GATE, gate)
    return gate


def _next_adapters(scheduler: Any, most: int) -> dict[int, LoRARequest]:
    """Adapters that the next step may have: those of running requests, then of waiting ones in their order, as many as
    there are slots and as requests can be admitted."""
    found = {
        request.lora_request.lora_int_id: request.lora_request
        for request in scheduler.running
        if request.lora_request is not None
    }
    places = scheduler.max_num_running_reqs - len(scheduler.running)
    for request in _waiting(scheduler):
        if places <= 0 or len(found) >= most:
            break
        places -= request.status is RequestStatus.WAITING
        if request.lora_request is not None:
            found.setdefault(request.lora_request.lora_int_id, request.lora_request)
    return found


def _waiting(scheduler: Any) -> Iterator[Any]:
    """Waiting requests, those first that vLLM looks at first; releases differ in which queues there are."""
    for name in ("kv_holding_waiting", "skipped_waiting", "waiting"):
        yield from getattr(scheduler, name, ())


def step(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """A wrapper of `EngineCore.step` and `step_with_batch_queue`."""
    ended = gate_of(core).let_in()
    outputs, executed = wrapped(*args, **kwargs)
    if not ended:
        return outputs, executed
    outputs = outputs or {}
    for client, failed in ended.items():
        if client in outputs:
            outputs[client].outputs = [*outputs[client].outputs, *failed.outputs]
            outputs[client].finished_requests = (outputs[client].finished_requests or set()) | failed.finished_requests
        else:
            outputs[client] = failed
    return outputs, executed


def add_lora(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """In place of `EngineCore.add_lora`: on all workers or on none.

    Raises:
        AdapterError: every reason of every worker.
    """
    request: LoRARequest = args[0] if args else kwargs["lora_request"]
    failed = gate_of(core).bring([request])
    gate_of(core).clean()  # content in place of what was merged
    if failed:
        raise AdapterError(request.lora_name, failed[request.lora_int_id])
    return True


def remove_lora(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """In place of `EngineCore.remove_lora`.

    Raises:
        WorkerError: a worker could not; the others have removed it.
    """
    gate = gate_of(core)
    gate.forget_ready()
    try:
        return any(answer["removed"] for answer in gate.call("smoa_remove", args[0] if args else kwargs["lora_id"]))
    finally:
        gate.clean()


def collective_rpc(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """A wrapper of `EngineCore.collective_rpc`."""
    gate, method = gate_of(core), args[0] if args else kwargs["method"]
    if method not in _WITHOUT_MOVES:
        gate.forget_ready()
    if method == "smoa_merge":
        gate.may_taint()
    try:
        return wrapped(*args, **kwargs)
    finally:
        if method == "smoa_demote":
            gate.clean()


def moves(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """A wrapper of other methods of `EngineCore` that may move adapters."""
    gate_of(core).forget_ready()
    return wrapped(*args, **kwargs)
