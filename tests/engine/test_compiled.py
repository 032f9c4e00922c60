"""A compiled model answers as the eager one. One after the other: an engine that ends takes process groups along."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

TOKENS = 64
ADAPTERS = {
    "smoa-8-2": ("smoa", (4, 4)),
    "smoa-6-4": ("smoa", (2, 2, 1, 1)),
    "smoa-3-8": ("smoa", (1, 0, 1, 0, 1, 0, 0, 0)),
    "hira-4": ("hira", (4,)),
    "lora-8": ("lora", (8,)),
    "smoa-5-2": ("smoa", (2, 3)),
}


def test_a_compiled_model_gives_the_answers_of_the_eager_one(
    vectors: Path, in_process: Callable[..., Any], makers: Any, tmp_path: Path
) -> None:
    """vLLM compiles no CPU model with LoRA; here it may, as all that depends on the batch is behind opaque ops."""
    base = vectors / "e2e/tiny-llama/base"
    adapters = makers.make_adapters(base, tmp_path, ADAPTERS)
    rng = random.Random(7)
    prompts = [[rng.randrange(2, 128) for _ in range(length)] for length in (3, 70, 8)]
    names = [None, *adapters]
    mixed = [[(name, prompt) for name in names[shift:] + names[:shift]] for shift, prompt in enumerate(prompts)]
    # Traced with nothing but the base in the batch, then with LoRA alone, then mixed.
    batches = [[(None, prompts[0])], [("lora-8", prompts[1])], *mixed]
    # Steps so short that the longest prompt is prefilled in chunks, beside the decoding of others.
    arguments = {"max_loras": 6, "max_cpu_loras": 6, "max_num_batched_tokens": 32, "max_num_seqs": 16}

    def answers(eager: bool) -> list[list[list[int]]]:
        with in_process(base, enable_lora=True, enforce_eager=eager, **arguments) as engine:
            assert (engine.llm_engine.vllm_config.compilation_config.mode == 0) is eager
            return [generate(engine, batch, adapters) for batch in batches]

    assert answers(eager=False) == answers(eager=True)


def generate(engine: Any, batch: list[tuple[str | None, list[int]]], adapters: dict[str, Path]) -> list[list[int]]:
    """Greedy tokens of a batch of (adapter, prompt)."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = {name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)}
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for _, prompt in batch],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
        lora_request=[name and requests[name] for name, _ in batch],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
