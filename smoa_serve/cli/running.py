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


EXIT_CODES = {
    ExitCode.DONE: "done; of `serve`: the server was stopped, or its engine ended",
    ExitCode.ERROR: "an error, of which the message says how to mend it",
    ExitCode.USAGE: "a command line that cannot be read",
    ExitCode.INTERRUPTED: "Ctrl-C",
}


def ending(*examples: str) -> str:
    """What stands below a command's options: how it is used, and how it ends."""
    lines = [f"Example: {example}" for example in examples]
    codes = "; ".join(f"{code.value} {meaning}" for code, meaning in EXIT_CODES.items())
    return "\n\n".join([*lines, f"Exit codes: {codes.replace('`', '')}"])


def run_app(app: typer.Typer) -> None:
    """Run a program; an error a user can mend is one message."""
    try:
        app()
    except SmoaError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(ExitCode.ERROR)
