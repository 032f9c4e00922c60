"""The engine dies in the middle of a merge: nothing of it outlives the process."""

import hashlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

# Which process is killed, one after the other; each costs a start.
KILLED = ("Worker", "EngineCore") * int(os.environ.get("SMOA_TEST_CRASHES", "1"))
SEED = int(os.environ.get("SMOA_TEST_CRASH_SEED", "0"))  # of the moments
ADAPTERS = {"smoa": ("smoa", (4, 4)), "hira": ("hira", (4,)), "lora": ("lora", (8,))}
MERGED = "smoa"
PROMPTS = ([5, 17, 99, 3, 40], [88, 2, 61])
TOKENS = 12
MOVE_S = 5.0  # a move whose engine died under it may never be answered; the client gives up
ASKED_S = 2.0  # long enough for a request to reach an engine that does not answer
GIVE_UP_S = 40.0
WITHIN_S = 0.5  # the kill comes at a seeded moment of so many seconds of merging and un-merging
ENDS_S = 60.0  # until everybody knows
Answers = dict[tuple[str, int], tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Disk:
    """What lies on disk: the base, the adapters, the store's copies of them.

    Attributes:
        root: above all of it.
    """

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    def adapter(self, name: str) -> Path:
        return self.root / "adapters" / name

    def digests(self) -> dict[str, str]:
        """Of every file by its path, locks aside."""
        files = (file for file in sorted(self.root.rglob("*")) if file.is_file() and file.suffix != ".lock")
        return {str(file.relative_to(self.root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def disk(vectors: Path, makers: Any, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    disk = Disk(tmp_path_factory.mktemp("crash"))
    shutil.copytree(vectors / "e2e/tiny-llama/base", disk.base)
    makers.make_adapters(disk.base, disk.adapter(""), ADAPTERS)
    return disk


@contextmanager
def served(disk: Disk, serving: Callable[..., Any], **environment: str) -> Iterator[Any]:
    """A server on that disk, with its store there too."""
    with serving(
        disk.base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base"),
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "8", "--no-enable-prefix-caching", "--lora-modules"),
        *(f"{name}={disk.adapter(name)}" for name in ADAPTERS),
        SMOA_STORE_DIR=str(disk.root / "store"),
        SMOA_AUTO_RESIDENT="0",
        **environment,
    ) as server:
        yield server


def answers(server: Any) -> Answers:
    """Everybody's greedy answers with their logprobs, one after the other: in float32 they repeat bit for bit."""
    found: Answers = {}
    for name in ("base", *ADAPTERS):
        for index, prompt in enumerate(PROMPTS):
            found[name, index] = server.greedy(name, prompt, TOKENS)
    return found


def process_of(server: Any, kind: str) -> int:
    """The server's "EngineCore", or its "Worker", which holds the weights; on a CPU each is a process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            command = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if session == server.process.pid and command.startswith(f"VLLM::{kind}"):
            return int(folder.name)
    raise AssertionError(f"the server has no process {kind}")


class Mover(threading.Thread):
    """Merges and un-merges until the server is gone.

    Attributes:
        moves: that came to their end; moving: one is under way.
    """

    def __init__(self, server: Any) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.moves, self.moving = 0, threading.Event()

    def run(self) -> None:
        try:
            while True:
                for target in ("merge", "unmerge"):
                    self.moving.set()
                    self._server.post(f"/v1/smoa/adapters/{MERGED}/{target}", {}, timeout_s=MOVE_S).raise_for_status()
                    self.moves += 1
        except httpx.HTTPError:
            return  # the engine is dead


def stream(server: Any, model: str = "base") -> None:
    """Keeps the engine at work; ends with it."""
    body = {"model": model, "prompt": [1], "max_tokens": 250, "ignore_eos": True}
    try:
        while server.post("/v1/completions", body).is_success:
            pass
    except httpx.HTTPError:
        return


def answered(server: Any) -> bool:
    """Whether the base answers."""
    try:
        body = {"model": "base", "prompt": [1], "max_tokens": 1}
        return bool(server.post("/v1/completions", body, timeout_s=MOVE_S).is_success)
    except httpx.HTTPError:
        return False


def crash(server: Any, kind: str, delay_s: float) -> None:
    """Kill a process so long after the first merge began, while everybody streams; every client is told, nothing is
    answered from then on, and the API server ends."""
    streams = [threading.Thread(target=stream, args=(server, name), daemon=True) for name in ("base", *ADAPTERS)]
    for one in streams:
        one.start()
    process, mover = process_of(server, kind), Mover(server)
    mover.start()
    mover.moving.wait()
    time.sleep(delay_s)
    os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + ENDS_S
    for thread in (mover, *streams):
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a client was never told"
    assert not answered(server)
    server.process.wait(ENDS_S)


def ask(server: Any, method: str, path: str, body: dict[str, Any] | None) -> str:
    """What came of one request."""
    try:
        response = httpx.request(method, f"{server.url}{path}", json=body, timeout=GIVE_UP_S, headers=server.headers)
    except httpx.HTTPError as error:
        return repr(error)
    return f"{response.status_code} {response.json()['error']['message']}"


@pytest.mark.parametrize("busy", [False, True], ids=["in a call", "in a step"])
def test_whoever_waits_for_an_engine_that_ends_is_told_and_the_server_ends(
    busy: bool, disk: Disk, serving: Callable[..., Any]
) -> None:
    """An engine that ends in a step leaves calls that are no generations without an answer for ever, and a server waits
    for its requests."""
    load = {"lora_name": "late", "lora_path": str(disk.adapter("smoa"))}
    requests = [
        ("GET", "/v1/smoa/adapters", None),
        ("POST", "/v1/load_lora_adapter", load),
        ("POST", "/v1/smoa/adapters/smoa/merge", {}),
        ("POST", "/v1/smoa/adapters/hira/resident", {}),
    ]
    with (
        served(disk, serving, SMOA_ADAPTER_ROOTS=str(disk.root)) as server,
        ThreadPoolExecutor(len(requests)) as threads,
    ):
        worker = process_of(server, "Worker")
        if busy:
            threading.Thread(target=stream, args=(server,), daemon=True).start()
            time.sleep(ASKED_S)
        os.kill(worker, signal.SIGSTOP)
        asked = [threads.submit(ask, server, *request) for request in requests]
        time.sleep(ASKED_S)
        assert not any(one.done() for one in asked)
        assert set(ADAPTERS) < {
            card.id for card in server.client(timeout=GIVE_UP_S).models.list()
        }  # told without the workers
        os.kill(worker, signal.SIGKILL)
        for request, one in zip(requests, asked, strict=True):
            assert one.result().startswith("503 the engine ended"), request
        server.process.wait(ENDS_S)


@pytest.mark.timeout(1800)  # three starts
def test_a_restarted_engine_serves_the_base_weights(disk: Disk, serving: Callable[..., Any]) -> None:
    rng = random.Random(SEED)
    expected: Answers = {}
    before: dict[str, str] = {}
    killed = "nothing killed yet"
    for kind in (*KILLED, None):
        with served(disk, serving) as server:
            found = answers(server)
            expected, before = expected or found, before or disk.digests()
            assert found == expected, killed
            assert {entry["residence"] for entry in server.adapters().values()} == {"slot"}
            if kind is not None:
                delay_s = rng.uniform(0, WITHIN_S)
                killed = f"SMOA_TEST_CRASH_SEED={SEED}: {kind} killed {delay_s:.4f} s after a merge began"
                print(killed)  # noqa: T201
                crash(server, kind, delay_s)
        assert disk.digests() == before, killed
