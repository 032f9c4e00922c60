"""What the program says of itself: `--help`, exit codes, and the pages that are written from it."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from smoa_serve.cli import app as program
from smoa_serve.program import EXIT_CODES
from smoa_serve.settings import FIELDS, OTHER_VARIABLES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_reference.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_script()
COMMANDS = {" ".join(path): command for path, command in reference.commands(typer.main.get_command(program.app))}


def options(command: Any) -> Iterator[Any]:
    yield from (parameter for parameter in command.params if parameter.param_type_name == "option")


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_reference_is_what_the_program_says(page: str) -> None:
    written = (reference.FOLDER / page).read_text(encoding="utf-8")
    assert written == reference.PAGES[page](), f"docs/reference/{page} is stale; run: python scripts/make_reference.py"


def test_a_stale_page_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_reference.py"])
    reference.main()
    monkeypatch.setattr(sys, "argv", ["make_reference.py", "--check"])
    reference.main()
    (tmp_path / "cli.md").write_text("older")
    with pytest.raises(SystemExit, match=r"stale: cli\.md"):
        reference.main()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_and_exit_codes(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    *examples, codes = command.epilog.split("\n\n")
    assert examples
    assert all(example.startswith(f"Example: {name}") for example in examples)
    assert all(f"{code} " in codes for code in EXIT_CODES)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name: str) -> None:
    assert [option.opts for option in options(COMMANDS[name]) if not option.help] == []


def test_examples_can_be_read() -> None:
    """Each example's words are arguments and options that its command has."""
    for name, command in COMMANDS.items():
        for line in command.epilog.split("\n\n")[:-1]:
            words = line.removeprefix("Example: ").split()
            path = " ".join(word for word in words[:3] if " ".join(words[: words.index(word) + 1]) in COMMANDS)
            known = {flag for option in options(COMMANDS[path]) for flag in [*option.opts, *option.secondary_opts]}
            flags = {word for word in words if word.startswith("--")} - {"--port"}  # vLLM's
            assert flags <= known, (name, line)


def test_every_setting_and_variable_is_in_the_reference() -> None:
    page = reference.settings_page()
    for name in [variable for declared in FIELDS.values() for variable in declared.variables[:1]] + [*OTHER_VARIABLES]:
        assert f"`{name}`" in page


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["serve", "m", "--dry-run"], 0),
        (["serve"], 1),
        (["serve", "m", "--ladder-mib", "many"], 2),
        (["nothing"], 2),
        (["verify", "nowhere"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_exit_codes_are_as_documented(arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["smoa-serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == code


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smoa_serve.cli.serve.load_settings", interrupted)
    monkeypatch.setattr("sys.argv", ["smoa-serve", "serve", "m"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 130


def test_the_script_runs_by_itself() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
