"""The program `smoa-serve`: its commands and how it fails."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import SmoaError
from . import adapters, bench, files, serve

app = typer.Typer(
    name="smoa-serve",
    help="Serve one base model with many SMoA, HiRA and LoRA adapters through vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.register(app)
adapters.register(app)
bench.register(app)
files.register(app)


def main() -> None:
    """Run the program; an error a user can mend is one message and exit code 1."""
    try:
        app()
    except SmoaError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
