"""The commands that work on adapter files without an engine: convert, inspect, verify, merge."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ..adapters import LoadOptions, open_adapter
from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress as ProgressCallback
from ..errors import SmoaError
from ..offline.checkpoint import load_deltas
from ..offline.checkpoint import merge as merge_adapter
from ..offline.convert import TargetFormat
from ..offline.convert import convert as convert_adapter
from ..offline.inspect import AdapterReport, inspect_adapter
from ..offline.record import merged_note
from ..program import ending


class Dtype(StrEnum):
    """Dtypes of a model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


AdapterArgument = Annotated[Path, typer.Argument(help="Adapter folder, Trainer checkpoint or weight file.")]
BaseOption = Annotated[str, typer.Option("--base", help="Base model: a folder or a hub id.")]
OptionalBase = Annotated[str | None, typer.Option("--base", help="Base model: a folder or a hub id.")]
OutOption = Annotated[Path, typer.Option("--out", help="New or empty folder to write.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin files (weights only).")]
StrictOrder = Annotated[
    bool, typer.Option("--strict-order", help="Refuse a spectral order that is not fully determined.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", show_default="its own", help="adapter_config.json, for a Trainer checkpoint.")
]
NameOption = Annotated[
    str | None, typer.Option("--adapter-name", show_default="the only one", help="Which, where there are several.")
]
TrainedDtype = Annotated[
    Dtype | None, typer.Option("--trained-dtype", show_default="as stored", help="The base's dtype at training.")
]
CheckDevice = Annotated[str, typer.Option("--check-device", help="Where the float64 check of an order runs.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    example = "smoa-serve convert adapters/mine --base /models/base --out /adapters/mine"
    app.command("convert", epilog=ending(example))(convert)
    app.command("inspect", epilog=ending("smoa-serve inspect adapters/mine --base /models/base"))(inspect_command)
    app.command("verify", epilog=ending("smoa-serve verify adapters/mine --base /models/base"))(verify)
    example = "smoa-serve merge --base /models/base --adapter adapters/mine --out /models/merged --check"
    app.command("merge", epilog=ending(example))(merge)


def convert(
    adapter: AdapterArgument,
    out: OutOption,
    to: Annotated[TargetFormat, typer.Option("--to", help="Format to write.")] = TargetFormat.PORTABLE,
    base: OptionalBase = None,
    allow_pickle: AllowPickle = False,
    strict_order: StrictOrder = False,
    config: ConfigOption = None,
    adapter_name: NameOption = None,
    trained_dtype: TrainedDtype = None,
    check_device: CheckDevice = "cpu",
) -> None:
    """Write an adapter in the portable format (exact on any machine) or as PEFT HiRA (lossless)."""
    options = LoadOptions(allow_pickle, strict_order, config, adapter_name, None, trained_dtype, check_device)
    with _shown_errors():
        opened = BaseCheckpoint.open(base) if base else None
        _print_merged_note(opened)
        with _progress("spectral orders") as progress:
            written = convert_adapter(adapter, out, to, opened, options, progress=progress)
    console = Console()
    console.print(f"{out}: {to.value}, {len(written.modules)} layers, from digest {written.digest}", soft_wrap=True)
    _print_order_error(written.order_error)


def inspect_command(
    adapter: AdapterArgument,
    base: OptionalBase = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    allow_pickle: AllowPickle = False,
    config: ConfigOption = None,
    adapter_name: NameOption = None,
    trained_dtype: TrainedDtype = None,
    check_device: CheckDevice = "cpu",
) -> None:
    """Show configuration, size, digest and, with --base, the expected order error of each layer and whether it fits."""
    options = LoadOptions(allow_pickle, False, config, adapter_name, None, trained_dtype, check_device)
    with _shown_errors():
        opened = BaseCheckpoint.open(base) if base else None
        with _progress("spectral orders") as progress:
            report = inspect_adapter(adapter, opened, options, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        _print_report(report)


def verify(
    adapter: AdapterArgument,
    base: BaseOption,
    allow_pickle: AllowPickle = False,
    strict_order: StrictOrder = False,
    config: ConfigOption = None,
    adapter_name: NameOption = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", help="Refuse branches of a higher rank.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", show_default="the base's", help="The server's --dtype.")
    ] = None,
    trained_dtype: TrainedDtype = None,
    check_device: CheckDevice = "cpu",
) -> None:
    """Bind every tensor against the base, as a server would; exit 0, or 1 with every reason."""
    options = LoadOptions(allow_pickle, strict_order, config, adapter_name, max_rank, trained_dtype, check_device)
    with _shown_errors():
        opened = BaseCheckpoint.open(base)
        _print_merged_note(opened)
        with _progress("spectral orders") as progress:
            served = dtype.value if dtype else None
            found = open_adapter(adapter, options, progress=progress).check(opened, served)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{adapter}: fits {base}, {found.layers} layers", markup=False)
    if not found.exact:
        unknown = "this file format does not record which weights it was trained on"
        console.print(f"names and shapes only: {'the base is quantized' if opened.quantized_modules else unknown}")
    _print_order_error(found.order_error)


def merge(
    base: BaseOption,
    adapter: Annotated[Path, typer.Option("--adapter", help="SMoA, HiRA or plain LoRA adapter.")],
    out: OutOption,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", show_default="as stored", help="Of what is written.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare logits afterwards (needs transformers).")] = False,
    max_lost: Annotated[
        float | None,
        typer.Option("--max-lost", help="Refuse when rounding removes a larger share of an update."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Merge also what the base holds already, or what names another base.")
    ] = False,
    allow_pickle: AllowPickle = False,
    strict_order: StrictOrder = False,
    config: ConfigOption = None,
    adapter_name: NameOption = None,
    trained_dtype: TrainedDtype = None,
) -> None:
    """Write base + adapter as an ordinary Hugging Face checkpoint, tensor by tensor."""
    options = LoadOptions(allow_pickle, strict_order, config, adapter_name, None, trained_dtype)
    console = Console()
    with _shown_errors():
        opened = BaseCheckpoint.open(base)
        _print_merged_note(opened)
        with _progress("spectral orders") as progress:
            deltas = load_deltas(adapter, opened, options, progress=progress)
        with _progress("merging", unit=2**20) as progress:
            written = merge_adapter(
                opened,
                deltas,
                out,
                dtype=dtype.value if dtype else None,
                max_lost=max_lost,
                force=force,
                progress=progress,
            )
        console.print(f"{out}: {len(deltas)} layers merged", soft_wrap=True)
        worst = max(written.lost, key=lambda name: written.lost[name])
        console.print(f"rounding removed up to {written.lost[worst]:.2%} of an update ({worst})", soft_wrap=True)
        if check:
            from ..offline.check import check_merge

            result = check_merge(opened, deltas, out)
            console.print(f"largest difference of a logit {result.max_abs:.2e}, allowed {result.allowed:.2e}")
            if not result.passed:
                raise SmoaError(f"{out}: the merged model does not compute what the adapter does")


def _print_merged_note(base: BaseCheckpoint | None) -> None:
    note = merged_note(base) if base is not None else None
    if note is not None:
        Console(stderr=True).print(f"[bold yellow]warning[/]: {escape(note)}", soft_wrap=True, highlight=False)


def _print_order_error(order_error: float) -> None:
    if order_error > 0:
        Console().print(f"expected error of the update from the recomputed order: up to {order_error:.3f}")


@contextmanager
def _shown_errors() -> Iterator[None]:
    """One clear message and exit code 1 instead of a traceback."""
    try:
        yield
    except SmoaError as error:
        Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


@contextmanager
def _progress(what: str, *, unit: int = 1) -> Iterator[ProgressCallback]:
    """A bar on stderr that appears with the first call."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{what} {name}", completed=done // unit, total=total // unit, visible=True)

        yield report


def _print_report(report: AdapterReport) -> None:
    console = Console()
    facts = {k: v for k, v in report.as_json().items() if k not in {"modules", "config", "problems"}}
    settings = {f"config.{k}": v for k, v in report.config.items() if k != "modules"}
    for key, value in (facts | settings).items():
        if value is not None:
            console.print(f"{key:32}{value}", soft_wrap=True, markup=False, highlight=False)
    layers = Table(Column("layer", overflow="fold"), "H_out × H_in", "branch ranks", "expected order error")
    for module in report.modules:
        shape = f"{module.shape[0]} × {module.shape[1]}" if module.shape else "?"
        error = "needs --base" if module.order_error is None else f"{module.order_error:.3f}"
        layers.add_row(module.name, shape, ", ".join(map(str, module.branch_ranks)), error)
    console.print(layers)
    for problem in report.problems:
        console.print(f"does not fit: {escape(problem)}", soft_wrap=True)
