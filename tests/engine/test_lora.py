"""LoRA over HTTP: what PEFT's own loading computes, or a refusal with the reason; see tests/test_formats_lora.py."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smoa_serve.base.checkpoint import BaseCheckpoint

pytestmark = pytest.mark.engine

PROMPT = [13, 97, 88, 114, 5, 31, 64]
TOKENS = 8
PREFIX, EMBED = "base_model.model.", "model.embed_tokens"
Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}


def modules_of(base: BaseCheckpoint) -> list[str]:
    return [name for name in base.linear_modules if name.endswith(("q_proj", "up_proj"))]


def write_lora(base: BaseCheckpoint, folder: Path, ranks: Mapping[str, int], said: Mapping[str, Any]) -> Path:
    """Random factors of rank 4, or of the rank given by module, and a configuration that says this beside PLAIN."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for module in dict.fromkeys([*modules_of(base), *ranks]):
        rank = ranks.get(module, 4)
        if module == EMBED:
            (h_in, h_out), names = base.tensors[f"{EMBED}.weight"].shape, ("lora_embedding_A", "lora_embedding_B")
        else:
            (h_out, h_in), names = base.shape(module), ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{module}.{names[0]}"] = torch.randn(rank, h_in, generator=generator)
        tensors[f"{PREFIX}{module}.{names[1]}"] = torch.randn(h_out, rank, generator=generator) * 0.05
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | dict(said)))
    return folder


@torch.inference_mode()
def by_peft(base: Path, adapter: Path) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens of PEFT's own loading, their logprobs, and how far the second best tokens were."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokens, logprobs, margins = list(PROMPT), [], []
    for _ in range(TOKENS):
        best = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], -1).topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return tokens[len(PROMPT) :], logprobs, margins


@pytest.fixture
def checkpoint(tiny: Any) -> BaseCheckpoint:
    return BaseCheckpoint.open(tiny.base)


@pytest.fixture
def asked(tiny: Any) -> Any:
    """Loads an adapter, asks it, unloads it."""

    def ask(path: Path) -> Any:
        response = tiny.load("asked", path)
        assert response.status_code == 200, response.text
        try:
            return tiny.ask("asked", PROMPT, TOKENS)
        finally:
            assert tiny.unload("asked").status_code == 200

    return ask


EXACT: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "rslora": ({}, {"use_rslora": True}),
    "rank-pattern": ({Q0: 2, UP1: 8}, {"rank_pattern": {"layers.0.self_attn.q_proj": 2, UP1: 8}}),
    "alpha-pattern": ({}, {"alpha_pattern": {r"1\.mlp\.up_proj": 17, "q_proj": 1.5}}),
    "all-of-them": (
        {Q0: 2},
        {"use_rslora": True, "rank_pattern": {Q0: 2}, "alpha_pattern": {"up_proj": 3, ".*q_proj": 9}},
    ),
    "embedding": ({EMBED: 2}, {"rank_pattern": {EMBED: 2}, "target_modules": ["q_proj", "up_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("name", EXACT)
def test_patterns_and_rslora_answer_as_peft_does(
    tiny: Any, checkpoint: BaseCheckpoint, asked: Callable[[Path], Any], name: str
) -> None:
    ranks, said = EXACT[name]
    path = write_lora(checkpoint, tiny.root / f"exact-{name}", ranks, said)
    tokens, logprobs, margins = by_peft(tiny.base, path)
    assert min(margins) > 1e-3, "the reference chooses by a near tie; take another seed"
    answer = asked(path)
    assert answer.tokens == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
    assert answer.differs(tiny.solo("base-model", PROMPT, TOKENS)) is not None


def test_names_of_compiled_and_wrapped_models_meet_their_layers(
    tiny: Any, checkpoint: BaseCheckpoint, asked: Callable[[Path], Any]
) -> None:
    from safetensors.torch import load_file

    plain = write_lora(checkpoint, tiny.root / "names", {}, {})
    tensors, expected = load_file(plain / "adapter_model.safetensors"), asked(plain)
    for spelling in ("model._orig_mod.layers", "layers", "model.language_model.layers", "language_model.model.layers"):
        renamed = {name.replace("model.layers", spelling): tensor for name, tensor in tensors.items()}
        save_file(renamed, plain / "adapter_model.safetensors")
        assert asked(plain) == expected


def drop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 8}, "the factors have rank 4, r or rank_pattern says 8"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "rank 4, r or rank_pattern says 2"),
    "anchored": ({"alpha_pattern": {"^q_proj": 8}}, "'^q_proj' decides for none of the modules"),
    "nothing": ({"alpha_pattern": {"nothing": 8}}, "'nothing' decides for none of the modules"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "changes the base weights"),
    "corda": ({"init_lora_weights": "corda"}, "changes the base weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base weights"),
    "no targets": ({"target_modules": []}, "target_modules names nothing"),
    "dora": ({"use_dora": True}, "use_dora is set"),
    "huge": ({"lora_alpha": 1e300}, "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_served_otherwise_is_refused_with_the_reason(
    tiny: Any, checkpoint: BaseCheckpoint, name: str
) -> None:
    from smoa_serve.adapters import open_adapter
    from smoa_serve.errors import AdapterError

    said, reason = REFUSED[name]
    path = write_lora(checkpoint, tiny.root / f"refused-{name.replace(' ', '-')}", {}, said)
    response = tiny.load("refused", path)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert reason in message
    assert "stack trace" not in message
    with pytest.raises(AdapterError) as verified:
        open_adapter(path).check(checkpoint)
    assert all(said in message for said in verified.value.reasons)


def test_a_lora_without_tensors_is_refused(tiny: Any, checkpoint: BaseCheckpoint) -> None:
    path = write_lora(checkpoint, tiny.root / "empty", {}, {})
    save_file({}, path / "adapter_model.safetensors")
    response = tiny.load("refused", path)
    assert response.status_code == 400
    assert "the file holds no LoRA factors" in response.json()["error"]["message"]
