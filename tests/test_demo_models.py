"""The demo's models: artifacts that survive interruption, updates that are what they are written as."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoa_serve.adapter import AdapterKind, WeightFingerprint
from smoa_serve.base_checkpoint import BaseCheckpoint
from smoa_serve.demo import adapters, base_model
from smoa_serve.demo.adapters import RECIPES, Recipe, build_adapter
from smoa_serve.demo.artifacts import build_folder, is_current
from smoa_serve.demo.corpus import Style
from smoa_serve.demo.training import Schedule, TrainingError
from smoa_serve.demo.updates import LoraUpdate, SmoaUpdate, block_ids
from smoa_serve.formats import detect_kind, load_adapter

pytest.importorskip("transformers")
SMALL = base_model.BaseShape(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96
)
FEW_STEPS = Schedule(max_steps=2, learning_rate=1e-3, check_every=1, confidence=0.0, warmup=1)


def silent(step: int, worst: float) -> None:
    assert step >= 1
    assert 0 <= worst <= 1


def test_a_folder_is_built_once_per_recipe(tmp_path: Path) -> None:
    calls: list[Path] = []
    folder = tmp_path / "thing"
    assert build_folder(folder, {"a": 1}, calls.append)
    assert not build_folder(folder, {"a": 1}, calls.append)
    assert build_folder(folder, {"a": 2}, calls.append)
    assert len(calls) == 2
    assert is_current(folder, {"a": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["thing"]


def test_an_interrupted_build_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("x")
        raise KeyboardInterrupt

    folder = tmp_path / "thing"
    with pytest.raises(KeyboardInterrupt):
        build_folder(folder, {}, fail)
    assert not folder.exists()
    assert build_folder(folder, {}, lambda out: None)
    assert not (folder / "half").exists()


@pytest.mark.parametrize(("rank", "num_blocks"), [(4, 2), (7, 3), (2, 3), (5, 1)])
def test_smoa_update_trains_the_formula_it_writes(rank: int, num_blocks: int) -> None:
    rows, cols = torch.randperm(11), torch.randperm(7)
    weight = torch.randn(11, 7)
    update = SmoaUpdate(rank, num_blocks, 8.0, rows, cols)
    assert torch.equal(update.dense(weight), torch.zeros(11, 7))
    with torch.no_grad():
        update.b.normal_()
    finished = update.finished(WeightFingerprint((11, 7), "float32", "0" * 64))
    torch.testing.assert_close(update.dense(weight), finished.dense(weight))
    assert sum(finished.branch_ranks) == rank
    expected = torch.zeros(11, 7)
    for k, (row_piece, col_piece) in enumerate(
        zip(rows.tensor_split(num_blocks), cols.tensor_split(num_blocks), strict=True)
    ):
        branch = finished.branch_ranks[k]
        product = finished.b[row_piece, :branch] @ finished.a[:branch, col_piece]
        expected[row_piece[:, None], col_piece] = 8.0 / rank * product * weight[row_piece[:, None], col_piece]
    torch.testing.assert_close(finished.dense(weight), expected)


def test_lora_update_is_scaled_product() -> None:
    update = LoraUpdate(2, 8.0, (5, 3))
    with torch.no_grad():
        update.b.normal_()
    torch.testing.assert_close(update.dense(torch.zeros(5, 3)), 4 * (update.b @ update.a))


def test_block_ids_follow_the_order() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    assert block_ids(order, 2).tolist() == [0, 1, 1, 0, 0]


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "SHAPE", SMALL)
        patch.setattr(base_model, "SCHEDULE", replace(FEW_STEPS, batch_size=8))
        patch.setattr(base_model, "ROUNDED_CONFIDENCE", 0.0)
        assert base_model.build_base(folder, silent)
        assert not base_model.build_base(folder, silent)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_adapter_binds_to_the_base_it_was_trained_on(
    recipe: Recipe, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.Recipe, "schedule", FEW_STEPS)
    folder = tmp_path / recipe.name
    assert build_adapter(recipe, small_base, folder, silent)
    assert not build_adapter(recipe, small_base, folder, silent)
    assert detect_kind(folder) is recipe.kind
    if recipe.kind is AdapterKind.LORA:
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(base_model.load_base(small_base), folder)
        assert any("lora_B" in name and bool(p.any()) for name, p in model.named_parameters())
        return
    adapter = load_adapter(folder, BaseCheckpoint.open(small_base))
    assert len(adapter.modules) == 7
    assert (adapter.rank, adapter.num_blocks) == (recipe.rank, recipe.num_blocks)


def test_the_written_adapter_computes_what_was_trained(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    original = adapters.updated_weights

    def spy(weights: dict[str, Tensor], updates: dict[str, SmoaUpdate]) -> dict[str, Tensor]:
        result = original(weights, updates)
        seen.update({name: tensor.detach() for name, tensor in result.items()})
        return result

    monkeypatch.setattr(adapters.Recipe, "schedule", FEW_STEPS)
    monkeypatch.setattr(adapters, "updated_weights", spy)
    build_adapter(RECIPES[2], small_base, tmp_path / "x", silent)
    base = BaseCheckpoint.open(small_base)
    for name, update in load_adapter(tmp_path / "x", base).modules.items():
        weight = base.weight(name).float()
        torch.testing.assert_close(weight + update.dense(weight), seen[f"{name}.weight"])


def test_too_few_steps_are_an_error(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.Recipe, "schedule", replace(FEW_STEPS, confidence=1.1))
    with pytest.raises(TrainingError, match="after 2 steps"):
        build_adapter(RECIPES[0], small_base, tmp_path / "x", silent)
    assert not (tmp_path / "x").exists()


def test_there_are_three_smoa_shapes_a_hira_and_a_lora() -> None:
    kinds = [recipe.kind for recipe in RECIPES]
    assert kinds.count(AdapterKind.SMOA) == 3
    assert {AdapterKind.HIRA, AdapterKind.LORA} <= set(kinds)
    assert len({(recipe.rank, recipe.num_blocks) for recipe in RECIPES if recipe.kind is AdapterKind.SMOA}) == 3
    assert Style.PLAIN not in {recipe.style for recipe in RECIPES}
