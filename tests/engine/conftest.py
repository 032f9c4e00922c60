"""Real vLLM servers for the tests: a subprocess each, reached over HTTP with the official client."""

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from smoa_serve.testing import TINY_ENVIRONMENT, ServerProcess

VLLM = (Path(sys.executable).with_name("vllm"),)


class Server(ServerProcess):
    """A running server.

    Attributes:
        api_key: what it asks for, "none" where it asks for nothing.
    """

    api_key = "none"

    def client(self, **settings: Any) -> Any:
        """With the server's key."""
        return super().client(**({"api_key": self.api_key} | settings))

    @property
    def log(self) -> Path:
        """Everything it printed."""
        return self.log_file

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def greedy(self, model: str, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[float]]:
        """A greedy answer's tokens and their logprobs."""
        (answer,) = (
            self.client()
            .completions.create(
                model=model,
                prompt=list(prompt),
                max_tokens=max_tokens,
                temperature=0,
                logprobs=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            .choices
        )
        return answer.token_ids, answer.logprobs.token_logprobs

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120) -> httpx.Response:
        """POST JSON."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=timeout_s, headers=self.headers)

    def adapters(self) -> dict[str, dict[str, Any]]:
        """GET /v1/smoa/adapters by name."""
        response = httpx.get(f"{self.url}/v1/smoa/adapters", timeout=30, headers=self.headers)
        response.raise_for_status()
        return {entry["name"]: entry for entry in response.json()["data"]}


def vllm_environment(folder: Path, **extra: str) -> dict[str, str]:
    """The environment of a test server: its own store and order cache, no hub, a small KV cache."""
    own = {
        "VLLM_PLUGINS": "smoa_serve",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "SMOA_AUTO_RESIDENT": "0",  # tests move adapters themselves
        "SMOA_STORE_DIR": str(folder / "store"),
        "SMOA_CACHE_DIR": str(folder / "cache"),
    }
    return os.environ | TINY_ENVIRONMENT | own | extra


def run_server(
    base: Path,
    folder: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    command: Sequence[str | Path] = (),
) -> Server:
    """`vllm serve BASE …` (or another command's `serve`) until the block ends."""
    log = folder / f"server-{len(list(folder.iterdir()))}.log"
    environment = environment or vllm_environment(folder)
    return Server(base, *arguments, program=command or VLLM, log_file=log, environment=environment)


TINY_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--enable-lora")


def _load_module(file: str) -> Any:
    name = f"smoa_test_{Path(file).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


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


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with serving(base, *arguments, VARIABLE=value) as server`: a server for the length of a block."""

    def serve(base: Path, *arguments: str, command: Sequence[str] = (), **environment: str) -> Any:
        folder = tmp_path_factory.mktemp("server")
        variables = vllm_environment(folder, **environment)
        return run_server(base, folder, *arguments, environment=variables, command=command)

    return serve


@pytest.fixture(scope="session")
def makers() -> Any:
    """The module makers.py; test folders are no packages, so it is loaded by its path."""
    return _load_module("makers.py")


@pytest.fixture(scope="session")
def faults() -> Any:
    """The module faults.py."""
    return _load_module("faults.py")


@pytest.fixture(scope="session")
def quantizing() -> Any:
    """The module quantized_makers.py."""
    return _load_module("quantized_makers.py")


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with in_process(base, **engine_arguments) as engine`: an engine in this process, float32 and eager."""
    folder = tmp_path_factory.mktemp("in-process")

    @contextmanager
    def start_engine(base: Path, **arguments: Any) -> Iterator[Any]:
        with pytest.MonkeyPatch.context() as patch:  # what later tests start does not inherit it
            for name, value in (vllm_environment(folder) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
                patch.setenv(name, value)
            with run_engine(base, **arguments) as engine:
                yield engine

    @contextmanager
    def run_engine(base: Path, **arguments: Any) -> Iterator[Any]:
        import torch

        from smoa_serve.plugin import register

        # OMP_NUM_THREADS comes too late for a process that has imported torch.
        torch.set_num_threads(1)
        register()
        from vllm import LLM

        defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_lora_rank": 8, "seed": 0}
        engine = LLM(str(base), **(defaults | arguments))
        try:
            yield engine
        finally:
            # Now: vLLM would do it when the engine is collected, and take the process groups of the next one away.
            engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()

    return start_engine


@pytest.fixture(scope="session")
def tiny_api() -> Any:
    """The module tiny_api.py."""
    return _load_module("tiny_api.py")


@pytest.fixture(scope="session")
def tiny(
    vectors: Path, start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory, tiny_api: Any
) -> Iterator[Any]:
    """One server for all tests of the API, with more adapters than slots; see tiny_api.py."""
    folder = tmp_path_factory.mktemp("tiny")
    yield tiny_api.start_tiny(vectors / "e2e/tiny-llama/base", folder, start, TINY_ARGUMENTS)
    tiny_api.COMPARED.assert_enough()
