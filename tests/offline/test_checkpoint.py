"""Merged checkpoints, read by transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError, BaseModelError, ConfigError, MergeLossError
from smoa_serve.offline.check import check_merge
from smoa_serve.offline.checkpoint import load_deltas, merge

MakeBase = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


def _check_logits(folder: Path, expected: dict[str, torch.Tensor], name: str, suffix: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        for i in range(3):
            logits = model(expected[f"prompt.{i}.input_ids"].reshape(1, -1)).logits[0]
            torch.testing.assert_close(logits, expected[f"{name}.{i}.{suffix}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("index", "dtype", "suffix"), [(0, None, "logits_merged"), (1, "float32", "logits_fp32")])
def test_merged_checkpoints_give_the_recorded_logits(
    vectors: Path, vector_index: dict[str, Any], tmp_path: Path, index: int, dtype: str | None, suffix: str
) -> None:
    model = vector_index["e2e"][index]
    base = BaseCheckpoint.open(vectors / model["base"])
    expected = load_file(vectors / model["expected"])
    for entry in model["adapters"]:
        deltas = load_deltas(vectors / entry["safetensors_dir"], base)
        folder = merge(base, deltas, tmp_path / entry["name"], dtype=dtype).path
        _check_logits(folder, expected, entry["name"], suffix)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_passes_its_own_check(vectors: Path, tmp_path: Path, dtype: str) -> None:
    base = BaseCheckpoint.open(vectors / "e2e/tiny-qwen2/base")
    deltas = load_deltas(vectors / "e2e/tiny-qwen2/adapters/mlp_r8_k4_safetensors", base)
    folder = merge(base, deltas, tmp_path / "merged", dtype=dtype).path
    written = BaseCheckpoint.open(folder)
    assert {written.fingerprint(name).dtype for name in written.linear_modules} == {dtype}
    assert written.config["dtype"] == dtype
    result = check_merge(base, deltas, folder)
    assert result.passed
    assert result.max_abs > 0


def test_what_rounding_removes_of_an_update_is_measured_and_may_be_refused(vectors: Path, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(vectors / "e2e/tiny-qwen2/base")
    deltas = load_deltas(vectors / "e2e/tiny-qwen2/adapters/mlp_r8_k4_safetensors", base)
    worst = {}
    for dtype in ("float32", "bfloat16"):
        written = merge(base, deltas, tmp_path / dtype, dtype=dtype)
        assert written.lost.keys() == deltas.keys()
        worst[dtype] = max(written.lost.values())
    name = max(written.lost, key=lambda name: written.lost[name])
    weight = base.weight(name).float()
    delta = deltas[name](weight)
    removed = delta - ((weight + delta).bfloat16().float() - weight)
    assert worst["bfloat16"] == pytest.approx(float(removed.norm() / delta.norm()), rel=1e-3)
    assert worst["float32"] < worst["bfloat16"] / 1000
    with pytest.raises(MergeLossError, match=rf"would remove more than .* wider --dtype; .*{name} would lose"):
        merge(base, deltas, tmp_path / "refused", dtype="bfloat16", max_lost=worst["bfloat16"] * 0.999)
    assert not (tmp_path / "refused").exists()
    merge(base, deltas, tmp_path / "allowed", dtype="bfloat16", max_lost=worst["bfloat16"] * 1.001)


def test_the_check_notices_a_wrong_merge(vectors: Path, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")
    deltas = load_deltas(vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors", base)
    wrong = merge(base, dict(list(deltas.items())[1:]), tmp_path / "wrong").path
    assert not check_merge(base, deltas, wrong).passed


def test_only_the_adapted_tensors_change_and_companions_come_along(vectors: Path, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")
    deltas = load_deltas(vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors", base)
    folder = merge(base, deltas, tmp_path / "merged").path
    before, after = load_file(base.path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(deltas)
    assert {file.name for file in base.path.iterdir()} == {file.name for file in folder.iterdir()} - {
        "merged_adapters.json"
    }


def test_small_shards_get_an_index_and_the_same_tensors(vectors: Path, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")
    deltas = load_deltas(vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors", base)
    calls: list[tuple[str, int, int]] = []
    whole = merge(base, deltas, tmp_path / "whole").path
    written = merge(base, deltas, tmp_path / "parts", shard_bytes=200_000, progress=lambda *call: calls.append(call))
    parts = written.path
    files = sorted(parts.glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert calls[-1][1] == calls[-1][2] == index["metadata"]["total_size"]
    expected, found = BaseCheckpoint.open(whole), BaseCheckpoint.open(parts)
    assert all(torch.equal(expected.tensors[n].read(), found.tensors[n].read()) for n in expected.tensors)


def test_conv1d_updates_are_turned_into_the_stored_layout(make_base: MakeBase, tmp_path: Path) -> None:
    module = "transformer.h.0.attn.c_proj"  # square: the published merge is silently wrong here
    stored = torch.randn(6, 6)
    base = BaseCheckpoint.open(make_base({f"{module}.weight": stored}, model_type="gpt2"))
    update = torch.randn(6, 6)
    folder = merge(base, {module: lambda _: update.clone()}, tmp_path / "merged").path
    assert torch.equal(load_file(folder / "model.safetensors")[f"{module}.weight"], stored + update.t())


@pytest.fixture
def lora(vectors: Path, tmp_path: Path) -> tuple[BaseCheckpoint, Path, dict[str, torch.Tensor]]:
    """A LoRA adapter with random factors and what PEFT itself merges it to."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = vectors / "e2e/tiny-llama/base"
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "lora")
    merged = {name: parameter.detach() for name, parameter in model.merge_and_unload().named_parameters()}
    return BaseCheckpoint.open(folder), tmp_path / "lora", merged


