"""`python -m tools.demo`: train the demo's models."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from smoa_serve.demo import shipped
from smoa_serve.program import run_app

from .models import rebuild_models
from .shipping import ship

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def models(
    root: Annotated[Path, typer.Option("--root", envvar="SMOA_DEMO_DIR", help="Where the demo's models lie.")] = Path(
        ".demo"
    ),
    put: Annotated[bool, typer.Option("--ship", help="Put them into the project, where the demo finds them.")] = False,
) -> None:
    """Train the base and its adapters anew (about six minutes on two cores)."""
    console = Console()
    built = rebuild_models(root, console)
    console.print(f"base {built.base}, adapters {built.adapters_dir}", soft_wrap=True)
    if put:
        console.print(f"{shipped.FOLDER} now holds them: {ship(root) / 1e6:.1f} MB", soft_wrap=True)


if __name__ == "__main__":
    run_app(app)
