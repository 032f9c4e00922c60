"""What inspect and verify tell."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter, write_hira, write_portable
from smoa_serve.adapters.model import AdapterKind
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError, BaseModelError
from smoa_serve.offline.convert import TargetFormat, convert
from smoa_serve.offline.inspect import inspect_adapter

MakeBase = Callable[..., Path]


@pytest.fixture
def llama(vectors: Path) -> BaseCheckpoint:
    return BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")


@pytest.fixture
def published(vectors: Path) -> Path:
    return vectors / "e2e/tiny-llama/adapters/all_r3_k8_rank0_safetensors"


def test_a_published_adapter_without_its_base_tells_what_its_tensors_tell(published: Path) -> None:
    report = inspect_adapter(published)
    assert (report.kind, report.format) == (AdapterKind.SMOA, "published")
    assert (report.summary, report.base_match) == (None, None)
    told = report.as_json()
    assert (told["parameters"], told["factor_bytes"], told["max_rank"]) == (1356, 4 * 1356, 1)
    assert len(report.modules) == 14
    assert report.modules[0].shape is None
    assert [told[key] for key in ("digest", "rank", "num_blocks", "order", "order_error")] == [None] * 5
    assert report.config["lora_alpha"] == 6


def test_with_its_base_it_tells_order_digest_and_shapes(published: Path, llama: BaseCheckpoint) -> None:
    report = inspect_adapter(published, llama)
    summary = report.summary
    assert summary is not None
    assert (summary.rank, summary.num_blocks, summary.order, summary.order_error) == (3, 8, "recomputed", 0.0)
    assert summary.digest == load_adapter(published, llama).digest
    assert (summary.parameters, report.base_match, report.problems) == (1356, "shapes", [])
    assert {module.order_error for module in report.modules} == {0.0}
    assert json.loads(json.dumps(report.as_json()))["modules"][0]["branch_ranks"] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_portable_adapter_is_matched_exactly(
    published: Path, llama: BaseCheckpoint, vectors: Path, tmp_path: Path
) -> None:
    folder = write_portable(load_adapter(published, llama), tmp_path)
    report = inspect_adapter(folder, llama)
    assert (report.format, report.base_match) == ("portable", "exact")
    other = inspect_adapter(folder, BaseCheckpoint.open(vectors / "e2e/tiny-qwen2/base"))
    assert (other.base_match, other.summary) == ("no", report.summary)
    assert len(other.problems) == 14
    assert all("another base" in problem for problem in other.problems)


def test_on_a_quantized_base_a_portable_adapter_is_matched_by_its_shapes(
    published: Path, llama: BaseCheckpoint, make_base: MakeBase, tmp_path: Path
) -> None:
    folder = write_portable(load_adapter(published, llama), tmp_path / "portable")
    stored = {f"{name}.weight": llama.weight(name).to(torch.int8) for name in llama.linear_modules}
    quantized = BaseCheckpoint.open(make_base(stored))
    assert inspect_adapter(folder, quantized).base_match == "shapes"
    assert not open_adapter(folder).check(quantized).exact
    assert inspect_adapter(published, quantized).base_match == "no"
    hira = write_hira(load_adapter(published, llama), tmp_path / "hira")
    assert inspect_adapter(hira, quantized).base_match == "shapes"
    with pytest.raises(BaseModelError, match="is quantized; give the checkpoint that it was made from"):
        convert(hira, tmp_path / "converted", TargetFormat.PORTABLE, quantized)
    assert not (tmp_path / "converted").exists()


def test_a_published_adapter_that_does_not_fit_is_reported_not_raised(published: Path, make_base: MakeBase) -> None:
    other = BaseCheckpoint.open(make_base({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}))
    report = inspect_adapter(published, other)
    assert report.base_match == "no"
    assert report.as_json()["parameters"] == 1356
    assert any("there is no module" in problem for problem in report.problems)


def test_hira_and_lora_are_told_by_their_own_formats(published: Path, llama: BaseCheckpoint, tmp_path: Path) -> None:
    hira = write_hira(load_adapter(published, llama), tmp_path / "hira")
    report = inspect_adapter(hira, llama)
    assert (report.kind, report.format, report.base_match) == (AdapterKind.HIRA, "hira", "shapes")
    assert report.as_json()["rank"] == 3
    lora = tmp_path / "lora"
    lora.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": torch.zeros(2, 128), f"{name}B.weight": torch.zeros(128, 2)}
    save_file(tensors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}'
    )
    report = inspect_adapter(lora, llama)
    assert (report.format, report.base_match) == ("lora", "shapes")
    assert (report.as_json()["rank"], report.as_json()["parameters"]) == (2, 512)
    assert open_adapter(lora).check(llama).layers == 1
    save_file(tensors | {f"{name}B.weight": torch.zeros(64, 2)}, lora / "adapter_model.safetensors")
    assert inspect_adapter(lora, llama).base_match == "no"


def test_verify_counts_the_layers_it_bound_or_gives_every_reason(published: Path, llama: BaseCheckpoint) -> None:
    found = open_adapter(published).check(llama)
    assert (found.layers, found.exact, found.order_error) == (14, False, 0.0)
    with pytest.raises(AdapterError, match="the limit is 0"):
        open_adapter(published, LoadOptions(max_rank=0)).check(llama)
