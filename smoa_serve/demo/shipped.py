"""The weights that ship with the project: copied to where the demo serves them from, if they are undamaged.

A folder of models carries a stamp: the recipe that it was made by, and its digest. What was made by the shipped recipe
is left alone, also if it was trained anew. `tools/demo` trains the models and puts them here.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import SmoaError
from .recipes import RECIPES, Recipe

FOLDER = Path(__file__).parent / "weights"
MANIFEST = FOLDER / "manifest.json"
STAMP = "recipe.json"


class DemoModelsError(SmoaError):
    """The demo's models are damaged, or not those of one training."""


@dataclass(frozen=True)
class DemoModels:
    """Where the demo's models lie.

    Attributes:
        root: folder of the demo.
    """

    root: Path

    @property
    def base(self) -> Path:
        """The base checkpoint."""
        return self.root / "base"

    @property
    def adapters_dir(self) -> Path:
        """One folder per adapter, named like it."""
        return self.root / "adapters"

    def adapter(self, recipe: Recipe) -> Path:
        """An adapter's folder."""
        return self.adapters_dir / recipe.name


def ensure_models(root: Path, console: Console) -> DemoModels:
    """Copy the shipped models to where they are missing or outdated. What is complete is left alone.

    Args:
        root: folder of the demo, made if absent.
        console: gets a line per model.

    Raises:
        DemoModelsError: a shipped file is damaged, or an adapter in place is of another base than the one in place.
    """
    models = DemoModels(root)
    _ensure("base model (Llama, 3 M weights)", models.base, "base", {}, console)
    made_for = {"base": _digest(models.base / "model.safetensors")}
    for recipe in RECIPES:
        title, name = f"adapter {recipe.name} ({recipe.label})", f"adapters/{recipe.name}"
        _ensure(title, models.adapter(recipe), name, made_for, console)
    return models


def recipe_digest(recipe: Mapping[str, object]) -> str:
    """Identity of a recipe (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def is_current(folder: Path, recipe: Mapping[str, object]) -> bool:
    """Whether `folder` is complete and was made by this very recipe."""
    stamp = _read(folder / STAMP)
    return isinstance(stamp, dict) and stamp.get("digest") == recipe_digest(recipe)


def take(folder: Path, name: str, recipe: Mapping[str, object]) -> bool:
    """Copy a shipped folder to where the demo serves it from, if it was made by this recipe and is undamaged.

    Args:
        folder: what it becomes; an outdated one is replaced.
        name: below the shipped folder: "base", "adapters/pirate".
        recipe: what it must have been made by.

    Returns:
        Whether it was copied.
    """
    shipped = FOLDER / name
    if not is_current(shipped, recipe) or damaged(name):
        return False
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(shipped, aside)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    return True


def damaged(name: str = "") -> list[str]:
    """What is wrong with the shipped files, or with those below one folder; empty when all is well."""
    manifest = _read(MANIFEST)
    if not isinstance(manifest, dict):
        return [f"{MANIFEST} cannot be read"]
    prefix = f"{name}/" if name else ""
    wanted = {file: digest for file, digest in manifest["files"].items() if file.startswith(prefix)}
    present = {file: digest for file, digest in files_of(FOLDER).items() if file.startswith(prefix)}
    names = sorted(wanted.keys() | present.keys())
    return [f"{file} is not the recorded one" for file in names if wanted.get(file) != present.get(file)]


def files_of(root: Path) -> dict[str, str]:
    """Every file below a folder of demo models with its sha256 (hex)."""
    folders = (root / "base", root / "adapters")
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(root).as_posix(): _digest(file) for file in files}


def _ensure(title: str, folder: Path, name: str, made_for: Mapping[str, object], console: Console) -> None:
    stamp = _read(FOLDER / name / STAMP)
    recipe = {**stamp["recipe"], **made_for} if isinstance(stamp, dict) else {}
    if is_current(folder, recipe):
        state = "already there"
    elif take(folder, name, recipe):
        state = "ships with the project"
    elif reasons := damaged(name):
        raise DemoModelsError(f"the demo's weights are damaged; install smoa-serve again: {', '.join(reasons)}")
    else:
        raise DemoModelsError(
            f"{folder} was not trained on the base beside it. Remove {folder.parents[1]} to serve the models that ship "
            "with the project, or train all of them anew in a checkout: make demo-models"
        )
    console.print(f"{title}: {state}", highlight=False)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
