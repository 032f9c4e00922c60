"""Every published file variant, served over HTTP, gives the numbers recorded from the authors' implementation."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.engine

LOGPROB_TOLERANCE = 1e-3
GREEDY_MARGIN = 0.02
VOCABULARY = 128
MODELS = ("tiny-llama", "tiny-qwen2")
# Greedy tokens of the other one were recorded in bfloat16, whose rounding exceeds the margins.
FLOAT32_MODELS = ("tiny-llama",)


@pytest.fixture(scope="module", params=MODELS)
def served(
    request: Any, vectors: Path, serving: Callable[..., Any], tmp_path_factory: Any
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A float32 server of one recorded model with every file variant of its adapters, and the recording."""
    entry = next(e for e in json.loads((vectors / "index.json").read_text())["e2e"] if e["model"] == request.param)
    variants = file_variants(vectors, entry, tmp_path_factory.mktemp("variants"))
    with serving(
        vectors / entry["base"],
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "base"),
        *("--max-logprobs", str(VOCABULARY), "--enable-lora", "--max-loras", "4", "--max-lora-rank", "8"),
        "--lora-modules",
        *(f"{name}={path}" for name, path in variants.items()),
        SMOA_ALLOW_PICKLE="1",
    ) as server:
        yield server, entry | {"variants": variants, "numbers": load_file(vectors / entry["expected"])}


def file_variants(vectors: Path, entry: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Served name -> path: `<adapter>.bin`, `.safetensors`, `.trainer`, and both adapters of a file that holds two."""
    variants = {}
    for adapter in entry["adapters"]:
        variants[f"{adapter['name']}.bin"] = vectors / adapter["dir"]
        variants[f"{adapter['name']}.safetensors"] = vectors / adapter["safetensors_dir"]
        for checkpoint in adapter["trainer_checkpoint"] or []:
            # The Trainer writes no config: the user puts one beside the state dict.
            copy = folder / f"{adapter['name']}-trainer"
            shutil.copytree(vectors / checkpoint, copy)
            (copy / "adapter_config.json").write_text(json.dumps(adapter["config"]))
            variants[f"{adapter['name']}.trainer"] = copy
    if "multi" in entry:
        variants["multi_default.bin"] = vectors / entry["multi"]["dir"]
        variants["multi_second.bin"] = vectors / entry["multi"]["dir"] / "second"
    return variants


def test_logprobs_of_every_prompt_and_file_variant_are_the_recorded_ones(served: tuple[Any, dict[str, Any]]) -> None:
    server, entry = served
    client = server.client()
    for name in ["base", *entry["variants"]]:
        for index, prompt in enumerate(entry["prompts"]):
            response = client.completions.create(
                model=name, prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": VOCABULARY}
            )
            got = torch.full((len(prompt) - 1, VOCABULARY), float("nan"))
            for position, row in enumerate(response.choices[0].prompt_logprobs[1:]):
                for token, value in row.items():
                    got[position, int(token)] = value["logprob"]
            expected = recorded(entry, name, index)[:-1].log_softmax(-1)
            torch.testing.assert_close(got, expected, atol=LOGPROB_TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def recorded(entry: dict[str, Any], name: str, index: int) -> torch.Tensor:
    """Recorded logits [tokens, vocabulary]; of a bfloat16 base those of its float32 arithmetic."""
    key = f"{name.rsplit('.', 1)[0]}.{index}.logits"
    numbers = entry["numbers"]
    logits: torch.Tensor = numbers.get(f"{key}_fp32", numbers[key])
    return logits.float().view(-1, VOCABULARY)


@pytest.mark.parametrize("served", FLOAT32_MODELS, indirect=True)
def test_greedy_tokens_are_the_recorded_ones_where_the_margin_is_clear(served: tuple[Any, dict[str, Any]]) -> None:
    server, entry = served
    assert entry["base_dtype"] == "float32"
    client = server.client()
    compared = 0
    recordings = {a["name"]: list(zip(a["greedy"], a["greedy_min_margin"], strict=True)) for a in entry["adapters"]}
    recordings["base"] = entry["base_greedy"]
    for name in ["base", *entry["variants"]]:
        for prompt, (tokens, margin) in zip(entry["prompts"], recordings.get(name.rsplit(".", 1)[0], []), strict=False):
            if margin <= GREEDY_MARGIN:
                continue
            response = client.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=len(tokens),
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert response.choices[0].token_ids == tokens, name
            compared += 1
    assert compared >= 12