def test_plain_lora_is_merged_as_peft_does(
    lora: tuple[BaseCheckpoint, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, expected = lora
    folder = merge(base, load_deltas(adapter, base), tmp_path / "merged").path
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_lora_variants_are_refused_with_every_reason(
    lora: tuple[BaseCheckpoint, Path, dict[str, torch.Tensor]],
) -> None:
    base, adapter, _ = lora
    file = adapter / "adapter_config.json"
    changes = {"use_dora": True, "alpha_pattern": {"nowhere": 2}, "bias": "all", "lora_alpha": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError) as caught:
        load_deltas(adapter, base)
    text = " ".join(caught.value.reasons)
    for part in ("use_dora", "trained biases", "lora_alpha is None"):
        assert part in text


def test_a_quantized_base_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(make_base({f"{Q}.weight": torch.zeros(4, 4, dtype=torch.int8)}))
    with pytest.raises(BaseModelError, match="is quantized"):
        merge(base, {}, tmp_path / "out")


def test_a_folder_in_use_is_refused_before_any_work(make_base: MakeBase, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(make_base({f"{Q}.weight": torch.zeros(4, 4)}))
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge(base, {}, tmp_path)


def test_memory_is_bounded_by_a_shard_not_by_the_model(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(1024, 1024) for i in range(48)}  # 192 MiB
    (tmp_path / "base").mkdir()
    save_file(layers, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    # VmHWM, because getrusage's peak counts what the parent held at the fork.
    code = (
        "import re, sys, torch\n"
        "from pathlib import Path\n"
        "from smoa_serve.base.checkpoint import BaseCheckpoint\n"
        "from smoa_serve.offline.checkpoint import merge\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "base = BaseCheckpoint.open(sys.argv[1])\n"
        "before = peak()\n"
        "merge(base, {n: torch.ones_like for n in base.linear_modules}, sys.argv[2], shard_bytes=2**24)\n"
        "print(peak() - before)\n"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "base", tmp_path / "out"]
    # What allocators keep says nothing about what a merge needs: one thread, one arena, and every tensor mapped for
    # itself, so that it goes back when it is freed.
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=quiet)
    peak_kib = int(done.stdout)
    assert 0 < peak_kib < 64 * 2**10  # a shard, its bytes for the file, one layer's update
