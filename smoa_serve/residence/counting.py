"""The requests of each adapter revision, seen where every request enters the engine."""

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

_ATTRIBUTE = "smoa_requests"
_LEFT = ""  # under which the requests of revisions that have left are counted


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
