"""One engine, many adapters in one batch: each request gets what it gets alone. In process, where starts are fast."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

MIXES = 200
TOKENS = 64
SHORT_STEPS = {"max_num_batched_tokens": 32, "max_num_seqs": 16}
# name -> (kind, rank of each block) of the adapters that share the slots.
ADAPTERS = {
    "smoa-8-2": ("smoa", (4, 4)),
    "smoa-6-4": ("smoa", (2, 2, 1, 1)),
    "smoa-3-8": ("smoa", (1, 0, 1, 0, 1, 0, 0, 0)),
    "hira-4": ("hira", (4,)),
    "lora-8": ("lora", (8,)),
    "smoa-5-2": ("smoa", (2, 3)),
    "smoa-16-8": ("smoa", (2,) * 8),
}


@pytest.fixture(scope="module")
def adapters(vectors: Path, makers: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """Adapters on every linear layer, each with its own partition of the coordinates."""
    made: dict[str, Path] = makers.make_adapters(
        vectors / "e2e/tiny-llama/base", tmp_path_factory.mktemp("adapters"), ADAPTERS
    )
    return made


@pytest.fixture(scope="module")
def engine(vectors: Path, in_process: Callable[..., Any], adapters: dict[str, Path]) -> Iterator[Any]:
    """Six slots for seven adapters and the base: adapters are evicted and come back all the time. Steps are so short
    that the longer prompts are prefilled in chunks, beside the decoding of others."""
    with in_process(
        vectors / "e2e/tiny-llama/base", enable_lora=True, max_loras=6, max_cpu_loras=6, **SHORT_STEPS
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain_engine(vectors: Path, in_process: Callable[..., Any]) -> Iterator[Any]:
    """The base model without adapters."""
    with in_process(vectors / "e2e/tiny-llama/base", **SHORT_STEPS) as engine:
        yield engine


def lora_request(name: str | None, adapters: dict[str, Path]) -> Any:
    from vllm.lora.request import LoRARequest

    if name is None:
        return None
    return LoRARequest(name, 1 + list(adapters).index(name), str(adapters[name]))


def generate(engine: Any, batch: list[tuple[str | None, list[int]]], adapters: dict[str, Path]) -> list[Any]:
    """Greedy continuations of a batch of (adapter, prompt)."""
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for _, prompt in batch],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2),
        lora_request=[lora_request(name, adapters) for name, _ in batch],
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(2, 128) for _ in range(rng.choice((1, 3, 8, 70)))] for _ in range(count)]


def test_each_request_of_200_mixed_batches_gets_its_solo_answer(engine: Any, adapters: dict[str, Path]) -> None:
    asked = prompts(4)
    names = [None, *adapters]
    solo = {
        (name, index): generate(engine, [(name, prompt)], adapters)[0]
        for name in names
        for index, prompt in enumerate(asked)
    }
    assert len({tuple(solo[name, 0].token_ids) for name in names}) == len(names), "the adapters do not differ visibly"
    rng = random.Random(11)
    for mix in range(MIXES):
        # At most six adapters fit one batch; which ones, their prompts and their order change.
        chosen = [None, *rng.sample(list(adapters), 5)] + [rng.choice([None]) for _ in range(rng.randrange(2))]
        rng.shuffle(chosen)
        keys = [(name, rng.randrange(len(asked))) for name in chosen]
        answers = generate(engine, [(name, asked[index]) for name, index in keys], adapters)
        for key, answer in zip(keys, answers, strict=True):
            assert list(answer.token_ids) == list(solo[key].token_ids), f"mix {mix}: {key}"


def test_base_tokens_are_bit_identical_to_an_engine_without_adapters(
    engine: Any, plain_engine: Any, adapters: dict[str, Path]
) -> None:
    asked = prompts(6)
    batch = [(None, prompt) for prompt in asked]
    expected = generate(plain_engine, batch, adapters)
    found = generate(engine, batch, adapters)
    for a, b in zip(expected, found, strict=True):
        assert list(a.token_ids) == list(b.token_ids)
        # logprobs as floats: equality of every bit, not closeness
        assert [{k: v.logprob for k, v in row.items()} for row in a.logprobs] == [
            {k: v.logprob for k, v in row.items()} for row in b.logprobs
        ]


@pytest.mark.parametrize("name", ["smoa-6-4", "smoa-3-8", "hira-4", "lora-8"])
def test_an_adapters_answer_is_that_of_the_merged_weights(
    name: str, engine: Any, adapters: dict[str, Path], vectors: Path, makers: Any
) -> None:
    model = makers.merged_model(vectors / "e2e/tiny-llama/base", adapters[name])
    for prompt in prompts(3):
        answer = generate(engine, [(name, prompt)], adapters)[0]
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0].log_softmax(-1)
        for step, (token, row) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            expected = logprobs[len(prompt) - 1 + step]
            assert abs(row[token].logprob - float(expected[token])) < 1e-3
            assert float(expected.max() - expected[token]) < 1e-3


def test_published_orders_and_portable_files_serve_the_same(vectors: Path, engine: Any) -> None:
    index = json.loads((vectors / "index.json").read_text())["e2e"][0]
    adapter = index["adapters"][0]
    paths = {"published": vectors / adapter["safetensors_dir"]}
    answer = generate(engine, [("published", index["prompts"][0])], {f"pad{i}": Path() for i in range(20)} | paths)[0]
    assert list(answer.token_ids[: len(adapter["greedy"][0])]) == adapter["greedy"][0]
