"""Tensor and pipeline parallelism: two workers give the answers of the merged weights."""

from collections.abc import Callable
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


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_two_workers_answer_like_the_merged_weights(
    parallel: str, vectors: Path, makers: Any, serving: Callable[..., Any], tmp_path: Path
) -> None:
    base = vectors / "e2e/tiny-llama/base"
    paths = {
        name: makers.make_adapter(base, tmp_path / name, kind, ranks, seed=seed)
        for seed, (name, (kind, ranks)) in enumerate(ADAPTERS.items())
    }
    with serving(
        base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base"),
        *("--enable-lora", "--max-loras", "4", "--max-lora-rank", "8", f"--{parallel}-parallel-size", "2"),
        *("--distributed-executor-backend", "mp", "--lora-modules"),
        *(f"{name}={path}" for name, path in paths.items()),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    ) as server:
        client = server.client()
        assert {entry["residence"] for entry in server.adapters().values()} == {"slot"}
        for name in ["base", *paths]:
            model = makers.merged_model(base, paths.get(name))
            for prompt in PROMPTS:
                answer = client.completions.create(
                    model=name,
                    prompt=list(prompt),
                    max_tokens=TOKENS,
                    temperature=0,
                    logprobs=0,
                    extra_body={"return_token_ids": True, "ignore_eos": True},
                ).choices[0]
                check(model, list(prompt), answer.token_ids, answer.logprobs.token_logprobs)


def check(model: Any, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    """Each token is the best one of the reference, with its logprob."""
    assert len(tokens) == TOKENS
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), chosen, atol=1e-3, rtol=0)
    torch.testing.assert_close(expected.max(-1).values, chosen, atol=1e-3, rtol=0)
