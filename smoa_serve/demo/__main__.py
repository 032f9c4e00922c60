"""`python -m smoa_serve.demo`: build the demo's models, serve them, ask them."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..cli.running import run_app
from ..errors import SmoaError
from . import shipped
from .adapters import RECIPES
from .asking import ask_all
from .corpus import DEMO_PROMPTS, Style
from .models import DemoModels, ensure_models, rebuild_models
from .server import ServerProcess, free_port, serve_command
from .showing import check_answers, print_answers, print_examples

BASE_NAME = "base"
KEPT_PORT = 8000  # where people look for a server; another one if it is taken
# A small cache and a short context: the demo runs beside whatever else this machine does.
SERVER_FLAGS = ("--served-model-name", BASE_NAME, "--max-model-len", "512", "--enforce-eager")
SERVER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU: little cache, and one thread, which is the fastest for a model this small.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

RootOption = Annotated[Path, typer.Option("--root", envvar="SMOA_DEMO_DIR", help="Where the demo's models lie.")]
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command("models")
def models_command(
    root: RootOption = Path(".demo"),
    ship: Annotated[bool, typer.Option("--ship", help="Put them into the project, where the demo finds them.")] = False,
) -> None:
    """Train the base and its adapters anew (about six minutes on two cores)."""
    console = _console()
    built = rebuild_models(root, console)
    console.print(f"base {built.base}, adapters {built.adapters_dir}", soft_wrap=True)
    if ship:
        size = shipped.ship(root)
        console.print(f"{shipped.FOLDER} now holds them: {size / 1e6:.1f} MB", soft_wrap=True)


@app.command("run")
def run(
    root: RootOption = Path(".demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running until Ctrl-C.")] = False,
    port: Annotated[
        int | None, typer.Option("--port", help="Where to listen. Default: a free port, with --keep 8000 if free.")
    ] = None,
) -> None:
    """Build what is missing, serve it, ask every model every prompt at once, print the answers."""
    console = _console()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    begin = time.monotonic()
    models = ensure_models(root, console)
    with start_server(models, port or free_port(KEPT_PORT if keep else 0)) as server:
        wait_with_status(server, console)
        asked = time.perf_counter()
        answers = ask_all(server.url, BASE_NAME, DEMO_PROMPTS, [Style.PLAIN, *(recipe.style for recipe in RECIPES)])
        print_answers(console, answers, time.perf_counter() - asked)
        check_answers(console, answers)
        if keep:
            print_examples(console, server.url, BASE_NAME)
            _serve_until_interrupted(server)
        console.print("shutting the server down")
    console.print(f"done in {time.monotonic() - begin:.0f} s")


def _console() -> Console:
    """Standard output; wide enough for the table where it goes into a file."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def start_server(models: DemoModels, port: int) -> ServerProcess:
    """The demo's server, through this project's own command."""
    command = serve_command(models.base, ["--adapters-dir", str(models.adapters_dir), *SERVER_FLAGS], port)
    return ServerProcess(command, port, models.root / "server.log", SERVER_ENVIRONMENT)


def wait_with_status(server: ServerProcess, console: Console) -> None:
    """Wait for the server with one line of progress."""
    with console.status("starting the server") as status:

        def tick(waited_s: float, line: str) -> None:
            status.update(f"starting the server, {waited_s:.0f} s: {escape(line[: max(20, console.width - 40)])}")

        waited_s = server.wait_ready(tick)
    console.print(f"server ready at {server.url} after {waited_s:.0f} s, log in {server.log_file}", soft_wrap=True)


def _serve_until_interrupted(server: ServerProcess) -> None:
    try:
        code = server.wait()
    except KeyboardInterrupt:
        return
    raise SmoaError(f"the server ended by itself with code {code}.\n{server.log_tail()}")


def main() -> None:
    """Run the demo."""
    run_app(app)


if __name__ == "__main__":
    main()
