"""How many requests each adapter revision got, counted where every request enters the engine."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

_ATTRIBUTE = "smoa_requests"


def count_requests(wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A wrapper of `AsyncLLM.add_request`: counts the request under its adapter's engine name, then goes on."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    # A rendered request carries its adapter itself, and vLLM then goes by that one.
    lora = getattr(given["prompt"], "lora_request", given.get("lora_request"))
    if lora is not None:
        served(engine)[lora.lora_name] += 1
    return wrapped(*args, **kwargs)


def served(engine: Any) -> Counter[str]:
    """Engine name of a revision -> requests it got since the server started."""
    counter: Counter[str] | None = getattr(engine, _ATTRIBUTE, None)
    if counter is None:
        counter = Counter()
        setattr(engine, _ATTRIBUTE, counter)
    return counter


def in_flight(engine: Any, engine_name: str) -> int:
    """How many requests of a revision the engine still works on."""
    return sum(state.lora_name == engine_name for state in engine.output_processor.request_states.values())
