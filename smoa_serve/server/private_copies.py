"""Looks, when a request enters, whether the private copy of its adapter is what it was, and makes it again if not."""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from smoa_serve.errors import AdapterError, SmoaError
from smoa_serve.registry.revisions import Revision, visible_name
from smoa_serve.server.errors import without_private_paths
from smoa_serve.store import MANIFEST_NAME, AdapterStore, StagedAdapter

logger = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int, int], ...]


class PrivateCopies:
    """The private copies of one server's adapters.

    An adapter that is in host memory needs no copy, so what cannot be made again is no error here: a request whose
    adapter has to be read then fails in the engine, alone.

    Args:
        store: holds them.
        stage: reads an adapter from where it came, and makes its copy.
    """

    def __init__(self, store: AdapterStore, stage: Callable[[Path], StagedAdapter]) -> None:
        self._store, self._stage = store, stage
        self._known: dict[str, Signature] = {}  # engine name -> of the files when they were last read
        self._lost: dict[str, str] = {}  # engine name -> why its copy cannot be made again
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def note(self, revision: Revision) -> None:
        """An adapter whose copy was read just now is about to be served."""
        signature = _signature(revision.staged.path)
        if signature is not None:
            self._known[revision.engine_name] = signature

    async def check(self, revision: Revision) -> None:
        """A stat of each file; if anything about them changed, they are read, and made again where they are damaged."""
        name = revision.engine_name
        if self._is_known(revision):
            return
        async with self._locks.setdefault(name, asyncio.Lock()):
            if self._is_known(revision):
                return  # another request of it has looked meanwhile
            self.forget(name)
            try:
                self._known[name] = await asyncio.to_thread(self._renew, revision)
            except (SmoaError, OSError) as error:
                self._lost[name] = f"its private copy is gone or damaged, and cannot be made again: {error}"
                logger.warning("The private copy of adapter %s is gone or damaged: %s", revision.name, error)

    def forget(self, engine_name: str) -> None:
        """Read the copy in full when it is next asked for: it failed, or its adapter has left."""
        self._known.pop(engine_name, None)
        self._lost.pop(engine_name, None)

    def failed(self, engine_name: str, reason: str) -> str:
        """Takes note that an adapter could not be brought into its slot; why, and what to do.

        Args:
            engine_name: of the adapter.
            reason: what the engine says.
        """
        why = self._lost.get(engine_name, reason)
        self._known.pop(engine_name, None)
        why = without_private_paths(why, self._store.root)
        return f"{why}\nIf it stays so, load it again: POST /v1/load_lora_adapter with load_inplace"

    def _is_known(self, revision: Revision) -> bool:
        known = self._known.get(revision.engine_name)
        return known is not None and known == _signature(revision.staged.path)

    def _renew(self, revision: Revision) -> Signature:
        signature = _signature(revision.staged.path)  # before it is read: what changes then is seen the next time
        if signature is None or self._store.entry(revision.staged.path) is None:
            staged = self._stage(revision.origin)
            if staged.digest != revision.staged.digest:
                raise AdapterError(revision.name, "there is other content now where it came from")
            logger.warning("The private copy of adapter %s was gone or damaged; it was made again", revision.name)
            signature = _signature(staged.path)
        if signature is None:
            raise AdapterError(revision.name, "its private copy was gone again right after it was made")
        return signature


def _signature(folder: Path) -> Signature | None:
    """What changes when a file of a copy does; None when one is missing."""
    try:
        names = sorted({MANIFEST_NAME, *AdapterStore.FILES})
        found = [(folder / name).stat() for name in names]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in found)


def report_failures(wrapped: Callable[..., Any], processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `OutputProcessor.process_outputs`: a request whose adapter could not be brought into its slot ends
    with the reason as an error. Offline, where nobody waits for one, the reason is the answer's `stop_reason`.
    """
    from smoa_serve.engine.admission import FAILED

    outputs = args[0] if args else kwargs["engine_core_outputs"]
    failed = [one for one in outputs if isinstance(one.stop_reason, str) and one.stop_reason.startswith(FAILED)]
    pooling = []
    for output in failed:
        state = processor.request_states.get(output.request_id)
        if state is None:
            continue
        reason = output.stop_reason[len(FAILED) :]
        copies: PrivateCopies | None = getattr(processor, "smoa_copies", None)
        if copies is not None:
            reason = copies.failed(state.lora_name, reason)
        error = unavailable(f"adapter {visible_name(state.lora_name)!r} cannot be served: {reason}")
        if state.detokenizer is None:
            import torch

            output.pooling_output = torch.empty(0)  # vLLM ends no pooling request without one
        if state.queue is not None:
            state.queue.put(error)  # what vLLM puts after it is dropped
        elif state.detokenizer is None:
            pooling.append(error)
    done = wrapped(*args, **kwargs)
    if pooling:
        raise pooling[0]
    return done


def unavailable(message: str) -> Exception:
    """An error that vLLM answers with its message and 503; with 400 before it knew errors that name their status."""
    from vllm import exceptions

    graceful = getattr(exceptions, "GracefulHTTPError", None)
    error: Exception
    if graceful is not None:
        error = graceful(message, HTTPStatus.SERVICE_UNAVAILABLE)
    else:
        error = getattr(exceptions, "VLLMClientError", ValueError)(message)
    return error
