"""`smoa-serve adapters`: list, load, unload and move the adapters of a running server."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from ..program import ending
from ..settings import OthersGet
from .client import ServerClient

UrlOption = Annotated[str, typer.Option("--url", envvar="SMOA_URL", help="The server, e.g. http://localhost:8000.")]
KeyOption = Annotated[
    SecretStr | None,
    typer.Option("--api-key", envvar="SMOA_API_KEY", parser=SecretStr, metavar="KEY", help="The server's --api-key."),
]
NameArgument = Annotated[str, typer.Argument(help="Name of the adapter.")]
DEFAULT_URL = "http://localhost:8000"

app = typer.Typer(
    no_args_is_help=True,
    help="List, load, unload and move the adapters of a running server.",
    epilog=ending("smoa-serve adapters list --url http://localhost:8000"),
)


def register(parent: typer.Typer) -> None:
    """Add the commands to the program."""
    parent.add_typer(app, name="adapters")


@app.command("list", epilog=ending("smoa-serve adapters list --url http://localhost:8000"))
def list_adapters(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Every adapter that can be asked for, and where it resides."""
    found = ServerClient(url, api_key).adapters()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        Console().print(f"{url} serves no adapter; load one with: smoa-serve adapters load NAME PATH --url {url}")
        return
    Console().print(_table(found))


@app.command("load", epilog=ending("smoa-serve adapters load legal /adapters/legal-v2 --in-place"))
def load(
    name: Annotated[str, typer.Argument(help="What requests put into 'model'.")],
    path: Annotated[str, typer.Argument(help="On the server, inside one of its --adapters-root folders.")],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace the adapter of this name; running requests finish on the old.")
    ] = False,
) -> None:
    """Load an adapter into a running server."""
    typer.echo(ServerClient(url, api_key).load(name, path, in_place=in_place))


@app.command("unload", epilog=ending("smoa-serve adapters unload legal"))
def unload(
    name: NameArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Unload an adapter; requests that run finish."""
    typer.echo(ServerClient(url, api_key).unload(name))


@app.command("merge", epilog=ending("smoa-serve adapters merge legal --check"))
def merge(
    name: NameArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    others_get: Annotated[
        OthersGet, typer.Option("--others-get", "--policy", help="What requests of others get while it is merged.")
    ] = OthersGet.COMPENSATE,
    max_lost: Annotated[
        float | None,
        typer.Option("--max-lost", show_default="0.25", help="Share of an update that rounding may remove."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Ask some prompts before and after, and compare.")] = False,
) -> None:
    """Fold an adapter into the base weights: its requests then run as fast as the base's."""
    options: dict[str, object] = {"policy": others_get.value, "check": check}
    moved = ServerClient(url, api_key).move(
        name, "merge", options if max_lost is None else options | {"max_lost": max_lost}
    )
    _show(moved)
    typer.echo(f"rounding removed {float(moved['lost']):.2%} of the update (worst layer)")
    if check:
        agree = "agree" if moved["tokens_agree"] else "DIFFER"
        difference = float(moved["largest_logprob_difference"])
        typer.echo(f"greedy tokens before and after {agree}; largest difference of a logprob {difference:.2g}")


@app.command("unmerge", epilog=ending("smoa-serve adapters unmerge legal"))
def unmerge(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Give the original base weights back, bit for bit."""
    _show(ServerClient(url, api_key).move(name, "unmerge"))


@app.command("resident", epilog=ending("smoa-serve adapters resident legal"))
def resident(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Keep an adapter's finished update beside the weights: faster than from its factors, and takes memory."""
    _show(ServerClient(url, api_key).move(name, "resident"))


@app.command("slot", epilog=ending("smoa-serve adapters slot legal"))
def slot(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Back to the factors alone: un-merge, or give the resident memory back."""
    _show(ServerClient(url, api_key).move(name, "slot"))


@app.command("pin", epilog=ending("smoa-serve adapters pin legal"))
def pin(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Leave an adapter where it resides, whatever the automatic policy finds."""
    _show(ServerClient(url, api_key).move(name, "pin"))


@app.command("unpin", epilog=ending("smoa-serve adapters unpin legal"))
def unpin(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Let the automatic policy move an adapter again."""
    _show(ServerClient(url, api_key).move(name, "unpin"))


def _show(moved: Mapping[str, Any]) -> None:
    held = f", {_size(int(moved['bytes']))} held for it" if moved["bytes"] else ""
    took = (
        f" ({moved['seconds']:.1f} s, at most {moved['longest_call_ms']:.0f} ms at a time)" if moved["seconds"] else ""
    )
    typer.echo(f"{moved['name']} resides at: {moved['step']}{held}{took}")


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table("name", "kind", "r", "K", "size", "resides", "order", "requests", "digest")
    for entry in found:
        table.add_row(
            str(entry["name"]),
            str(entry["kind"]),
            str(entry["rank"]),
            str(entry["num_blocks"]),
            _size(int(entry["bytes"])),
            str(entry["residence"]),
            _order(entry),
            str(entry["requests"]),
            str(entry["digest"])[:12],
        )
    return table


def _order(entry: Mapping[str, Any]) -> str:
    """The order's status; a recomputed one with the error it may cause."""
    status, error = entry["order"], float(entry["order_error"])
    return f"{status or '-'} (error up to {error:.2f})" if error > 0 else str(status or "-")


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
