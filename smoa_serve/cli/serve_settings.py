"""Settings of `smoa-serve serve`: flag > environment (SMOA_SERVE_<FLAG>) > YAML file > default."""

import difflib
import os
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
FlagValue = bool | int | float | str | list[Any] | dict[str, Any] | None


class ServeSettings(BaseModel):
    """What `smoa-serve serve` can be told; every field is a flag, a YAML key and SMOA_SERVE_<FIELD>.

    Attributes:
        model: the base: a folder or a hub id.
        adapter: name → path of an adapter served from the start.
        adapters_dir: every sub-folder with an adapter_config.json is an adapter of that name.
        adapters_root: folders that HTTP loads are confined to, beside adapters_dir.
        allow_pickle: read `.bin` adapter files (weights only).
        strict_order: refuse published files whose spectral order is not fully determined.
        allow_hub: let HTTP loads name a repository of the hub.
        vllm: vLLM's own flags, name → value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    adapter: dict[str, str] = Field(default_factory=dict)
    adapters_dir: Path | None = None
    adapters_root: tuple[Path, ...] = ()
    allow_pickle: bool = False
    strict_order: bool = False
    allow_hub: bool = False
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
        return {str(key).removeprefix("--").replace("_", "-"): flag for key, flag in value.items()}


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
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no mapping of settings, but a {type(content).__name__}")
    keys = {str(key): str(key).replace("-", "_") for key in content}
    unknown = [_unknown(key, file) for key, field in keys.items() if field not in ServeSettings.model_fields]
    if unknown:
        raise ConfigError("; ".join(unknown))
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
            vllm[name.removeprefix(VLLM_PREFIX).lower()] = _flag_value(name, value)
        elif field in ServeSettings.model_fields and field != "vllm":
            given[field] = value
        else:
            names = [f"{PREFIX}{known.upper()}" for known in ServeSettings.model_fields if known != "vllm"]
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"the environment variable {name} is not known; the nearest is {nearest}")
    return given | ({"vllm": vllm} if vllm else {})


def _flag_value(name: str, value: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the environment variable {name}={value!r} cannot be read as a YAML value") from error


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
            where = ".".join(str(part) for part in detail["loc"]).replace("_", "-")
            reasons.append(f"{where}: {str(detail['msg']).removeprefix('Value error, ')}, found {detail['input']!r}")
        raise ConfigError(f"settings of {origin} cannot be used: " + "; ".join(reasons)) from None


def flag_names(arguments: Sequence[str]) -> set[str]:
    """Names of the long flags among raw arguments, as vLLM spells them: "--max_loras=2" → "max-loras"."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.removeprefix("--").replace("_", "-") for flag in flags}
