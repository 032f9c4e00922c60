"""How a command-line program of this project ends."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import SmoaError


def run_app(app: typer.Typer) -> None:
    """Run a program; an error a user can mend is one message and exit code 1."""
    try:
        app()
    except SmoaError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
