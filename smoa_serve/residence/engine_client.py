"""The engine as the API server has it: calls that end when it does, and the requests that enter it, counted."""

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from time import monotonic
from typing import Any, TypeVar

from smoa_serve.engine.messages import Answer
from smoa_serve.errors import EngineGoneError, SeveralProcessesError

Result = TypeVar("Result")
Reply = TypeVar("Reply", bound=Answer)

_ATTRIBUTE = "smoa_requests"
_LEFT = ""  # under which the requests of revisions that have left are counted
_LOOK_S = 0.5  # how often it is asked whether the engine still lives
_NOTICE_S = 0.5  # an engine that ends fails the call it is in first, and is known to have ended a little later


async def answered(engine: Any, call: Awaitable[Result], doing: str) -> Result:
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


async def ask_workers(engine: Any, kind: type[Reply], *arguments: Any) -> list[Reply]:
    """The answers of all workers of all data-parallel replicas to a method of `engine/rpc.py`; see `answered`.

    Args:
        engine: vLLM's client.
        kind: of the answers; names the method.
        arguments: of the method.

    Raises:
        EngineGoneError: the engine has ended.
        WorkerError: a worker failed.
    """
    return kind.of_workers(await answered(engine, _of_all_replicas(engine, kind.method, arguments), kind.method))


async def run_dummy_batch(engine: Any) -> None:
    """Have all workers run vLLM's own batch of nothing.

    Raises:
        EngineGoneError: the engine has ended.
    """
    method = "execute_dummy_batch"
    await answered(engine, _of_all_replicas(engine, method, ()), method)


async def _of_all_replicas(engine: Any, method: str, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
    """vLLM's own call asks every replica too, and returns what the first one says."""
    core = getattr(engine, "engine_core", None)
    replicas = getattr(core, "core_engines", ())
    if core is None or len(replicas) < 2:
        answers: list[dict[str, Any]] = await engine.collective_rpc(method, args=arguments)
        return answers
    asked = (
        core._call_utility_async("collective_rpc", method, None, arguments, None, engine=replica)
        for replica in replicas
    )
    # Every answer is waited for, so that nothing of this call still runs where it is undone.
    found = await asyncio.gather(*asked, return_exceptions=True)
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
    return [worker for workers in found if not isinstance(workers, BaseException) for worker in workers]


async def bring_in(engine: Any, request: Any) -> None:
    """Load an adapter on all workers of all replicas, or on none.

    Args:
        engine: vLLM's client.
        request: vLLM's `LoRARequest`.

    Raises:
        EngineGoneError: the engine has ended.
        Exception: what a worker raised; no worker keeps anything of it.
    """
    try:
        await answered(engine, engine.add_lora(request), "add_lora")
    except EngineGoneError:
        raise
    except BaseException:
        # Where it failed nothing is left; another replica may have it.
        await answered(engine, engine.remove_lora(request.lora_int_id), "remove_lora")
        raise


async def _ends(engine: Any) -> bool:
    """Whether the engine has ended, or is seen to within a moment."""
    until = monotonic() + _NOTICE_S
    while not engine.errored and monotonic() < until:
        await asyncio.sleep(_NOTICE_S / 10)
    return bool(engine.errored)


async def enter_request(wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `AsyncLLM.add_request`: counts the request under its adapter's engine name, and sees to it that this
    revision stays in the engine, and can be read there, until the request is among those that run."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    # A rendered request carries its adapter itself, and vLLM then goes by that one.
    lora = getattr(given.get("prompt"), "lora_request", given.get("lora_request"))
    entering: AbstractAsyncContextManager[None] = nullcontext()
    if lora is not None:
        served(engine)[lora.lora_name] += 1
        models = getattr(engine, "smoa_models", None)
        if models is not None:
            entering = models.entering(lora)
    async with entering:
        return await wrapped(*args, **kwargs)


def served(engine: Any) -> Counter[str]:
    """Engine name of a revision -> requests it got since it came."""
    counter: Counter[str] | None = getattr(engine, _ATTRIBUTE, None)
    if counter is None:
        counter = Counter()
        setattr(engine, _ATTRIBUTE, counter)
    return counter


def forget_served(engine: Any, engine_name: str) -> None:
    """Stop to count a revision that has left; the total stays."""
    counter = served(engine)
    counter[_LEFT] += counter.pop(engine_name, 0)


def in_flight(engine: Any, engine_name: str) -> int:
    """How many requests of a revision the engine still works on."""
    return sum(state.lora_name == engine_name for state in engine.output_processor.request_states.values())
