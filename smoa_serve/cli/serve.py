"""`smoa-serve serve`: vLLM's own API server with this project's plugin, in this very process."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..plugin import register as register_plugin
from .serve_settings import load_settings
from .serve_vllm import VllmCommand, vllm_command

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
USAGE = "[MODEL] [OPTIONS] [ANY FLAG OF vllm serve]"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("serve", context_settings=PASS_THROUGH, options_metavar=USAGE)(serve)


def serve(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="An adapter; may be repeated.")
    ] = None,
    adapters_dir: Annotated[
        Path | None, typer.Option("--adapters-dir", help="Every sub-folder is an adapter of its name.")
    ] = None,
    adapters_root: Annotated[
        list[Path] | None,
        typer.Option("--adapters-root", help="Folder that adapters may be loaded from over HTTP; may be repeated."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Settings as YAML; see configs/.")] = None,
    allow_pickle: Annotated[
        bool | None, typer.Option("--allow-pickle/--no-allow-pickle", help="Read .bin adapter files (weights only).")
    ] = None,
    strict_order: Annotated[
        bool | None,
        typer.Option("--strict-order/--no-strict-order", help="Refuse a spectral order that is not fully determined."),
    ] = None,
    allow_hub: Annotated[
        bool | None, typer.Option("--allow-hub/--no-allow-hub", help="Let HTTP loads name a hub repository.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print vLLM's command and environment only.")] = False,
) -> None:
    """Serve a base model with SMoA, HiRA and LoRA adapters through vLLM's OpenAI-compatible API.

    MODEL comes first; every flag that is not listed here is vLLM's (vllm serve --help=all). Each flag can also be set
    as SMOA_SERVE_<FLAG>, vLLM's as SMOA_SERVE_VLLM_<FLAG>, and in the YAML file; flags win over the environment, the
    environment over the file.
    """
    flags = {
        "adapter": adapter,
        "adapters_dir": adapters_dir,
        "adapters_root": adapters_root,
        "allow_pickle": allow_pickle,
        "strict_order": strict_order,
        "allow_hub": allow_hub,
    }
    given: dict[str, object] = {name: value for name, value in flags.items() if value is not None}
    arguments = list(context.args)
    if arguments and not arguments[0].startswith("-"):
        given["model"] = arguments.pop(0)
    command = vllm_command(load_settings(given, os.environ, config), arguments, os.environ)
    if dry_run:
        typer.echo(command.shown())
        return
    run_vllm(command)


def run_vllm(command: VllmCommand) -> None:
    """Become vLLM's server; returns when it has shut down."""
    os.environ.update(command.environment)
    sys.argv = command.argv
    # vLLM only logs a plugin that fails to import; here the failure ends the start.
    register_plugin()
    from vllm.entrypoints.cli.main import main

    main()
