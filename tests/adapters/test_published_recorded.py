"""The published format against numbers recorded from the published layer."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoa_serve.adapters import LoadOptions, load_adapter
from smoa_serve.adapters.canonical import canonical_update, factor_reasons
from smoa_serve.adapters.model import Adapter, AdapterKind, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError

MakeBase = Callable[..., Path]

PICKLE = LoadOptions(allow_pickle=True)
Q = "model.layers.0.self_attn.q_proj"
RELATIVE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _factors(tensors: dict[str, torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
    names = [name for name in tensors if name.startswith("lora_")]
    return {(name[5], int(name.split(".")[1])): tensors[name] for name in names}


def _assert_delta(found: torch.Tensor, recorded: torch.Tensor) -> None:
    scale = float(recorded.float().abs().max()) or 1.0
    torch.testing.assert_close(found, recorded.float(), rtol=0, atol=RELATIVE[recorded.dtype] * scale)


def test_every_layer_case_gives_the_recorded_delta_with_its_recorded_order(
    vectors: Path, vector_index: dict[str, Any]
) -> None:
    for case in vector_index["layers"]:
        tensors = load_file(vectors / case["file"])
        weight, delta = tensors["W"], tensors["delta"]
        if case["fan_in_fan_out"]:
            weight, delta = weight.t(), delta.t()
        factors, ranks = _factors(tensors), case["branch_ranks"]
        assert factor_reasons("layer", factors, tuple(weight.shape), ranks) == [], case["name"]
        update = canonical_update(factors, tensors["row_order"], tensors["col_order"], ranks, case["scaling"])
        _assert_delta(update.dense(weight), delta)
        for k in range(case["num_blocks"]):
            rows = tensors.get(f"rows.{k}", torch.empty(0)).long()
            assert torch.equal((update.row_block == k).nonzero()[:, 0], rows.sort().values), case["name"]


def _case_files(case: dict[str, Any], tensors: dict[str, torch.Tensor], make_base: MakeBase) -> tuple[Path, Path]:
    """A base of one layer and the adapter folder that the published code would have written for it."""
    conv = case["fan_in_fan_out"]
    module = "transformer.h.0.attn.c_attn" if conv else Q
    base = make_base(
        {f"{module}.weight": tensors["W"]}, name=f"base-{case['name']}", model_type="gpt2" if conv else "llama"
    )
    folder = base.parent / case["name"]
    folder.mkdir()
    names = [name for name in tensors if name.startswith("lora_")]
    save_file(
        {f"base_model.model.{module}.{name}": tensors[name] for name in names}, folder / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "SMOA",
        "r": case["r"],
        "num_blocks": case["num_blocks"],
        "branch_ranks": case["branch_ranks_config"],
        "lora_alpha": case["lora_alpha"],
        "fan_in_fan_out": conv,
        "target_modules": [module.rpartition(".")[2]],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, base


def test_every_well_determined_layer_case_is_read_from_files(
    vectors: Path, vector_index: dict[str, Any], make_base: MakeBase
) -> None:
    for case in vector_index["layers"]:
        if not case["order_well_determined"]:
            continue
        tensors = load_file(vectors / case["file"])
        folder, base_path = _case_files(case, tensors, make_base)
        base = BaseCheckpoint.open(base_path)
        ((module, update),) = load_adapter(folder, base).modules.items()
        delta = tensors["delta"].t() if case["fan_in_fan_out"] else tensors["delta"]
        _assert_delta(update.dense(base.weight(module)), delta)
        assert update.branch_ranks == tuple(case["branch_ranks"]), case["name"]


def test_an_order_that_is_not_determined_is_never_served_in_silence(
    vectors: Path, vector_index: dict[str, Any], make_base: MakeBase, caplog: pytest.LogCaptureFixture
) -> None:
    case = next(c for c in vector_index["layers"] if c["name"] == "orthogonal_k2")
    folder, base_path = _case_files(case, load_file(vectors / case["file"]), make_base)
    base = BaseCheckpoint.open(base_path)
    with caplog.at_level(logging.WARNING):
        adapter = load_adapter(folder, base)
    assert adapter.order_error > 1
    assert "not fully determined" in caplog.text
    assert f"{adapter.order_error:.3f}" in caplog.text
    with pytest.raises(AdapterError, match="not fully determined, expected error"):
        load_adapter(folder, base, LoadOptions(strict_order=True))


class Logits:
    """A tiny model in float32 that can carry an adapter's dense updates."""

    def __init__(self, folder: Path, base: BaseCheckpoint) -> None:
        from transformers import AutoModelForCausalLM

        self.base = base
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @contextmanager
    def carrying(self, adapter: Adapter) -> Iterator[None]:
        weights = {name: self.model.get_submodule(name).weight for name in adapter.modules}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(adapter.modules[name].dense(self.base.weight(name)))
            yield
            for name, weight in weights.items():
                weight.copy_(kept[name])

    def check(self, adapter: Adapter, expected: dict[str, torch.Tensor], name: str, suffix: str) -> None:
        with self.carrying(adapter):
            for i in range(3):
                logits = self.model(expected[f"prompt.{i}.input_ids"].reshape(1, -1)).logits[0]
                torch.testing.assert_close(logits, expected[f"{name}.{i}.{suffix}"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-qwen2"])
def recorded(request: pytest.FixtureRequest, vectors: Path, vector_index: dict[str, Any]) -> tuple[Any, ...]:
    model = next(m for m in vector_index["e2e"] if m["model"] == request.param)
    base = BaseCheckpoint.open(vectors / model["base"])
    return model, base, Logits(vectors / model["base"], base), load_file(vectors / model["expected"])


def test_every_published_variant_reproduces_the_recorded_logits(vectors: Path, recorded: tuple[Any, ...]) -> None:
    model, base, logits, expected = recorded
    exact = ["logits_fp32"] if model["base_dtype"] == "bfloat16" else ["logits", "logits_merged"]
    for entry in model["adapters"]:
        pickled = load_adapter(vectors / entry["dir"], base, PICKLE)
        safe = load_adapter(vectors / entry["safetensors_dir"], base)
        assert pickled.digest == safe.digest
        assert (safe.kind, safe.order, safe.order_error) == (AdapterKind.SMOA, OrderStatus.RECOMPUTED, 0.0)
        for suffix in exact:
            logits.check(safe, expected, entry["name"], suffix)
        for checkpoint in entry["trainer_checkpoint"] or []:
            config = vectors / entry["dir"] / "adapter_config.json"
            options = LoadOptions(allow_pickle=True, config_path=config)
            assert load_adapter(vectors / checkpoint, base, options).digest == safe.digest


@pytest.mark.parametrize("recorded", ["tiny-llama"], indirect=True)
def test_both_adapters_of_one_file_reproduce_their_logits(vectors: Path, recorded: tuple[Any, ...]) -> None:
    model, base, logits, expected = recorded
    folder = vectors / model["multi"]["dir"]
    default = load_adapter(folder, base, PICKLE)
    second = load_adapter(folder, base, LoadOptions(allow_pickle=True, adapter_name="second"))
    logits.check(default, expected, "multi_default", "logits")
    logits.check(second, expected, "multi_second", "logits")
    assert load_adapter(folder / "second", base, PICKLE).digest == second.digest
    options = LoadOptions(allow_pickle=True, adapter_name="second", config_path=folder / "second/adapter_config.json")
    assert load_adapter(folder / "adapter_model.bin", base, options).digest == second.digest
    with pytest.raises(AdapterError, match="there is no adapter 'third'; this file holds second"):
        load_adapter(folder, base, LoadOptions(allow_pickle=True, adapter_name="third"))
