"""`smoa-serve --version`."""

from typing import Annotated

import typer

from .. import __version__


def register(app: typer.Typer) -> None:
    """Add `--version` to a program."""

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_show, is_eager=True, help="Print the version and leave.")
        ] = False,
    ) -> None:
        pass


def _show(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smoa-serve {__version__}")
        raise typer.Exit
