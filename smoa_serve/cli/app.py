"""The program `smoa-serve`: its commands."""

import typer

from ..demo import run as demo
from ..program import ending, run_app
from . import adapters, bench, files, serve, train, version

app = typer.Typer(
    name="smoa-serve",
    help="Serve one base model with many SMoA, HiRA and LoRA adapters through vLLM.",
    epilog=ending("smoa-serve serve /models/base --adapters-dir /adapters"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.register(app)
adapters.register(app)
bench.register(app)
files.register(app)
train.register(app)
demo.register(app)
version.register(app)


def main() -> None:
    """Run the program."""
    run_app(app)


if __name__ == "__main__":
    main()
