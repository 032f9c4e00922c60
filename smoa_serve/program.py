"""How a command-line program of this project ends."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from .errors import SmoaError

EXIT_CODES = {
    0: "done; of `serve`: the server was stopped, or its engine ended",
    1: "an error, of which the message says how to mend it",
    2: "a command line that cannot be read",
    130: "Ctrl-C",
}
"""What every program of this project ends with; the numbers stay as they are."""


def ending(*examples: str) -> str:
    """What stands below a command's options: how it is used, and how it ends."""
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()).replace("`", "")
    return "\n\n".join([*(f"Example: {example}" for example in examples), f"Exit codes: {codes}"])


def run_app(app: typer.Typer) -> None:
    """Run a program; an error a user can mend is one message."""
    try:
        app()
    except SmoaError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
