"""How an error of ours is answered over HTTP: one mapping, one form, one handler. Routes raise."""

import functools
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from smoa_serve.errors import (
    AdapterBusyError,
    AdapterError,
    AdapterNotFoundError,
    BaseModelError,
    EngineGoneError,
    MoveFailedError,
    MoveRefusedError,
    PathNotAllowedError,
    SeveralProcessesError,
    SmoaError,
    SourceUnavailableError,
    StorageError,
    WorkerError,
)

# Of each class that can reach HTTP; a class without an entry has its nearest ancestor's.
STATUS: dict[type[SmoaError], HTTPStatus] = {
    AdapterError: HTTPStatus.BAD_REQUEST,
    PathNotAllowedError: HTTPStatus.FORBIDDEN,
    AdapterNotFoundError: HTTPStatus.NOT_FOUND,
    AdapterBusyError: HTTPStatus.CONFLICT,
    MoveRefusedError: HTTPStatus.CONFLICT,
    SmoaError: HTTPStatus.INTERNAL_SERVER_ERROR,
    BaseModelError: HTTPStatus.INTERNAL_SERVER_ERROR,
    MoveFailedError: HTTPStatus.INTERNAL_SERVER_ERROR,
    WorkerError: HTTPStatus.INTERNAL_SERVER_ERROR,
    SeveralProcessesError: HTTPStatus.NOT_IMPLEMENTED,
    EngineGoneError: HTTPStatus.SERVICE_UNAVAILABLE,
    SourceUnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageError: HTTPStatus.INSUFFICIENT_STORAGE,
}


def error_response(error: SmoaError, store: Path) -> Any:
    """vLLM's `ErrorResponse` for an error.

    Args:
        error: its class decides the status.
        store: folder of the private copies, whose paths are not told.
    """
    from vllm.entrypoints.openai.models import serving

    status = next(STATUS[each] for each in type(error).__mro__ if each in STATUS)
    message = without_private_paths(str(error), store)
    return serving.create_error_response(message=message, err_type=type(error).__name__, status_code=status)


def without_private_paths(text: str, store: Path) -> str:
    """Without the paths of private copies, which nobody gave."""
    return re.sub(rf"{re.escape(str(store))}/[^\s'\",:;)]*", "its private copy", text)


def json_response(answer: Any) -> JSONResponse:
    """An `ErrorResponse` as it is sent."""
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)


def returned(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A method that vLLM calls on its models and expects to return errors: those of ours that it raises it returns."""

    @functools.wraps(method)
    async def answer(models: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await method(models, *args, **kwargs)
        except SmoaError as error:
            return error_response(error, models.store.root)

    return answer


async def _handle(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SmoaError)
    return json_response(error_response(error, request.app.state.openai_serving_models.store.root))


def register(app: FastAPI) -> None:
    """Let an app answer the errors that its routes raise."""
    app.add_exception_handler(SmoaError, _handle)
