"""Layers that an update cannot be added to: the base starts and answers, they are refused as targets, others serve.

And models whose modules have other names in the checkpoint, in memory and in adapters.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

PROMPT = [13, 97, 88, 114, 5, 31, 64]


def add(engine: Any, number: int, path: Path) -> Any:
    """Load an adapter; the request for it."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(path.name, number, str(path))
    engine.llm_engine.add_lora(request)
    return request


def ask(engine: Any, request: Any = None) -> tuple[list[int], list[float]]:
    """Greedy tokens and their logprobs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], sampling, lora_request=request, use_tqdm=False)
    (output,) = answer.outputs
    return list(output.token_ids), [
        top[token].logprob for token, top in zip(output.token_ids, output.logprobs, strict=True)
    ]


def by_transformers(model: Any, tokens: list[int]) -> list[float]:
    """Logprobs of a given continuation of PROMPT."""
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([[*PROMPT, *tokens]])).logits[0], -1)
    return [float(rows[len(PROMPT) - 1 + place, token]) for place, token in enumerate(tokens)]


# --- a gate that runs in float32 -------------------------------------------------------------------------------------


WRAPPED = "model.language_model."


def register_gated_llama() -> None:
    """A llama whose MLP is scaled by a float32 gate: the layer that vLLM makes routers of experts from. Its checkpoint
    names the language model's modules as one of several parts."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.fused_moe import GateLinear
    from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
    from vllm.model_executor.models.utils import WeightsMapper

    class Layer(LlamaDecoderLayer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            prefix = kwargs.get("prefix", "")
            mlp, hidden = self.mlp, self.hidden_size
            mlp.gate = GateLinear(hidden, 4, out_dtype=torch.float32, prefix=f"{prefix}.mlp.gate")
            plain = mlp.forward

            def gated(x: Any) -> Any:
                gates, _ = mlp.gate(x)
                assert gates.dtype == torch.float32
                return plain(x) * torch.sigmoid(gates.mean(-1, keepdim=True)).to(x.dtype)

            mlp.forward = gated

    class GatedLlamaForCausalLM(LlamaForCausalLM):
        hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={WRAPPED: "model."})

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)

        def load_weights(self, weights: Any) -> Any:
            return super().load_weights(self.hf_to_vllm_mapper.apply(weights))

    ModelRegistry.register_model("GatedLlamaForCausalLM", GatedLlamaForCausalLM)


