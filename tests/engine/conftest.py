"""Real vLLM servers for the tests: a subprocess each, reached over HTTP with the official client."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_TIMEOUT_S = 240


@dataclass
class Server:
    """A running server.

    Attributes:
        url: without /v1.
        log: everything it printed.
        process: the API server.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def client(self, **kwargs: Any) -> Any:
        """An OpenAI client that does not retry: a failure must be seen."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=kwargs.pop("api_key", "none"), max_retries=0, **kwargs)

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120) -> httpx.Response:
        """POST JSON."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=timeout_s)

    def adapters(self) -> dict[str, dict[str, Any]]:
        """GET /v1/smoa/adapters by name."""
        response = httpx.get(f"{self.url}/v1/smoa/adapters", timeout=30)
        response.raise_for_status()
        return {entry["name"]: entry for entry in response.json()["data"]}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_environment(folder: Path, **extra: str) -> dict[str, str]:
    """The environment of a test server: its own store and order cache, no hub, a small KV cache."""
    return os.environ | {
        "VLLM_PLUGINS": "smoa_serve",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "SMOA_STORE_DIR": str(folder / "store"),
        "SMOA_CACHE_DIR": str(folder / "cache"),
        **extra,
    }


@contextmanager
def run_server(
    base: Path, folder: Path, *arguments: str, environment: dict[str, str] | None = None, command: str = "vllm"
) -> Iterator[Server]:
    """`vllm serve BASE …` (or `smoa-serve serve …`) until the block ends."""
    port = free_port()
    log = folder / f"server-{port}.log"
    executable = Path(sys.executable).parent / command
    line = [str(executable), "serve", str(base), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            line,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment or vllm_environment(folder),
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield Server(f"http://127.0.0.1:{port}", log, process)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-6000:]}")
        try:
            if httpx.get(health, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start in {START_TIMEOUT_S} s:\n{log.read_text()[-6000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait(timeout=30)


TINY_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--enable-lora")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers that live until the session ends."""
    with ExitStack() as stack:

        def start_one(base: Path, *arguments: str, **environment: str) -> Server:
            folder = tmp_path_factory.mktemp("server")
            return stack.enter_context(
                run_server(base, folder, *arguments, environment=vllm_environment(folder, **environment))
            )

        yield start_one
