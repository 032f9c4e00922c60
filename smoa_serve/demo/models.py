"""Everything the demo serves, built where it is missing, with progress."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .adapters import RECIPES, Recipe, build_adapter
from .base_model import SCHEDULE, build_base
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


def ensure_models(root: Path, console: Console) -> DemoModels:
    """Build what is missing; what is complete is left alone.

    Args:
        root: folder of the demo, made if absent.
        console: where progress is shown.

    Raises:
        TrainingError: a model did not learn its answers.
    """
    models = DemoModels(root)
    with _bars(console) as progress:
        title = "base model (Llama, 3 M weights)"
        _build(progress, title, SCHEDULE.max_steps, lambda report: build_base(models.base, report))
        for recipe in RECIPES:
            build = partial(build_adapter, recipe, models.base, models.adapter(recipe))
            _build(progress, f"adapter {recipe.name} ({recipe.label})", recipe.schedule.max_steps, build)
    return models


def _bars(console: Console) -> Progress:
    """One bar a model; where nobody watches, lines are printed instead."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.fields[state]:<24}"))
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


def _build(progress: Progress, title: str, max_steps: int, build: Callable[[Report], bool]) -> None:
    task = progress.add_task(title, total=max_steps, state="starting")

    def report(step: int, worst: float) -> None:
        progress.update(task, completed=step, state=f"least sure token {worst:6.1%}")

    begin = time.monotonic()
    state = "trained" if build(report) else "already there"
    progress.update(task, completed=max_steps, state=state)
    if progress.disable:
        progress.console.print(f"{title}: {state}, {time.monotonic() - begin:.0f} s", highlight=False)