def gated_reference(base: Path) -> Any:
    """The same in transformers, float32, without the wrapper."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = load_file(base / "model.safetensors")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base)).float().eval()
    plain = {
        name.replace(WRAPPED, "model."): tensor.float() for name, tensor in weights.items() if ".gate." not in name
    }
    model.load_state_dict(plain)
    for index, layer in enumerate(model.model.layers):
        gate = weights[f"{WRAPPED}layers.{index}.mlp.gate.weight"].float()
        layer.mlp.register_forward_hook(
            lambda _, inputs, output, gate=gate: output * torch.sigmoid((inputs[0] @ gate.T).mean(-1, keepdim=True))
        )
    return model


@pytest.fixture(scope="module")
def gated_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("gated") / "base"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", WRAPPED): tensor.bfloat16() for name, tensor in weights.items()}
    for index in (0, 1):
        tensors[f"{WRAPPED}layers.{index}.mlp.gate.weight"] = torch.randn(4, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["GatedLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.fixture(scope="module")
def gated(gated_base: Path, in_process: Callable[..., Any]) -> Iterator[Any]:
    register_gated_llama()
    with in_process(gated_base, dtype="bfloat16", enable_lora=True) as engine:
        yield engine


def test_a_base_with_a_float32_gate_starts_and_answers_as_it_is(gated: Any, gated_base: Path) -> None:
    tokens, logprobs = ask(gated)
    assert logprobs == pytest.approx(by_transformers(gated_reference(gated_base), tokens), abs=0.1)


@pytest.mark.parametrize("kind", ["smoa", "hira"])
def test_a_float32_gate_is_refused_as_a_target(
    gated: Any, gated_base: Path, makers: Any, tmp_path: Path, kind: str
) -> None:
    before = ask(gated)
    path = makers.make_adapter(
        gated_base, tmp_path / kind, kind, (2, 2) if kind == "smoa" else (4,), seed=1, targets=("gate", "q_proj")
    )
    with pytest.raises(Exception, match=r"mlp\.gate.*output is float32 where the model runs in bfloat16"):
        add(gated, 11, path)
    assert 11 not in gated.llm_engine.list_loras()
    assert ask(gated) == before


def test_the_layers_beside_a_float32_gate_serve(gated: Any, gated_base: Path, makers: Any, tmp_path: Path) -> None:
    from smoa_serve.adapters import load_adapter
    from smoa_serve.base.checkpoint import BaseCheckpoint

    path = makers.make_adapter(gated_base, tmp_path / "beside", "smoa", (2, 2), seed=2, targets=("q_proj", "down_proj"))
    model = gated_reference(gated_base)
    with torch.no_grad():
        for module, update in load_adapter(path, BaseCheckpoint.open(gated_base)).modules.items():
            weight = model.get_submodule(module.replace(WRAPPED, "model.")).weight
            weight += update.dense(weight)
    tokens, logprobs = ask(gated, add(gated, 12, path))
    assert logprobs == pytest.approx(by_transformers(model, tokens), abs=0.1)
    assert tokens != ask(gated)[0]


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_every_spelling_of_a_wrapped_models_modules_is_the_same_adapter(
    gated: Any, gated_base: Path, makers: Any, tmp_path: Path, kind: str
) -> None:
    from smoa_serve.adapters import load_adapter, write_hira

    path = makers.make_adapter(
        gated_base, tmp_path / kind, kind, (4,), seed=3, targets=("q_proj", "v_proj", "down_proj")
    )
    if kind == "hira":
        path = write_hira(load_adapter(path, None), tmp_path / "as-peft")
    config = json.loads((path / "adapter_config.json").read_text())
    answers = [ask(gated, add(gated, 31, path))]
    for number, spelling in enumerate(("model.", "", "language_model.model.", f"_orig_mod.{WRAPPED}"), start=32):
        renamed = tmp_path / f"{kind}-{number}"
        renamed.mkdir()
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(
            {name.replace(WRAPPED, spelling): t for name, t in tensors.items()}, renamed / "adapter_model.safetensors"
        )
        config["target_modules"] = ["q_proj", "v_proj", "down_proj"]
        (renamed / "adapter_config.json").write_text(json.dumps(config))
        answers.append(ask(gated, add(gated, number, renamed)))
    assert answers == answers[:1] * len(answers)
    assert answers[0] != ask(gated)


# --- what MLA absorbs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mla_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers of DeepSeek's attention, of the head size that vLLM's MLA takes."""
    from smoa_serve.testing import random_base

    ranks = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {"first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    folder = tmp_path_factory.mktemp("mla") / "base"
    return random_base(folder, "deepseek_v2", num_key_value_heads=2, **ranks, **experts)


@pytest.fixture(scope="module")
def mla(mla_base: Path, in_process: Callable[..., Any]) -> Iterator[Any]:
    # The attention that runs on any CPU; the faster one of processors with AMX takes no float32.
    with in_process(mla_base, enable_lora=True, attention_config={"backend": "CPU_MLA"}) as engine:
        yield engine


@pytest.mark.parametrize("kind", ["smoa", "hira", "lora"])
def test_an_absorbed_projection_is_refused_as_a_target(
    mla: Any, mla_base: Path, makers: Any, tmp_path: Path, kind: str
) -> None:
    before = ask(mla)
    ranks = (2, 2) if kind == "smoa" else (4,)
    path = makers.make_adapter(mla_base, tmp_path / kind, kind, ranks, seed=1, targets=("kv_b_proj", "o_proj"))
    with pytest.raises(Exception, match=r"kv_b_proj.*MLA multiplies it into the attention"):
        add(mla, 21, path)
    assert 21 not in mla.llm_engine.list_loras()
    assert ask(mla) == before


@pytest.mark.parametrize("kind", ["smoa", "lora"])
def test_the_layers_beside_an_absorbed_projection_serve(
    mla: Any, mla_base: Path, makers: Any, tmp_path: Path, kind: str
) -> None:
    targets = ("o_proj", "kv_a_proj_with_mqa", "q_proj")
    ranks = (2, 2) if kind == "smoa" else (4,)
    path = makers.make_adapter(mla_base, tmp_path / f"beside-{kind}", kind, ranks, seed=2, targets=targets)
    assert ask(mla, add(mla, 22 if kind == "smoa" else 23, path)) != ask(mla)
