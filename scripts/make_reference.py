"""Write docs/reference/cli.md and settings.md from the program and the tree of settings.

    python scripts/make_reference.py [--check]

--check writes nothing and ends with 1 when a page is stale.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

from smoa_serve.cli.app import app
from smoa_serve.program import EXIT_CODES
from smoa_serve.settings import FIELDS, OTHER_VARIABLES, SECTIONS, Declared

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
PROGRAM = "smoa-serve"
WRITTEN = "<!-- Written by scripts/make_reference.py: change the program, not this page. -->"
CLI_INTRO = f"""{WRITTEN}
# Command line

Every command has `--help`. Errors go to stderr, results to stdout.

| exit code | meaning |
|---|---|
{{codes}}

These numbers do not change from release to release.
"""
SETTINGS_INTRO = f"""{WRITTEN}
# Settings

A setting has one name. It is a flag of `smoa-serve serve`, a key of its YAML file and an environment variable:

| where | how |
|---|---|
| flag | `--auto-merge`, `--policy-interval-s 2`; switches have `--no-…` too |
| variable | `SMOA_AUTO_MERGE=1`, `SMOA_POLICY_INTERVAL_S=2` |
| file (`--config`) | `residence: {{auto-merge: true, policy-interval-s: 2}}`; the section may be left out |
| `SMOA_SETTINGS` | the same tree as one JSON object |

The first of these counts: the flag, `SMOA_SETTINGS`, the variable, the file, the default. Adapters are merged by name.
A name that is not known is an error that names the nearest one.

`smoa-serve serve` hands the whole tree to vLLM's processes in `SMOA_SETTINGS`. Plain `vllm serve` reads the variables.
`smoa-serve serve … --dry-run --json` prints the whole tree, and for each value where it was said. Keys and tokens are
masked.
"""
LIMITS = {"ge": "≥", "gt": ">"}
VLLM = """## vLLM's own flags

They stand under `vllm:` in the file, or in `SMOA_SERVE_VLLM_<FLAG>`, or on the command line as they are. A flag on the
command line counts more than a variable, and that more than the file. Each is replaced as a whole.

| flag | variable | file |
|---|---|---|
| `--max-model-len 8192` | `SMOA_SERVE_VLLM_MAX_MODEL_LEN=8192` | `vllm: {max-model-len: 8192}` |

A variable's value reaches vLLM as it is written. Only `true`, `false`, lists and mappings are read as YAML.
"""


def commands(command: Any, path: tuple[str, ...] = (PROGRAM,)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the program with its path, groups before what is in them."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def cli_page() -> str:
    """The commands, their arguments and options."""
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    parts = [CLI_INTRO.format(codes=codes)]
    for path, command in commands(typer.main.get_command(app)):
        parts.append(f"## {' '.join(path)}\n\n{_paragraphs(command.help)}\n")
        if hasattr(command, "commands"):
            parts.append("".join(f"- `{' '.join((*path, name))}`\n" for name in command.commands))
            continue
        annotations = inspect.signature(command.callback, eval_str=True).parameters
        shown = [parameter for parameter in command.params if "--help" not in parameter.opts]
        rows = [_row(parameter, _bare(annotations[parameter.name].annotation)) for parameter in shown]
        parts.append("| | meaning | default |\n|---|---|---|\n" + "".join(rows))
        examples = [line.removeprefix("Example: ") for line in command.epilog.split("\n\n")[:-1]]
        parts.append("```bash\n" + "\n".join(examples) + "\n```\n")
    return "\n".join(parts)


def settings_page() -> str:
    """Every setting, and the other variables."""
    parts = [SETTINGS_INTRO, "## The base\n\n" + _table([FIELDS["model"]])]
    for section, kind in SECTIONS.items():
        inside = [declared for declared in FIELDS.values() if declared.section == section]
        parts.append(f"## `{section}`\n\n{kind.__doc__}\n\n{_table(inside)}")
    older = [(name, d) for d in FIELDS.values() for name in d.variables[1:] if not name.startswith("SMOA_SERVE_")]
    known = [f"| `{variable}` | {who} |" for variable, who in OTHER_VARIABLES.items()]
    parts += [
        VLLM,
        "## Older names\n\nThey mean the same for one more release; so does `SMOA_SERVE_<NAME>` for each setting.\n\n"
        "| older | now |\n|---|---|\n" + "".join(f"| `{name}` | `{d.variables[0]}` |\n" for name, d in older),
        "## Other variables\n\n| variable | who reads it |\n|---|---|\n" + "\n".join(known) + "\n",
        "`SMOA_TEST_…` belongs to the tests. Any other `SMOA_…` is an error.\n",
    ]
    return "\n".join(parts)


def _table(settings: list[Declared]) -> str:
    rows = [
        f"| {f'`--{d.name}`' if d.section else '`MODEL`'} | `{d.variables[0]}` | {_kind(d)} | {d.default} "
        f"| {d.info.description} |\n"
        for d in settings
    ]
    return "| flag | variable | type | default | meaning |\n|---|---|---|---|---|\n" + "".join(rows)


def _kind(declared: Declared) -> str:
    annotation = declared.info.annotation
    if get_origin(annotation) is dict:
        return "`NAME=PATH …`"
    if get_origin(annotation) is tuple:
        return "folders, separated like PATH"
    (kind,) = (kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))
    if issubclass(kind, Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    words = {bool: "switch", int: "whole number", float: "number", Path: "folder", str: "text"}
    limits = [f"{LIMITS[name]} {value}" for part in declared.info.metadata for name, value in vars_of(part).items()]
    return ", ".join([words[kind], *limits])


def vars_of(limit: Any) -> dict[str, object]:
    """What pydantic keeps of `ge=0`."""
    return {name: getattr(limit, name) for name in LIMITS if hasattr(limit, name)}


def _row(parameter: Any, annotation: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    choices = [member.value for kind in (annotation, *get_args(annotation)) if _is_enum(kind) for member in kind]
    value = parameter.metavar or "|".join(choices)
    variable = f" Also `{parameter.envvar}`." if parameter.envvar else ""
    shown = f" `{value}`".replace("|", "\\|") if value else ""
    return f"| {names}{shown} | {parameter.help or ''}{variable} | {default_of(parameter)} |\n"


def _bare(annotation: Any) -> Any:
    """Annotated[T, ...] → T."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def default_of(parameter: Any) -> str:
    """A parameter's default in words."""
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else "off"
    default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    return "none" if default is None else str(default)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


PAGES = {"cli.md": cli_page, "settings.md": settings_page}


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [name for name, page in PAGES.items() if not _same(FOLDER / name, page())]
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run: python scripts/make_reference.py")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in [] if check else stale:
        (FOLDER / name).write_text(PAGES[name](), encoding="utf-8")


def _same(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    main()
