"""`smoa-serve serve`: vLLM's own API server with this project's plugin, in this very process."""

import difflib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from ..errors import ConfigError
from ..plugin import register as register_plugin
from ..program import ending
from ..settings import FIELDS, SECTIONS, load_settings
from ..settings.vllm_flags import masked
from .serve_vllm import VllmCommand, vllm_command

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
USAGE = "[MODEL] [OPTIONS] [ANY FLAG OF vllm serve]"
NEARLY = 0.85  # how alike a flag has to be to one of ours to be taken for a mistyped one


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    example = ending(
        "smoa-serve serve /models/base --adapters-dir /adapters --port 8000",
        "smoa-serve serve --config server.yaml --auto-merge --dry-run",
    )
    app.command("serve", context_settings=PASS_THROUGH, options_metavar=USAGE, epilog=example)(serve)


def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings as YAML.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print vLLM's command and environment only.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print all settings and who set them, as one JSON object.")
    ] = False,
    **flags: object,
) -> None:
    """Serve a base model with SMoA, HiRA and LoRA adapters through vLLM's OpenAI-compatible API.

    MODEL comes first. Every flag that is not listed here is vLLM's:
    vllm serve --help=all.

    Each flag is a variable, too: --auto-merge is SMOA_AUTO_MERGE, vLLM's --port
    SMOA_SERVE_VLLM_PORT. And it is a key of the YAML file. A flag wins over a
    variable, a variable over the file.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    arguments = list(context.args)
    if arguments and not arguments[0].startswith("-"):
        given["model"] = arguments.pop(0)
    if as_json and not dry_run:
        raise ConfigError("--json belongs to --dry-run")
    refuse_mistyped(arguments)
    settings, origins = load_settings(given, os.environ, config)
    command = vllm_command(settings, arguments, os.environ)
    if as_json:
        shown = {"settings": command.settings.shown(), "from": origins, "command": masked(command.argv)}
        typer.echo(json.dumps(shown, indent=2))
    elif dry_run:
        typer.echo(command.shown())
    else:
        run_vllm(command)


def run_vllm(command: VllmCommand) -> None:
    """Become vLLM's server; returns when it has shut down."""
    os.environ.update(command.environment)
    sys.argv = command.argv
    # vLLM only logs a plugin that fails to import; here the failure ends the start.
    register_plugin()
    from vllm.entrypoints.cli.main import main

    main()


def _options() -> Iterator[inspect.Parameter]:
    """A flag for every setting but `model`, which is the argument that comes first. None: it was not given."""
    for declared in FIELDS.values():
        if declared.section is None:
            continue
        kind: Any = declared.info.annotation
        several = get_origin(kind) in (dict, tuple)
        option = typer.Option(
            f"--{declared.name}/--no-{declared.name}" if declared.holds(bool) else f"--{declared.name}",
            help=declared.info.description,
            show_default=declared.default,
            metavar="NAME=PATH" if get_origin(kind) is dict else "DIR" if declared.holds(Path) else None,
            rich_help_panel=str(SECTIONS[declared.section].__doc__).rstrip("."),
        )
        annotation = Annotated[list[str] | None if several else kind | None, option]  # type: ignore[valid-type]
        yield inspect.Parameter(declared.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def refuse_mistyped(arguments: Sequence[str]) -> None:
    """vLLM's parser refuses what it does not know, and knows nothing of our flags.

    Raises:
        ConfigError: a flag that is nearly one of ours.
    """
    ours = [f"--{declared.name}" for declared in FIELDS.values() if declared.section]
    ours += [f"--no-{declared.name}" for declared in FIELDS.values() if declared.holds(bool)]
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        nearest = difflib.get_close_matches(flag, ours, n=1, cutoff=NEARLY) if flag.startswith("--") else []
        if nearest:
            raise ConfigError(f"the flag {flag} is not known; the nearest is {nearest[0]}")


_signature = inspect.signature(serve)
_own = list(_signature.parameters.values())[:-1]  # the last takes every flag of the tree
serve.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[*(p.replace(kind=p.KEYWORD_ONLY) for p in _own), *_options()]
)
