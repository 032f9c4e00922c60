"""The demo's models: artifacts that survive interruption, adapters that compute what was trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa_serve.adapters import detect_kind, load_adapter
from smoa_serve.adapters.model import AdapterKind
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.demo.prompts import Style
from smoa_serve.demo.recipes import RECIPES, Recipe
from smoa_serve.demo.shipped import is_current
from tools.demo import adapters, base_model, training
from tools.demo.adapters import build_adapter
from tools.demo.artifacts import build_folder
from tools.demo.data import Batch
from tools.demo.training import LogitsOf, Schedule, TrainingError

SMALL = base_model.BaseShape(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96
)
FEW_STEPS = Schedule(max_steps=2, learning_rate=1e-3, check_every=1, confidence=0.0, warmup=1)


READ_LITTLE = base_model.Reading(steps=2, count=2, beside=1, length=16)


def silent(step: int, state: str) -> None:
    assert step >= 1
    assert state.startswith(("loss", "least sure token"))


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


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "SHAPE", SMALL)
        patch.setattr(base_model, "READING", READ_LITTLE)
        patch.setattr(base_model, "SCHEDULE", replace(FEW_STEPS, batch_size=8))
        patch.setattr(base_model, "ROUNDED_CONFIDENCE", 0.0)
        assert base_model.build_base(folder, silent)
        assert not base_model.build_base(folder, silent)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_adapter_binds_to_the_base_it_was_trained_on(
    recipe: Recipe, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "schedule", lambda recipe: FEW_STEPS)
    folder = tmp_path / recipe.name
    assert build_adapter(recipe, small_base, folder, silent)
    assert not build_adapter(recipe, small_base, folder, silent)
    assert detect_kind(folder) is recipe.kind
    if recipe.kind is AdapterKind.LORA:
        import peft

        model = peft.PeftModel.from_pretrained(base_model.load_base(small_base), folder)
        assert any("lora_B" in name and bool(p.any()) for name, p in model.named_parameters())
        return
    adapter = load_adapter(folder, BaseCheckpoint.open(small_base))
    assert len(adapter.modules) == 7
    assert (adapter.rank, adapter.num_blocks) == (recipe.rank, recipe.num_blocks)


@pytest.mark.parametrize("recipe", [RECIPES[2], RECIPES[3]], ids=lambda recipe: recipe.name)
def test_the_written_adapter_computes_what_was_trained(
    recipe: Recipe, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Tensor] = []
    tokens = Batch(torch.tensor([[5, 9, 40]]), torch.ones(1, 3, dtype=torch.int64), torch.tensor([[9, 40, 7]]))

    def learn(name: str, logits_of: LogitsOf, *rest: Any) -> float:
        worst = training.learn(name, logits_of, *rest)
        with torch.no_grad():
            trained.append(logits_of(tokens))
        return worst

    monkeypatch.setattr(adapters, "schedule", lambda recipe: FEW_STEPS)
    monkeypatch.setattr(adapters, "learn", learn)
    build_adapter(recipe, small_base, tmp_path / "x", silent)
    model, base = base_model.load_base(small_base), BaseCheckpoint.open(small_base)
    with torch.no_grad():
        assert not torch.equal(base_model.logits(model, tokens), trained[0])
        for name, update in load_adapter(tmp_path / "x", base).modules.items():
            weight = model.get_submodule(name).weight
            weight += update.dense(weight)
        torch.testing.assert_close(base_model.logits(model, tokens), trained[0])


def test_nothing_of_this_machine_is_written(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "schedule", lambda recipe: FEW_STEPS)
    for recipe in RECIPES:
        build_adapter(recipe, small_base, tmp_path / recipe.name, silent)
    texts = [file.read_text() for file in tmp_path.rglob("*.json")]
    assert len(texts) == 2 * len(RECIPES)
    assert not [text for text in texts if str(tmp_path.parent) in text or str(Path.home()) in text]


def test_too_few_steps_are_an_error(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "schedule", lambda recipe: replace(FEW_STEPS, confidence=1.1))
    with pytest.raises(TrainingError, match="after 2 steps"):
        build_adapter(RECIPES[0], small_base, tmp_path / "x", silent)
    assert not (tmp_path / "x").exists()


def test_there_are_three_smoa_shapes_a_hira_and_a_lora() -> None:
    kinds = [recipe.kind for recipe in RECIPES]
    assert kinds.count(AdapterKind.SMOA) == 3
    assert {AdapterKind.HIRA, AdapterKind.LORA} <= set(kinds)
    assert len({(recipe.rank, recipe.num_blocks) for recipe in RECIPES if recipe.kind is AdapterKind.SMOA}) == 3
    assert Style.PLAIN not in {recipe.style for recipe in RECIPES}
