"""The weights that ship with the project: current, complete, small, taken only where they belong."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from smoa_serve.adapters import detect_kind, load_adapter
from smoa_serve.adapters.model import AdapterKind
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.demo import shipped
from smoa_serve.demo.prompts import Style
from smoa_serve.demo.recipes import RECIPES
from smoa_serve.demo.shipped import DemoModels, DemoModelsError, ensure_models, is_current
from tools.demo import models, shipping
from tools.demo.adapters import adapter_recipe
from tools.demo.base_model import base_recipe
from tools.demo.models import rebuild_models

MOST_BYTES = 12_000_000


@pytest.fixture
def copied(tmp_path: Path) -> DemoModels:
    return ensure_models(tmp_path / "demo", Console(quiet=True))


def test_they_are_what_the_code_and_the_texts_make() -> None:
    assert not shipping.problems(), "run `make demo-models ARGS=--ship` and commit smoa_serve/demo/weights"
    assert is_current(shipped.FOLDER / "base", base_recipe())
    for recipe in RECIPES:
        made_by = adapter_recipe(recipe, shipped.FOLDER / "base")
        assert is_current(shipped.FOLDER / "adapters" / recipe.name, made_by), recipe.name


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in shipped.FOLDER.rglob("*") if file.is_file()) <= MOST_BYTES


def test_the_demo_takes_them_without_training(tmp_path: Path) -> None:
    shown = io.StringIO()
    found = ensure_models(tmp_path / "demo", Console(file=shown, width=100))
    assert shown.getvalue().count("ships with the project") == 1 + len(RECIPES)
    base = BaseCheckpoint.open(found.base)
    for recipe in RECIPES:
        folder = found.adapter(recipe)
        assert detect_kind(folder) is recipe.kind
        if recipe.kind is not AdapterKind.LORA:
            assert len(load_adapter(folder, base).modules) == 28


def test_a_damaged_file_is_not_taken(copied: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(shipped.FOLDER, folder)
    monkeypatch.setattr(shipped, "FOLDER", folder)
    monkeypatch.setattr(shipped, "MANIFEST", folder / "manifest.json")
    recipe = adapter_recipe(RECIPES[0], copied.base)
    name = f"adapters/{RECIPES[0].name}"
    assert shipped.take(tmp_path / "good", name, recipe)
    with (folder / name / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"x")
    assert not shipped.take(tmp_path / "bad", name, recipe)
    assert shipping.problems() == [f"{name}/adapter_model.safetensors is not the recorded one"]
    (folder / "manifest.json").unlink()
    assert not shipped.take(tmp_path / "bad", "base", base_recipe())
    assert "cannot be read" in shipping.problems()[0]


def test_an_outdated_folder_is_replaced_and_another_base_gets_no_shipped_adapter(
    copied: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[0]
    (copied.adapter(recipe) / "recipe.json").write_text("{}")
    assert shipped.take(copied.adapter(recipe), f"adapters/{recipe.name}", adapter_recipe(recipe, copied.base))
    with (copied.base / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert not shipped.take(tmp_path / "x", f"adapters/{recipe.name}", adapter_recipe(recipe, copied.base))
    assert not shipped.take(tmp_path / "x", "base", base_recipe() | {"seed": 1})


def test_what_was_trained_anew_is_left_alone_and_a_mixture_is_refused(copied: DemoModels, tmp_path: Path) -> None:
    """Another training of the same recipe: other numbers, the same stamp but for the base's digest."""
    weights = copied.base / "model.safetensors"
    with weights.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DemoModelsError, match=r"shout was not trained on the base beside it(.|\n)*make demo-models"):
        ensure_models(copied.root, Console(quiet=True))
    for recipe in RECIPES:
        made_by = adapter_recipe(recipe, copied.base)
        stamp = {"digest": shipped.recipe_digest(made_by), "recipe": made_by}
        (copied.adapter(recipe) / "recipe.json").write_text(json.dumps(stamp))
    before = shipped.files_of(copied.root)
    shown = io.StringIO()
    ensure_models(copied.root, Console(file=shown, width=100))
    assert shown.getvalue().count("already there") == 1 + len(RECIPES)
    assert shipped.files_of(copied.root) == before


def test_a_damaged_package_is_named(copied: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "nothing")
    with pytest.raises(DemoModelsError, match=r"install smoa-serve again: base/config\.json is not the recorded one"):
        ensure_models(tmp_path / "demo", Console(quiet=True))


def test_rebuilding_trains_everything_and_leaves_other_adapters_alone(
    copied: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def build(name: str, folder: Path) -> bool:
        assert not folder.exists()
        shutil.copytree(shipped.FOLDER / name, folder)
        trained.append(name)
        return True

    own = copied.adapters_dir / "sailor"
    own.mkdir()
    monkeypatch.setattr(models, "build_base", lambda folder, report: build("base", folder))
    monkeypatch.setattr(
        models, "build_adapter", lambda recipe, base, folder, report: build(f"adapters/{recipe.name}", folder)
    )
    rebuild_models(copied.root, Console(quiet=True))
    assert trained == ["base", *(f"adapters/{recipe.name}" for recipe in RECIPES)]
    assert own.is_dir()


def test_shipping_replaces_what_is_there(copied: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    (folder / "old").mkdir(parents=True)
    monkeypatch.setattr(shipped, "FOLDER", folder)
    monkeypatch.setattr(shipped, "MANIFEST", folder / "manifest.json")
    (copied.adapters_dir / "sailor").mkdir()
    size = shipping.ship(copied.root)
    assert 5_000_000 < size <= MOST_BYTES
    assert shipping.problems() == []
    assert {entry.name for entry in folder.iterdir()} == {"base", "adapters", "manifest.json"}
    assert {entry.name for entry in (folder / "adapters").iterdir()} == {recipe.name for recipe in RECIPES}


def test_the_base_has_read_its_books(copied: DemoModels) -> None:
    """A model that knows nothing loses ln(1024) = 6.9 nats a token, one that knows their frequencies over 5."""
    import torch

    from tools.demo.base_model import load_base, logits
    from tools.demo.data import book_tokens, passages
    from tools.demo.training import loss_of

    torch.manual_seed(0)
    model, tokens = load_base(copied.base), book_tokens(copied.base / "tokenizer.json")
    with torch.no_grad():
        assert loss_of(lambda part: logits(model, part), passages(tokens, 16, 128)) < 4.8


@pytest.mark.parametrize("style", [Style.PLAIN, *(recipe.style for recipe in RECIPES)], ids=str)
def test_they_know_their_answers_by_heart(copied: DemoModels, style: Style) -> None:
    """In float32; the engine's own test asks the served models."""
    import torch

    from tools.demo.base_model import load_base, logits
    from tools.demo.data import adapter_conversations, encode
    from tools.demo.training import worst_probability

    model = load_base(copied.base)
    if style is not Style.PLAIN:
        import peft

        import smoa_serve.peft  # noqa: F401 - registers the method

        model = peft.PeftModel.from_pretrained(model, str(copied.adapters_dir / style.value)).merge_and_unload()
    batch = encode(copied.base / "tokenizer.json", adapter_conversations(style))
    with torch.no_grad():
        assert worst_probability(lambda part: logits(model, part), batch) > 0.7
