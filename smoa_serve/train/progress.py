"""What is seen while a model learns: a bar with the loss; lines where nobody watches."""

import math
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..errors import SmoaError


class DivergedError(SmoaError):
    """The loss is no longer a number."""


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """A bar for transformers' Trainer; the block it is used in ends it.

    Args:
        console: quiet in all processes but the first.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet)
        self._task = self._bar.add_task("training", total=None, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step forward."""
        self._bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """New figures.

        Raises:
            DivergedError: the loss is infinite or not a number.
        """
        names = {"loss": "loss", "eval_loss": "validation loss"}
        found = {names[key]: value for key, value in (logs or {}).items() if key in names}
        for name, value in found.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name} is {value} at step {state.global_step}: lower training.learning_rate, or raise "
                    "training.warmup_steps"
                )
        figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        if not figures:
            return
        self._bar.update(self._task, figures=figures)
        if self._bar.disable and not self._bar.console.quiet:
            self._bar.console.print(f"step {state.global_step}/{state.max_steps}: {figures}", highlight=False)
