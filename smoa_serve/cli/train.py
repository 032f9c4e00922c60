"""`smoa-serve train`: a fine-tune from a YAML file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from ..program import ending

NEEDED = {"peft", "transformers", "accelerate"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("train", epilog=ending("smoa-serve train configs/train-smoa.yaml --set adapter.r=16"))(train_command)


def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/train-smoa.yaml.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set adapter.r=16.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
) -> None:
    """Fine-tune an adapter (SMoA, HiRA or LoRA) on JSONL data and write it where the server can read it.

    Several GPUs: accelerate launch -m smoa_serve.cli.app train CONFIG.
    """
    try:
        from ..train import load_config, train
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise ConfigError(f"training needs {error.name}; install it with: pip install 'smoa-serve[train]'") from error
    settings = load_config(config, assignments or [])
    report = train(settings, Console(), resume=resume)
    if not report:  # another process than the first
        return
    loss, adapter = report["loss"], report["adapter"]
    figures = f"loss {loss['first']:.4f} to {loss['last']:.4f}, " if "first" in loss else ""
    Console().print(
        f"{settings.output}: {adapter['kind']}, {adapter['trainable_parameters']} numbers, {report['steps']} steps in "
        f"{report['seconds']:.0f} s, {figures}digest {adapter['digest']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
