"""Reading single weights of a base checkpoint."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import BaseModelError

MakeBase = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


def _llama() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": torch.randn(10, 4),
        f"{Q}.weight": torch.randn(6, 4, dtype=torch.bfloat16),
        f"{Q}.bias": torch.randn(6),
        "model.layers.0.input_layernorm.weight": torch.ones(4),
        "lm_head.weight": torch.randn(10, 4),
    }


def test_linear_modules_are_neither_norms_nor_embeddings(make_base: MakeBase) -> None:
    base = BaseCheckpoint.open(make_base(_llama(), tie_word_embeddings=False))
    assert set(base.linear_modules) == {Q, "lm_head"}
    assert base.shape(Q) == (6, 4)
    assert base.weight(Q).dtype == torch.bfloat16
    assert not base.is_quantized


def test_a_tied_output_layer_is_no_linear_module(make_base: MakeBase) -> None:
    base = BaseCheckpoint.open(make_base(_llama(), tie_word_embeddings=True))
    assert base.linear_modules == (Q,)
    with pytest.raises(BaseModelError, match="shares the embedding's weight"):
        base.weight("lm_head")


def test_an_absent_output_layer_counts_as_tied(make_base: MakeBase) -> None:
    tensors = _llama()
    del tensors["lm_head.weight"]
    assert BaseCheckpoint.open(make_base(tensors)).tied_output


def test_fingerprint_is_over_the_stored_bytes(make_base: MakeBase) -> None:
    tensors = _llama()
    base = BaseCheckpoint.open(make_base(tensors))
    mark = base.fingerprint(Q)
    raw = tensors[f"{Q}.weight"].view(torch.uint8).numpy().tobytes()
    assert mark.sha256 == hashlib.sha256(raw).hexdigest()
    assert (mark.shape, mark.dtype) == ((6, 4), "bfloat16")
    assert base.fingerprint(Q) is mark


def test_conv1d_weights_are_transposed_but_fingerprinted_as_stored(make_base: MakeBase) -> None:
    stored = torch.randn(4, 12)
    folder = make_base({"transformer.h.0.attn.c_attn.weight": stored}, model_type="gpt2")
    base = BaseCheckpoint.open(folder)
    module = "transformer.h.0.attn.c_attn"
    assert base.shape(module) == (12, 4)
    assert torch.equal(base.weight(module), stored.t())
    assert base.fingerprint(module).sha256 == hashlib.sha256(stored.numpy().tobytes()).hexdigest()


def test_a_backbone_checkpoint_gets_the_prefix_that_adapters_use(make_base: MakeBase) -> None:
    gpt2 = make_base({"h.0.attn.c_attn.weight": torch.randn(4, 12), "wte.weight": torch.randn(9, 4)}, model_type="gpt2")
    assert BaseCheckpoint.open(gpt2).linear_modules == ("transformer.h.0.attn.c_attn",)
    llama = make_base({"layers.0.mlp.up_proj.weight": torch.randn(8, 4)}, name="bare")
    assert BaseCheckpoint.open(llama).linear_modules == ("model.layers.0.mlp.up_proj",)


def test_sharded_checkpoints_are_read_through_their_index(tmp_path: Path) -> None:
    tensors = _llama()
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[:2], names[2:])):
        save_file({n: tensors[n] for n in chosen}, tmp_path / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(chosen, f"model-{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(BaseCheckpoint.open(tmp_path).weight(Q), tensors[f"{Q}.weight"])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"missing: model-1\.safetensors"):
        BaseCheckpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {f"{Q}.weight": torch.randn(4, 4)}),
        ({}, {f"{Q}.weight": torch.zeros(4, 4, dtype=torch.int8)}),
        ({}, {f"{Q}.qweight": torch.zeros(4, 4, dtype=torch.int32)}),
    ],
    ids=["by config", "by dtype", "by name"],
)
def test_quantized_bases_are_recognised(
    make_base: MakeBase, config: dict[str, object], tensors: dict[str, torch.Tensor]
) -> None:
    assert BaseCheckpoint.open(make_base(tensors, **config)).is_quantized


@pytest.mark.parametrize(
    "parts",
    [
        {"qweight": (torch.int32, 8, 96), "scales": (torch.float16, 2, 96), "g_idx": (torch.int32, 64)},
        {"qweight": (torch.int32, 8, 96)},
        {"qweight": (torch.int32, 64, 12), "scales": (torch.float16, 2, 96)},
        {"weight_packed": (torch.int32, 96, 8), "weight_scale": (torch.float16, 96, 2)},
        {"weight": (torch.int8, 96, 64), "weight_scale": (torch.float32, 96, 1)},
        {"weight": (torch.float8_e4m3fn, 96, 64), "weight_scale": (torch.float32,)},
    ],
    ids=["gptq", "gptq without groups", "awq", "packed", "int8", "fp8"],
)
def test_quantized_modules_are_linear_and_have_their_weights_shape(
    make_base: MakeBase, parts: dict[str, tuple[Any, ...]]
) -> None:
    stored = {f"{Q}.{part}": torch.zeros(shape, dtype=dtype) for part, (dtype, *shape) in parts.items()}
    base = BaseCheckpoint.open(make_base(stored | {"model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4)}))
    assert base.linear_modules == ("model.layers.0.mlp.up_proj", Q)
    assert base.shape(Q) == (96, 64)
    assert base.is_quantized
    for read in (base.fingerprint, base.weight):
        with pytest.raises(BaseModelError, match=r"weight of .*q_proj.* is quantized; give the checkpoint that it was"):
            read(Q)


def test_the_shape_written_beside_a_packed_weight_counts(make_base: MakeBase) -> None:
    stored = {f"{Q}.weight_packed": torch.zeros(96, 16, dtype=torch.int32), f"{Q}.weight_shape": torch.tensor([96, 63])}
    assert BaseCheckpoint.open(make_base(stored)).shape(Q) == (96, 63)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("model.layers.7.self_attn.q_proj", "there is no module"),
        ("model.embed_tokens", "is an embedding"),
        ("model.layers.0.input_layernorm", r"weight of shape \[4\]"),
    ],
)
def test_modules_that_cannot_be_adapted_say_why(make_base: MakeBase, module: str, reason: str) -> None:
    with pytest.raises(BaseModelError, match=reason):
        BaseCheckpoint.open(make_base(_llama())).shape(module)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path, make_base: MakeBase) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        BaseCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"no \*\.safetensors"):
        BaseCheckpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BaseModelError, match="cannot be read"):
        BaseCheckpoint.open(tmp_path)


def test_hub_ids_are_looked_up_in_the_local_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_base: MakeBase
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(BaseModelError, match="not in the local hub cache"):
        BaseCheckpoint.open("someone/tiny")
    with pytest.raises(BaseModelError, match="neither a folder nor a model id"):
        BaseCheckpoint.open("no/such/folder/here")
    made = make_base(_llama())
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "snapshots").mkdir(parents=True)
    made.rename(repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    assert BaseCheckpoint.open("someone/tiny").shape(Q) == (6, 4)
