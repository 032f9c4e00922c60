"""Everything the demo serves, built where it is missing, with progress."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TextColumn("{task.fields[state]:<28}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("base model (Llama, 3 M weights)", total=SCHEDULE.max_steps, state="starting")
        built = build_base(models.base, _report(progress, task))
        _finish(progress, task, built)
        for recipe in RECIPES:
            steps = recipe.schedule.max_steps
            task = progress.add_task(f"adapter {recipe.name} ({recipe.label})", total=steps, state="starting")
            built = build_adapter(recipe, models.base, models.adapter(recipe), _report(progress, task))
            _finish(progress, task, built)
    return models


def _report(progress: Progress, task: TaskID) -> Report:
    def report(step: int, worst: float) -> None:
        progress.update(task, completed=step, state=f"least sure token {worst:6.1%}")

    return report


def _finish(progress: Progress, task: TaskID, built: bool) -> None:
    total = progress.tasks[task].total
    progress.update(task, completed=total, state="trained" if built else "already there")
