"""Tensor and pipeline parallelism: two workers give the answers of the merged weights."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

PROMPTS = ([5, 17, 99, 3, 40], [88, 2, 61])
# Partitions that tensor parallelism cuts into unequal parts, and blocks without a branch.
ADAPTERS = {
    "smoa-a": ("smoa", (3, 2)),
    "smoa-b": ("smoa", (2, 0, 1, 2, 1)),
    "hira": ("hira", (4,)),
    "lora": ("lora", (8,)),
}
TOKENS = 12


@pytest.fixture(scope="module")
def base(vectors: Path) -> Path:
    return vectors / "e2e/tiny-llama/base"


@pytest.fixture(scope="module")
def paths(base: Path, makers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = makers.make_adapters(base, tmp_path_factory.mktemp("adapters"), ADAPTERS)
    return made


@pytest.fixture(scope="module", params=["tensor", "pipeline"])
def server(request: Any, base: Path, paths: dict[str, Path], serving: Callable[..., Any]) -> Iterator[Any]:
    """Two workers, and every adapter in a slot."""
    with serving(
        base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base"),
        *("--enable-lora", "--max-loras", "4", "--max-lora-rank", "8", f"--{request.param}-parallel-size", "2"),
        *("--no-enable-prefix-caching", "--distributed-executor-backend", "mp", "--lora-modules"),
        *(f"{name}={path}" for name, path in paths.items()),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    ) as running:
        yield running


def test_two_workers_answer_like_the_merged_weights(
    server: Any, base: Path, paths: dict[str, Path], makers: Any
) -> None:
    assert {entry["residence"] for entry in server.adapters().values()} == {"slot"}
    for name in ["base", *paths]:
        model = makers.merged_model(base, paths.get(name))
        for prompt in PROMPTS:
            assert_best_tokens(model, list(prompt), *server.greedy(name, prompt, TOKENS))


def test_two_workers_merge_and_unmerge(server: Any, paths: dict[str, Path]) -> None:
    """Each in its own part of the weights, on the same step; everybody is asked at the same time."""
    asked = [(name, prompt) for name in ("base", *paths) for prompt in PROMPTS]
    before = [server.greedy(*one, TOKENS) for one in asked]
    for name in ("smoa-b", "hira"):
        report = server.post(f"/v1/smoa/adapters/{name}/merge", {}).raise_for_status().json()
        assert report["step"] == server.adapters()[name]["residence"] == "merged"
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda one: server.greedy(*one, TOKENS), asked))
        for (tokens, logprobs), (expected, known) in zip(found, before, strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx(known, abs=1e-3)
        server.post(f"/v1/smoa/adapters/{name}/unmerge", {}).raise_for_status()
        assert server.adapters()[name]["residence"] == "slot"
    assert [server.greedy(*one, TOKENS) for one in asked] == before  # bit for bit


def assert_best_tokens(model: Any, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    """Each token is the best one of the reference, with its logprob."""
    assert len(tokens) == TOKENS
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), chosen, atol=1e-3, rtol=0)
    torch.testing.assert_close(expected.max(-1).values, chosen, atol=1e-3, rtol=0)
