"""Everything the demo serves, trained anew, with progress."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from smoa_serve.demo.recipes import RECIPES
from smoa_serve.demo.shipped import DemoModels

from .adapters import build_adapter, schedule
from .base_model import READING, SCHEDULE, build_base
from .training import Report


def rebuild_models(root: Path, console: Console) -> DemoModels:
    """Train the base and every adapter anew, whatever is there.

    Args:
        root: folder of the demo, made if absent; other adapters in it are left alone.
        console: where progress is shown.

    Raises:
        TrainingError: a model did not learn its answers; what was there before is gone then.
    """
    models = DemoModels(root)
    for folder in (models.base, *(models.adapter(recipe) for recipe in RECIPES)):
        shutil.rmtree(folder, ignore_errors=True)
    with _bars(console) as progress:
        steps = READING.steps + SCHEDULE.max_steps
        _build(progress, "base model (Llama, 3 M weights)", steps, lambda report: build_base(models.base, report))
        for recipe in RECIPES:
            build = partial(build_adapter, recipe, models.base, models.adapter(recipe))
            _build(progress, f"adapter {recipe.name} ({recipe.label})", schedule(recipe).max_steps, build)
    return models


def _bars(console: Console) -> Progress:
    """One bar a model; where nobody watches, lines are printed instead."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.fields[state]:<24}"))
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


def _build(progress: Progress, title: str, max_steps: int, build: Callable[[Report], bool]) -> None:
    task = progress.add_task(title, total=max_steps, state="starting")

    def report(step: int, state: str) -> None:
        progress.update(task, completed=step, state=state)

    begin = time.monotonic()
    build(report)
    progress.update(task, completed=max_steps, state="trained")
    if progress.disable:
        progress.console.print(f"{title}: trained, {time.monotonic() - begin:.0f} s", highlight=False)
