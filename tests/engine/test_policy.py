"""The automatic policy on a real server: the hot adapter goes up, and comes down when the traffic moves on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

WAIT_S = 90


@pytest.fixture(scope="module")
def adapters(vectors: Path, makers: Any, tmp_path_factory: Any) -> dict[str, Path]:
    base, kinds = vectors / "e2e/tiny-llama/base", dict.fromkeys(("first", "second"), ("smoa", (4, 4)))
    made: dict[str, Path] = makers.make_adapters(base, tmp_path_factory.mktemp("adapters"), kinds)
    return made


class Stream:
    """Asks one adapter again and again until it is told to stop; every answer has to be the same."""

    def __init__(self, server: Any, model: str) -> None:
        self.answers: set[str] = set()
        self._going = True
        self._thread = threading.Thread(target=self._run, args=(server, model))
        self._thread.start()

    def _run(self, server: Any, model: str) -> None:
        with server.client() as client:
            while self._going:
                done = client.completions.create(model=model, prompt=[5, 9, 40], max_tokens=32, temperature=0)
                self.answers.add(done.choices[0].text)

    def stop(self) -> set[str]:
        self._going = False
        self._thread.join()
        return self.answers


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_the_hot_adapter_is_merged_and_makes_room_for_the_next(
    vectors: Path, adapters: dict[str, Path], serving: Callable[..., Any]
) -> None:
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--enable-lora", "--max-loras", "2")
    modules = [f"{name}={path}" for name, path in adapters.items()]
    variables = {"SMOA_AUTO_MERGE": "1", "SMOA_AUTO_RESIDENT": "1", "SMOA_POLICY_INTERVAL_S": "0.3"}
    with serving(
        vectors / "e2e/tiny-llama/base", *arguments, "--max-lora-rank", "8", "--lora-modules", *modules, **variables
    ) as server:
        for hot, other in (("first", "second"), ("second", "first")):
            streams = [Stream(server, hot) for _ in range(8)]
            try:
                assert wait_for(lambda hot=hot: server.adapters()[hot]["residence"] == "merged"), policy(server)
                assert server.adapters()[other]["residence"] != "merged"
            finally:
                answers = [stream.stop() for stream in streams]
            assert len(set.union(*answers)) == 1
        shown = policy(server)
        assert (shown["merge"], shown["resident"], shown["pinned"]) == (True, True, [])
        assert shown["tokens_per_step"] > 0
        done = [(decision["action"], decision["name"]) for decision in reversed(shown["decisions"])]
        moves = [move for move in done if move[0] in ("merge", "unmerge")]
        assert moves == [("merge", "first"), ("unmerge", "first"), ("merge", "second")]
        assert all("tokens a step" in decision["reason"] for decision in shown["decisions"])
        # A pinned adapter stays, however little it is used.
        server.post("/v1/smoa/adapters/second/pin", {}).raise_for_status()
        stream = [Stream(server, "first") for _ in range(8)]
        time.sleep(4)
        for one in stream:
            one.stop()
        assert server.adapters()["second"]["residence"] == "merged"


def policy(server: Any) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/smoa/policy", headers=server.headers)
    response.raise_for_status()
    shown: dict[str, Any] = response.json()
    return shown
