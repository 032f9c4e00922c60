"""vLLM's own flags as settings: their names, which of them are secrets, and values that stay as they were written."""

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import SecretStr

# What no message may show, and those whose value may be any word, a number or "null" too.
SECRET_FLAGS = frozenset({"api-key", "hf-token"})
TEXT_FLAGS = frozenset({"api-key", "chat-template", "code-revision", "download-dir", "host", "response-role", "uds"})
TEXT_FLAGS |= {"revision", "root-path", "served-model-name", "ssl-ca-certs", "ssl-certfile", "ssl-keyfile"}
TEXT_FLAGS |= {"tokenizer", "tokenizer-revision"}
FlagValue = bool | int | float | str | SecretStr | list[Any] | dict[str, Any] | None


def flag_name(name: object) -> str:
    """As vLLM spells it: "--max_loras" → "max-loras"."""
    return str(name).removeprefix("--").replace("_", "-")


def checked_flags(given: dict[Any, Any]) -> dict[str, FlagValue]:
    """Flags under vLLM's names, keys and tokens as secrets.

    Raises:
        ValueError: a text that YAML does not read as one, or a key that vLLM takes for none.
    """
    flags = {flag_name(key): value for key, value in given.items()}
    for name in flags.keys() & TEXT_FLAGS:
        values = flags[name] if isinstance(flags[name], list) else [flags[name]]
        if any(isinstance(value, bool) or value is None for value in values):
            raise ValueError(f"{name} is a word that YAML does not read as text; put it in quotes")
        if name == "api-key" and any(revealed(value) in {"", "None"} for value in values):
            raise ValueError("vLLM takes an api-key that is empty or None for no key at all; choose another")
    return {name: _secret(value) if name in SECRET_FLAGS else value for name, value in flags.items()}


def _secret(value: object) -> Any:
    if isinstance(value, list):
        return [_secret(item) for item in value]
    return value if isinstance(value, bool | SecretStr) or value is None else SecretStr(str(value))


def revealed(value: Any) -> Any:
    """A flag's value with its secrets open, for vLLM alone."""
    if isinstance(value, list):
        return [revealed(item) for item in value]
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def shown(value: object) -> str:
    """What JSON has no word for, as it may be shown: a secret masked, all else as text."""
    return "***" if isinstance(value, SecretStr) else str(value)


def as_arguments(name: str, value: FlagValue) -> list[str]:
    """One flag as vLLM's parser takes it."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if value is None:
        return []
    value = revealed(value)
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def flag_names(arguments: Sequence[str]) -> set[str]:
    """Names of the long flags among raw arguments, as vLLM spells them: "--max_loras=2" → "max-loras"."""
    return {flag_name(argument.partition("=")[0]) for argument in arguments if argument.startswith("--")}


def masked(arguments: Sequence[str]) -> list[str]:
    """Raw arguments as they may be shown: without keys and tokens, in whatever way these are given."""
    result: list[str] = []
    secret = False
    for argument in arguments:
        if argument.startswith("-"):
            name, separator, _ = argument.partition("=")
            flag = flag_name(name)
            # argparse takes the beginning of a flag for the flag.
            secret = len(flag) > 2 and any(known.startswith(flag) for known in SECRET_FLAGS)
            result.append(f"{name}=***" if secret and separator else argument)
        else:
            result.append("***" if secret else argument)
    return result


def value_of(flag: str, text: str) -> object:
    """A variable's value: a switch, a list or a mapping where YAML reads one, else the text as it stands.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it begins as YAML and is none.
    """
    if flag in TEXT_FLAGS and not (flag == "served-model-name" and text.startswith("[")):
        return text
    return exact(yaml.safe_load(text), text, none=text)


def exact(value: object, written: object, *, none: object = None) -> object:
    """What YAML reads, but numbers and dates as they are written: 0123 would be 83, and 1.10 would be 1.1."""
    if value is None:
        return none
    if isinstance(value, list) and isinstance(written, list):
        return [exact(item, text) for item, text in zip(value, written, strict=True)]
    if isinstance(value, bool | str | list | dict) or not isinstance(written, str):
        return value
    return value if isinstance(value, int | float) and str(value) == written else written


def yaml_problem(error: Exception) -> str:
    """Where and why, without the text itself, which may be a key."""
    mark = getattr(error, "problem_mark", None)
    problem = re.sub(r"'[^']*'", "'…'", str(getattr(error, "problem", None) or "it is no YAML"))
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
