"""`python -m smoa_serve.demo run`: the same as `smoa-serve demo`."""

import runpy
import sys
from pathlib import Path

import typer

from ..errors import SmoaError
from ..program import run_app
from . import __doc__ as about
from .run import run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=about)
app.command("run")(run)


@app.command("models", deprecated=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def models(context: typer.Context) -> None:
    """Now `python -m tools.demo`, in a checkout."""
    if not Path("tools/demo").is_dir():
        raise SmoaError(f"{Path.cwd()} is no checkout of smoa-serve; only there the demo's models can be trained")
    sys.argv = ["tools.demo", *context.args]
    runpy.run_module("tools.demo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_app(app)
