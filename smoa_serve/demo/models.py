"""Everything the demo serves, built where it is missing, with progress."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import shipped
from .adapters import RECIPES, Recipe, adapter_recipe, build_adapter
from .artifacts import is_current
from .base_model import READING, SCHEDULE, base_recipe, build_base
from .training import Report


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


def ensure_models(root: Path, console: Console, *, use_shipped: bool = True) -> DemoModels:
    """Take the models that ship with the project; train what they do not hold. What is complete is left alone.

    Args:
        root: folder of the demo, made if absent.
        console: where progress is shown.
        use_shipped: False trains everything that is missing.

    Raises:
        TrainingError: a model did not learn its answers.
    """
    models = DemoModels(root)
    with _bars(console) as progress:
        title = "base model (Llama, 3 M weights)"
        if not (use_shipped and _take(progress, title, models.base, "base", base_recipe())):
            _build(progress, title, READING.steps + SCHEDULE.max_steps, lambda report: build_base(models.base, report))
        for recipe in RECIPES:
            title, folder = f"adapter {recipe.name} ({recipe.label})", models.adapter(recipe)
            made_by = adapter_recipe(recipe, models.base)
            if not (use_shipped and _take(progress, title, folder, f"adapters/{recipe.name}", made_by)):
                build = partial(build_adapter, recipe, models.base, folder)
                _build(progress, title, recipe.schedule.max_steps, build)
    return models


def rebuild_models(root: Path, console: Console) -> DemoModels:
    """Train the base and every adapter anew, whatever is there.

    Raises:
        TrainingError: a model did not learn its answers; what was there before is gone then.
    """
    models = DemoModels(root)
    for folder in (models.base, *(models.adapter(recipe) for recipe in RECIPES)):
        shutil.rmtree(folder, ignore_errors=True)
    return ensure_models(root, console, use_shipped=False)


def _bars(console: Console) -> Progress:
    """One bar a model; where nobody watches, lines are printed instead."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.fields[state]:<24}"))
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


def _take(progress: Progress, title: str, folder: Path, name: str, recipe: Mapping[str, object]) -> bool:
    """Copy a shipped model unless the folder is current already; False: it has to be looked at or trained."""
    if is_current(folder, recipe) or not shipped.take(folder, name, recipe):
        return False
    progress.add_task(title, total=1, completed=1, state="ships with the project")
    if progress.disable:
        progress.console.print(f"{title}: ships with the project", highlight=False)
    return True


def _build(progress: Progress, title: str, max_steps: int, build: Callable[[Report], bool]) -> None:
    task = progress.add_task(title, total=max_steps, state="starting")

    def report(step: int, state: str) -> None:
        progress.update(task, completed=step, state=state)

    begin = time.monotonic()
    state = "trained" if build(report) else "already there"
    progress.update(task, completed=max_steps, state=state)
    if progress.disable:
        progress.console.print(f"{title}: {state}, {time.monotonic() - begin:.0f} s", highlight=False)
