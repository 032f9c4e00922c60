"""Settings of `smoa-serve serve`: flag > environment (SMOA_SERVE_<FLAG>) > YAML file > default."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import ConfigError

PREFIX = "SMOA_SERVE_"
VLLM_PREFIX = "SMOA_SERVE_VLLM_"
# Set by us for the plugin, or naming the file itself: no settings of `serve`.
_OTHER_VARIABLES = {"SMOA_SERVE_REQUIRED", "SMOA_SERVE_CONFIG"}
_MAPPINGS = ("adapter", "vllm")
# Of vLLM's flags: what no message may show, and those whose value may be any word, a number or "null" too.
SECRET_FLAGS = frozenset({"api-key", "hf-token"})
TEXT_FLAGS = frozenset(
    {
        "api-key",
        "chat-template",
        "code-revision",
        "download-dir",
        "host",
        "response-role",
        "revision",
        "root-path",
        "served-model-name",
        "ssl-ca-certs",
        "ssl-certfile",
        "ssl-keyfile",
        "tokenizer",
        "tokenizer-revision",
        "uds",
    }
)
FlagValue = bool | int | float | str | list[Any] | dict[str, Any] | None


class ServeSettings(BaseModel):
    """What `smoa-serve serve` can be told; every field is a flag, a YAML key and SMOA_SERVE_<FIELD>.

    Attributes:
        model: the base: a folder or a hub id.
        adapter: name → path of an adapter served from the start.
        adapters_dir: every sub-folder with an adapter_config.json is an adapter of that name.
        adapters_root: folders that HTTP loads are confined to, beside adapters_dir.
        allow_pickle: read `.bin` adapter files (weights only); None = as SMOA_ALLOW_PICKLE says, likewise below.
        strict_order: refuse published files whose spectral order is not fully determined.
        allow_hub: let HTTP loads name a repository of the hub.
        vllm: vLLM's own flags, name → value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    adapter: dict[str, str] = Field(default_factory=dict)
    adapters_dir: Path | None = None
    adapters_root: tuple[Path, ...] = ()
    allow_pickle: bool | None = None
    strict_order: bool | None = None
    allow_hub: bool | None = None
    vllm: dict[str, FlagValue] = Field(default_factory=dict)

    @field_validator("adapter", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split()
        if not isinstance(value, list):
            return value
        pairs = [str(item).partition("=") for item in value]
        wrong = [name for name, separator, path in pairs if not (separator and name and path)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not NAME=PATH")
        names = [name for name, _, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the adapter name {twice[0]!r} is given twice")
        return {name: path for name, _, path in pairs}

    @field_validator("adapters_root", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @field_validator("vllm", mode="before")
    @classmethod
    def _flag_names(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        flags = {_flag_name(key): flag for key, flag in value.items()}
        for name in flags.keys() & TEXT_FLAGS:
            values = flags[name] if isinstance(flags[name], list) else [flags[name]]
            if any(isinstance(value, bool) or value is None for value in values):
                raise ValueError(f"{name} is a word that YAML does not read as text; put it in quotes")
            if name == "api-key" and any(value in {"", "None"} for value in values):
                raise ValueError("vLLM takes an api-key that is empty or None for no key at all; choose another")
        return flags


def load_settings(
    flags: Mapping[str, object], environment: Mapping[str, str], config_file: Path | None
) -> ServeSettings:
    """Merge the four sources. Adapters and vLLM flags are merged by name, everything else is replaced.

    Args:
        flags: given on the command line, by field name.
        environment: usually os.environ.
        config_file: --config; SMOA_SERVE_CONFIG where it is None.

    Raises:
        ConfigError: an unknown key or a value that cannot be used, with its source.
    """
    file = config_file or (Path(environment["SMOA_SERVE_CONFIG"]) if environment.get("SMOA_SERVE_CONFIG") else None)
    sources = [("the environment", read_environment(environment)), ("the command line", dict(flags))]
    if file is not None:
        sources.insert(0, (str(file), read_yaml(file)))
    merged: dict[str, Any] = {}
    for origin, given in sources:
        checked = _validated(origin, given)
        for field in given:
            value = getattr(checked, field)
            merged[field] = merged.get(field, {}) | value if field in _MAPPINGS else value
    return ServeSettings.model_validate(merged)


def read_yaml(file: Path) -> dict[str, object]:
    """The keys of a settings file; dashes and underscores are the same.

    Raises:
        ConfigError: unreadable, no mapping, or a key that is not known.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content, as_written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {file} cannot be read: {_yaml_problem(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no mapping of settings, but a {type(content).__name__}")
    keys = {str(key): str(key).replace("-", "_") for key in content}
    unknown = [_unknown(key, file) for key, field in keys.items() if field not in ServeSettings.model_fields]
    if unknown:
        raise ConfigError("; ".join(unknown))
    if isinstance(content.get("vllm"), dict):
        written = as_written["vllm"]
        content["vllm"] = {key: _exact(flag, written.get(str(key))) for key, flag in content["vllm"].items()}
    return {keys[str(key)]: value for key, value in content.items() if value is not None}


def read_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """The settings among the variables: SMOA_SERVE_<FIELD>, and SMOA_SERVE_VLLM_<FLAG> for any flag of vLLM.

    Raises:
        ConfigError: a variable of ours that is not known.
    """
    given: dict[str, object] = {}
    vllm: dict[str, object] = {}
    for name in sorted(environment):
        value = environment[name]
        if not name.startswith(PREFIX) or name in _OTHER_VARIABLES or not value:
            continue
        field = name.removeprefix(PREFIX).lower()
        if name.startswith(VLLM_PREFIX):
            vllm[_flag_name(name.removeprefix(VLLM_PREFIX).lower())] = _flag_value(name, value)
        elif field in ServeSettings.model_fields and field != "vllm":
            given[field] = value
        else:
            names = [f"{PREFIX}{known.upper()}" for known in ServeSettings.model_fields if known != "vllm"]
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"the environment variable {name} is not known; the nearest is {nearest}")
    return given | ({"vllm": vllm} if vllm else {})


def _flag_value(name: str, text: str) -> object:
    """A variable's value: a switch, a list or a mapping where YAML reads one, else the text as it stands."""
    flag = _flag_name(name.removeprefix(VLLM_PREFIX).lower())
    if flag in TEXT_FLAGS and not (flag == "served-model-name" and text.startswith("[")):
        return text
    try:
        return _exact(yaml.safe_load(text), text, none=text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = f"the environment variable {name} cannot be read as a YAML value: {_yaml_problem(error)}"
        raise ConfigError(what) from None


def _exact(value: object, written: object, *, none: object = None) -> object:
    """What YAML reads, but numbers and dates as they are written: 0123 would be 83, and 1.10 would be 1.1."""
    if value is None:
        return none
    if isinstance(value, list) and isinstance(written, list):
        return [_exact(item, text) for item, text in zip(value, written, strict=True)]
    if isinstance(value, bool | str | list | dict) or not isinstance(written, str):
        return value
    return value if isinstance(value, int | float) and str(value) == written else written


def _flag_name(name: object) -> str:
    return str(name).removeprefix("--").replace("_", "-")


def _yaml_problem(error: Exception) -> str:
    """Where and why, without the text itself, which may be a key."""
    mark = getattr(error, "problem_mark", None)
    problem = re.sub(r"'[^']*'", "'…'", str(getattr(error, "problem", None) or "it is no YAML"))
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _unknown(key: str, file: Path) -> str:
    allowed = [field.replace("_", "-") for field in ServeSettings.model_fields]
    nearest = difflib.get_close_matches(key.replace("_", "-"), allowed, n=1, cutoff=0.0)[0]
    return f"{file}: the key {key!r} is not known; the nearest is {nearest!r}, and vLLM's own flags belong under 'vllm'"


def _validated(origin: str, given: Mapping[str, object]) -> ServeSettings:
    try:
        return ServeSettings.model_validate(dict(given))
    except ValidationError as error:
        reasons = []
        for detail in error.errors():
            where = [str(part).replace("_", "-") for part in detail["loc"]]
            hidden = where[0] == "vllm" and (len(where) == 1 or where[1] in SECRET_FLAGS)
            found = "" if hidden else f", found {detail['input']!r}"
            reasons.append(f"{'.'.join(where)}: {str(detail['msg']).removeprefix('Value error, ')}{found}")
        raise ConfigError(f"settings of {origin} cannot be used: " + "; ".join(reasons)) from None


def flag_names(arguments: Sequence[str]) -> set[str]:
    """Names of the long flags among raw arguments, as vLLM spells them: "--max_loras=2" → "max-loras"."""
    return {_flag_name(argument.partition("=")[0]) for argument in arguments if argument.startswith("--")}


def masked(arguments: Sequence[str]) -> list[str]:
    """Raw arguments as they may be shown: without keys and tokens, in whatever way these are given."""
    result: list[str] = []
    secret = False
    for argument in arguments:
        if argument.startswith("-"):
            name, separator, _ = argument.partition("=")
            flag = _flag_name(name)
            # argparse takes the beginning of a flag for the flag.
            secret = len(flag) > 2 and any(known.startswith(flag) for known in SECRET_FLAGS)
            result.append(f"{name}=***" if secret and separator else argument)
        else:
            result.append("***" if secret else argument)
    return result
