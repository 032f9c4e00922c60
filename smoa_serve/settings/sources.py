"""Where settings come from: flag > SMOA_SETTINGS > variable > YAML file > default. What is not known is an error."""

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from ..errors import ConfigError
from .tree import CONFIG_VARIABLE, FIELDS, OTHER_VARIABLES, SECTIONS, TREE_VARIABLE, Settings, dashed
from .vllm_flags import SECRET_FLAGS, exact, flag_name, value_of, yaml_problem

VLLM_PREFIX = "SMOA_SERVE_VLLM_"
FREE_PREFIXES = (VLLM_PREFIX, "SMOA_TEST_")
_VARIABLES = {variable: name for name, declared in FIELDS.items() for variable in declared.variables}


class _Source(PydanticBaseSettingsSource):
    """What one source says.

    Args:
        origin: "the environment", "the command line", or a file.
        content: keys → values; sections may be left out, dashes and underscores are the same, None says nothing.
        written: key in full → what a user wrote to say it.
    """

    def __init__(self, origin: str, content: object, written: Mapping[str, str] | None = None) -> None:
        super().__init__(Settings)
        self.origin, self.written, self.tree = origin, written or {}, dict[str, Any]()
        if not isinstance(content, dict):
            raise ConfigError(f"{origin} holds no mapping of settings, but a {type(content).__name__}")
        for key, value in content.items():
            name = str(key).replace("-", "_")
            section = FIELDS[name].section if name in FIELDS else None
            name, said = (section, {name: value}) if section else (name, value)
            if name in SECTIONS and isinstance(said, dict):
                branch = {str(inner).replace("-", "_"): each for inner, each in said.items() if each is not None}
                before = self.tree.get(name, {})
                self.tree[name] = before | branch if isinstance(before, dict) else before
            elif said is not None:
                self.tree[name if name in Settings.model_fields else dashed(str(key))] = (
                    said  # none of BaseSettings' own
                )

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """One branch of the tree as given."""
        return self.tree.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Its part of the tree, checked. vLLM's flags are replaced as a whole, so what counts more is left out.

        Raises:
            ConfigError: keys that are not known and values that cannot be used, all of them.
        """
        try:
            tree = Settings(**self.tree).model_dump(exclude_unset=True)
        except ValidationError as error:
            reasons = [self._reason(dict(detail)) for detail in error.errors()]
            raise ConfigError(f"settings of {self.origin} cannot be used: " + "; ".join(reasons)) from None
        said = self.current_state.get("vllm", {})
        return tree | {"vllm": {name: value for name, value in tree.get("vllm", {}).items() if name not in said}}

    def origins(self) -> dict[str, str]:
        """Key in full → where its value was said."""
        branches = {name: inside for name, inside in self.tree.items() if isinstance(inside, dict)}
        keys = [dashed(f"{name}.{inner}") for name, inside in branches.items() for inner in inside]
        return {key: self.written.get(key, self.origin) for key in [*keys, *(self.tree.keys() - branches.keys())]}

    def _reason(self, detail: Mapping[str, Any]) -> str:
        place = [str(part) for part in detail["loc"]]
        key = ".".join(map(dashed, place))
        if detail["type"] == "extra_forbidden" and place[0] != "vllm":
            allowed = [part for declared in FIELDS.values() for part in (dashed(declared.field), declared.key)]
            near = nearest(key, [*SECTIONS, "vllm", *allowed])
            return f"the key {key!r} is not known; the nearest is {near!r}, and vLLM's own flags belong under 'vllm'"
        name = place[min(1, len(place) - 1)]  # a whole branch may hold a key
        hidden = name in (*SECTIONS, "vllm", *SECRET_FLAGS) or (name in FIELDS and FIELDS[name].holds(SecretStr))
        message, found = str(detail["msg"]).removeprefix("Value error, "), repr(detail["input"])
        if key in self.written:
            return f"{self.written[key]}{'' if hidden else f'={found}'}: {message}"
        return f"{key}: {message}{'' if hidden else f', found {found}'}"


def load_settings(
    flags: Mapping[str, object], environment: Mapping[str, str], config_file: Path | None
) -> tuple[Settings, dict[str, str]]:
    """Everything that `smoa-serve serve` was told. Adapters and vLLM's flags are merged by name.

    Args:
        flags: given on the command line, field → value.
        environment: usually os.environ.
        config_file: --config; SMOA_SERVE_CONFIG where it is None.

    Returns:
        The settings, and where each was said: key, as a file would say it ("residence.auto-merge", "vllm.port") →
        flag, variable, file or "default".

    Raises:
        ConfigError: an unknown key or variable, or a value that cannot be used, with its source.
    """
    file = config_file or (Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None)
    written = {FIELDS[name].key: f"--{dashed(name)}" for name in flags if name in FIELDS}
    sources = [_Source("the command line", flags, written), *_of_environment(environment, vllm=True)]
    if file is not None:
        sources.append(_Source(str(file), read_yaml(file)))
    origins = {declared.key: "default" for declared in FIELDS.values()}
    for source in reversed(sources):
        origins |= source.origins()
    return _merged(sources), origins


def process_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """What the variables named SMOA_* say to a process: plain `vllm serve` has them, `smoa-serve serve` hands them on.

    Raises:
        ConfigError: a variable that is not known, or a value that cannot be used; names the variable, what was found
            and what is allowed.
    """
    return _merged(_of_environment(environment, vllm=False))


def _merged(sources: Sequence[_Source]) -> Settings:
    """One tree of all sources, of which the first counts most."""
    return Settings(_build_sources=(tuple(sources), {}))  # type: ignore[call-arg]


def read_yaml(file: Path) -> object:
    """What a settings file holds; what vLLM's flags are given is kept as it is written.

    Raises:
        ConfigError: unreadable.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content, as_written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {file} cannot be read: {yaml_problem(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("vllm"), dict):
        written = as_written["vllm"]
        content["vllm"] = {key: exact(flag, written.get(str(key))) for key, flag in content["vllm"].items()}
    return {} if content is None else content


def nearest(name: str, known: Iterable[str]) -> str:
    """The most alike of the names that are known."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def _of_environment(environment: Mapping[str, str], *, vllm: bool) -> list[_Source]:
    """What SMOA_SETTINGS says, then what single variables say. An empty variable says nothing.

    Args:
        environment: usually os.environ.
        vllm: also SMOA_SERVE_VLLM_<FLAG>, for any flag of vLLM.

    Raises:
        ConfigError: variables of ours that are not known, or one that cannot be read.
    """
    given = {name: environment[name] for name in sorted(environment) if name.startswith("SMOA_") and environment[name]}
    known = {*_VARIABLES, *OTHER_VARIABLES}
    unknown = [name for name in given if name not in known and not name.startswith(FREE_PREFIXES)]
    if unknown:
        reasons = [
            f"the environment variable {name} is not known; the nearest is {nearest(name, known)}" for name in unknown
        ]
        raise ConfigError("; ".join(reasons))
    content: dict[str, object] = {}
    written: dict[str, str] = {}
    for variable, field in _VARIABLES.items():  # of one setting, the variable that counts most comes last
        if variable in given:
            content[field], written[FIELDS[field].key] = given[variable], variable
    flags = {n: flag_name(n.removeprefix(VLLM_PREFIX).lower()) for n in given if vllm and n.startswith(VLLM_PREFIX)}
    content["vllm"] = {flag: _vllm_value(name, flag, given[name]) for name, flag in flags.items()} or None
    written |= {f"vllm.{flag}": name for name, flag in flags.items()}
    single = _Source("the environment", content, written)
    try:
        return [*(_Source(name, json.loads(given[name])) for name in [TREE_VARIABLE] if name in given), single]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{TREE_VARIABLE} cannot be read as JSON: {getattr(error, 'msg', 'too deep')}") from None


def _vllm_value(variable: str, flag: str, text: str) -> object:
    try:
        return value_of(flag, text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = f"the environment variable {variable} cannot be read as a YAML value: {yaml_problem(error)}"
        raise ConfigError(what) from None
