"""A running server as the command line sees it."""

from typing import Any

import httpx
from pydantic import SecretStr

from ..errors import SmoaError

# Loading reads and checks the whole adapter; a large one takes its time.
TIMEOUT_S = 600.0


class ServerError(SmoaError):
    """The server could not be reached, or said no."""


class ServerClient:
    """The routes that manage adapters.

    Args:
        url: of the server, with or without /v1.
        api_key: what the server was started with.
    """

    def __init__(self, url: str, api_key: SecretStr | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S)

    def adapters(self) -> list[dict[str, Any]]:
        """Every adapter the server can be asked for, as GET /v1/smoa/adapters describes it."""
        response = self._request("GET", "/v1/smoa/adapters", None)
        if response.status_code == httpx.codes.NOT_FOUND:
            raise ServerError(f"{self.url} is no server of this project: it has no /v1/smoa/adapters")
        data: list[dict[str, Any]] = self._checked(response).json()["data"]
        return data

    def models(self) -> list[dict[str, Any]]:
        """The base and every adapter, as GET /v1/models lists them; any vLLM server has it."""
        data: list[dict[str, Any]] = self._checked(self._request("GET", "/v1/models", None)).json()["data"]
        return data

    def load(self, name: str, path: str, *, in_place: bool) -> str:
        """Load an adapter from a path on the server; returns what the server says."""
        body = {"lora_name": name, "lora_path": path, "load_inplace": in_place}
        return self._checked(self._request("POST", "/v1/load_lora_adapter", body)).text

    def unload(self, name: str) -> str:
        """Unload an adapter; returns what the server says."""
        return self._checked(self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})).text

    def move(self, name: str, target: str, options: dict[str, object] | None = None) -> dict[str, Any]:
        """Move an adapter up or down the ladder of residence; returns what it took.

        Args:
            name: of the adapter.
            target: merge, unmerge, resident, slot, pin or unpin.
            options: of a merge.
        """
        response = self._request("POST", f"/v1/smoa/adapters/{name}/{target}", options)
        moved: dict[str, Any] = self._checked(response).json()
        return moved

    def _request(self, method: str, route: str, body: dict[str, object] | None) -> httpx.Response:
        try:
            return self._client.request(method, route, json=body)
        except httpx.ConnectError as error:
            raise ServerError(
                f"nothing answers at {self.url} ({error}); is the server running, and --url right?"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{method} {self.url}{route} failed: {type(error).__name__}: {error}") from None

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise ServerError(f"{self.url} wants another API key; give it with --api-key or SMOA_API_KEY")
        raise ServerError(f"{self.url} refused ({response.status_code}): {_message(response)}")


def _message(response: httpx.Response) -> str:
    """The text of an OpenAI-style error, or whatever the body is."""
    try:
        body = response.json()
    except ValueError:
        return response.text or response.reason_phrase
    if not isinstance(body, dict):
        return str(body)
    error = body.get("error", body)
    return str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
