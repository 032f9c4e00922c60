"""Every error that can reach HTTP has a status there, and none tells a private path."""

import inspect
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from smoa_serve import errors
from smoa_serve.errors import AdapterError, SmoaError
from smoa_serve.server.errors import STATUS, register, returned

STORE = Path("/var/lib/smoa store")
COPY = f"{STORE}/smoa-0123abcd-feed"
# They end a command or the start of a server, or are the policy's own.
NEVER_OVER_HTTP = {"CompatibilityError", "ConfigError", "MergeLossError", "MoveAbandonedError"}
CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SmoaError)]


def made(cls: type[SmoaError], text: str = "no room") -> SmoaError:
    return cls("legal", [text]) if issubclass(cls, AdapterError) else cls(text)


def client_of(error: SmoaError) -> TestClient:
    app = FastAPI()
    app.state.openai_serving_models = SimpleNamespace(store=SimpleNamespace(root=STORE))
    register(app)

    @app.get("/raises")
    async def raises() -> None:
        raise error

    return TestClient(app)


def test_every_error_has_a_status_or_never_reaches_http() -> None:
    assert {cls.__name__ for cls in CLASSES} == {cls.__name__ for cls in STATUS} | NEVER_OVER_HTTP
    assert not {cls.__name__ for cls in STATUS} & NEVER_OVER_HTTP


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_a_route_raises_is_answered_with_its_status_and_its_message(cls: type[SmoaError]) -> None:
    error = made(cls)
    response = client_of(error).get("/raises")
    assert response.status_code == STATUS.get(cls, HTTPStatus.INTERNAL_SERVER_ERROR)
    body = response.json()["error"]
    assert (body["message"], body["type"], body["code"]) == (str(error), cls.__name__, response.status_code)


def test_an_error_of_another_module_has_the_status_of_its_nearest_ancestor() -> None:
    class NewRefusalError(errors.MoveRefusedError):
        pass

    assert client_of(made(NewRefusalError)).get("/raises").status_code == HTTPStatus.CONFLICT


@pytest.mark.anyio
@pytest.mark.parametrize("cls", list(STATUS), ids=lambda cls: cls.__name__)
async def test_a_method_that_vllm_calls_returns_the_same(cls: type[SmoaError]) -> None:
    error = made(cls)

    @returned
    async def load(models: Any) -> Any:
        raise error

    answer = await load(SimpleNamespace(store=SimpleNamespace(root=STORE)))
    assert answer.model_dump() == client_of(error).get("/raises").json()


@pytest.mark.parametrize("cls", list(STATUS), ids=lambda cls: cls.__name__)
def test_no_message_tells_where_a_private_copy_lies(cls: type[SmoaError]) -> None:
    error = made(cls, f"{COPY}/adapter_model.safetensors: unexpected end of '{COPY}'")
    message = client_of(error).get("/raises").json()["error"]["message"]
    assert str(STORE) not in message
    assert "its private copy: unexpected end of 'its private copy'" in message
