"""Requests that the engine ended because their adapter could not be brought into a slot."""

from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

from smoa_serve.errors import NOT_IN_A_SLOT


async def tell_failures(
    wrapped: Callable[..., AsyncIterator[Any]], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    """A wrapper of `AsyncLLM.generate`: what the engine core said of such a request reaches its client.

    vLLM says "Internal server error" for any request that ended in an error.

    Raises:
        GenerationError: vLLM's, answered with 503 and the reason; a stream that has begun ends with it.
    """
    async for output in wrapped(*args, **kwargs):
        for part in output.outputs:
            if part.finish_reason == "error" and str(part.stop_reason).startswith(NOT_IN_A_SLOT):
                raise _generation_error(str(part.stop_reason))
        yield output


def _generation_error(reason: str) -> Exception:
    try:
        from vllm.exceptions import GenerationError
    except ImportError:  # up to 0.31
        from vllm.entrypoints.openai.engine.protocol import GenerationError

    error: Exception = GenerationError(f"{reason}. Nothing was answered; ask again, or load the adapter again.")
    error.status_code = HTTPStatus.SERVICE_UNAVAILABLE  # type: ignore[attr-defined]
    return error
