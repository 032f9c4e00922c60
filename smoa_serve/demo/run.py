"""The demo's run: the shipped models served, asked, and their answers shown and checked."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import SmoaError
from ..program import ending
from ..testing import ServerProcess, free_port
from .ask import ask_all
from .prompts import DEMO_PROMPTS, Style
from .recipes import RECIPES
from .shipped import DemoModels, ensure_models
from .show import check_answers, how_to_call, print_answers, print_examples

BASE_NAME = "base"
KEPT_PORT = 8000  # where people look for a server; another one if it is taken
# A small cache and a short context: the demo runs beside whatever else this machine does.
SERVER_FLAGS = ("--served-model-name", BASE_NAME, "--max-model-len", "512", "--enforce-eager")


def register(app: typer.Typer) -> None:
    """Add `demo` to a program."""
    app.command("demo", epilog=ending("smoa-serve demo", "smoa-serve demo --keep --port 8000"))(run)


def run(
    root: Annotated[Path, typer.Option("--root", envvar="SMOA_DEMO_DIR", help="Where the demo's models lie.")] = Path(
        ".demo"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running until Ctrl-C.")] = False,
    port: Annotated[
        int | None, typer.Option("--port", help="Where to listen. Default: a free port, with --keep 8000 if free.")
    ] = None,
) -> None:
    """Serve the small base and the five adapters that come with the package, ask them all, show the answers."""
    # Wide enough for the table where it goes into a file.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    begin = time.monotonic()
    models = ensure_models(root, console)
    with _serving(models, port or free_port(KEPT_PORT if keep else 0), console) as server:
        asked = time.perf_counter()
        answers = ask_all(server.url, BASE_NAME, DEMO_PROMPTS, [Style.PLAIN, *(recipe.style for recipe in RECIPES)])
        print_answers(console, answers, time.perf_counter() - asked)
        check_answers(console, answers)
        if keep:
            print_examples(console, server.url, BASE_NAME)
            _serve_until_interrupted(server)
        console.print("shutting the server down")
    console.print(f"done in {time.monotonic() - begin:.0f} s")
    console.print(how_to_call(), highlight=False, soft_wrap=True)


@contextmanager
def _serving(models: DemoModels, port: int, console: Console) -> Iterator[ServerProcess]:
    """The demo's server, through this project's own command, started with one line of progress."""
    flags = ("--adapters-dir", models.adapters_dir, *SERVER_FLAGS)
    log_file, begin = models.root / "server.log", time.monotonic()
    with ExitStack() as stack:
        with console.status("starting the server") as status:

            def tick(waited_s: float, line: str) -> None:
                status.update(f"starting the server, {waited_s:.0f} s: {escape(line[: max(20, console.width - 40)])}")

            server = ServerProcess(models.base, *flags, port=port, log_file=log_file, progress=tick)
            stack.enter_context(server)
        waited_s = time.monotonic() - begin
        console.print(f"server ready at {server.url} after {waited_s:.0f} s, log in {log_file}", soft_wrap=True)
        yield server


def _serve_until_interrupted(server: ServerProcess) -> None:
    try:
        code = server.wait()
    except KeyboardInterrupt:
        return
    raise SmoaError(f"the server ended by itself with code {code}.\n{server.log_tail()}")
