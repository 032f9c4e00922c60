"""How a command-line program of this project ends."""

import sys
from enum import IntEnum

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import SmoaError


class ExitCode(IntEnum):
    """What a program of this project ends with; the numbers stay as they are."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    INTERRUPTED = 130


def ending(*examples: str, done: str = "done") -> str:
    """What stands below a command's options: how it is used, and how it ends.

    Args:
        examples: command lines.
        done: when it ends with 0.
    """
    codes = {
        ExitCode.DONE: done,
        ExitCode.ERROR: "an error that the message says how to mend",
        ExitCode.USAGE: "a command line that cannot be read",
        ExitCode.INTERRUPTED: "Ctrl-C",
    }
    lines = [f"Example: {example}" for example in examples]
    return "\n\n".join([*lines, "Exit codes: " + "; ".join(f"{code.value} {why}" for code, why in codes.items())])


def run_app(app: typer.Typer) -> None:
    """Run a program; an error a user can mend is one message."""
    try:
        app()
    except SmoaError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(ExitCode.ERROR)
