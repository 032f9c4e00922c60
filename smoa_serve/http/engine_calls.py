"""Calls of the engine that end when the engine does."""

import asyncio
from collections.abc import Awaitable
from time import monotonic
from typing import Any, TypeVar

from smoa_serve.errors import EngineGoneError, SeveralProcessesError

Answer = TypeVar("Answer")

_LOOK_S = 0.5  # how often it is asked whether the engine still lives
_NOTICE_S = 0.5  # an engine that ends fails the call it is in first, and is known to have ended a little later


async def answered(engine: Any, call: Awaitable[Answer], doing: str) -> Answer:
    """What the engine answers to a call that is no generation: `collective_rpc`, `add_lora`, `remove_lora`.

    vLLM tells generations that the engine ended, and leaves such calls without an answer for ever. A request that waits
    for one would keep the API server from ending, and so from being started again.

    Args:
        engine: vLLM's client.
        call: begun or not.
        doing: in words, for the error.

    Raises:
        EngineGoneError: the engine has ended.
    """
    future = asyncio.ensure_future(call)
    while not (await asyncio.wait({future}, timeout=_LOOK_S))[0]:
        if engine.errored:
            future.cancel()
            raise EngineGoneError(_gone(doing))
    error = future.exception()
    if error is not None and await _ends(engine):
        raise EngineGoneError(_gone(doing)) from error
    return future.result()


def _gone(doing: str) -> str:
    return f"the engine ended, and {doing} with it; restart the server"


def several_processes(engine: Any) -> bool:
    """Whether other API server processes share the engine (`--api-server-count`)."""
    return bool(engine.vllm_config.parallel_config._api_process_count > 1)


def check_one_process(engine: Any, consequence: str) -> None:
    """Refuse a change that only this process would see.

    Args:
        engine: vLLM's client.
        consequence: what does not happen, in words.

    Raises:
        SeveralProcessesError: there are others.
    """
    if several_processes(engine):
        count = engine.vllm_config.parallel_config._api_process_count
        raise SeveralProcessesError(
            f"{consequence}: {count} API server processes share the engine and do not tell each other yet. Name "
            "adapters at start, or start with --api-server-count 1"
        )


async def ask_workers(engine: Any, method: str, *arguments: Any) -> list[dict[str, Any]]:
    """The answers of all workers to a method of `engine/rpc.py`; see `answered`."""
    call: Awaitable[list[dict[str, Any]]] = engine.collective_rpc(method, args=arguments)
    return await answered(engine, call, method)


async def _ends(engine: Any) -> bool:
    """Whether the engine has ended, or is seen to within a moment."""
    until = monotonic() + _NOTICE_S
    while not engine.errored and monotonic() < until:
        await asyncio.sleep(_NOTICE_S / 10)
    return bool(engine.errored)
