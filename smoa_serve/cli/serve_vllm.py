"""Settings → vLLM's own command line and environment."""

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch

from ..adapters import LoadOptions
from ..errors import ConfigError
from ..plugin import check_frontend
from ..registry.revisions import name_reason
from ..settings import Settings
from .adapter_limits import adapters_in, default_limits
from .serve_settings import FlagValue, ServeSettings, flag_names, masked

PLUGIN = "smoa_serve"
ENDPOINT_GROUP = "vllm.endpoint_plugins"  # the only group that vLLM leaves out unless VLLM_PLUGINS names it
# Where vLLM takes one key as it is: its parser reads a key "None" as no key, and "-x" as a flag.
API_KEY_ENV = "VLLM_API_KEY"
LIMITS = ("max-loras", "max-cpu-loras", "max-lora-rank")


@dataclass(frozen=True)
class VllmCommand:
    """How vLLM is started.

    Attributes:
        argv: beginning with "vllm", "serve", the model.
        environment: variables to set.
    """

    argv: list[str]
    environment: dict[str, str]

    def shown(self) -> str:
        """For a shell, a line per variable and one for the command; keys and tokens are masked."""
        variables = {name: "***" if name == API_KEY_ENV else value for name, value in self.environment.items()}
        lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return "\n".join([*lines, shlex.join(masked(self.argv))])


def vllm_command(settings: ServeSettings, arguments: Sequence[str], environment: Mapping[str, str]) -> VllmCommand:
    """Translate settings.

    Args:
        settings: merged settings.
        arguments: vLLM flags of the command line; they win over `settings.vllm`, since vLLM reads them last.
        environment: what is set already.

    Raises:
        ConfigError: no model, a name that no adapter can have, or a flag that has to be said in another way.
        CompatibilityError: vLLM's Rust frontend is asked for.
        AdapterError: an adapter cannot be read.
    """
    check_frontend(environment)
    given = set(settings.vllm) | flag_names(arguments)
    if settings.model is None:
        raise ConfigError("no base model is given: smoa-serve serve MODEL, SMOA_SERVE_MODEL, or 'model:' in --config")
    if "lora-modules" in given:
        raise ConfigError("--lora-modules is made by smoa-serve; give adapters with --adapter NAME=PATH")
    if "grpc" in given:
        raise ConfigError("--grpc starts a server that asks for no key and knows no adapters of ours; leave it out")
    adapters = _adapters(settings)
    roots = _roots(settings, environment)
    defaults: dict[str, FlagValue] = {"enable-lora": True}
    if torch.cuda.is_available() and not Settings.from_environment(environment).cuda_graphs:
        # The engine refuses adapters where there are graphs.
        defaults["enforce-eager"] = True
    if not given.issuperset(LIMITS):
        allow_pickle = settings.allow_pickle
        if allow_pickle is None:
            allow_pickle = Settings.from_environment(environment).allow_pickle
        defaults |= default_limits(adapters, roots, LoadOptions(allow_pickle=allow_pickle))
    # Several API servers, vLLM's default for data parallel, do not follow each other's loads.
    if "headless" not in given:
        defaults["api-server-count"] = 1
    flags = {name: value for name, value in defaults.items() if name not in given} | settings.vllm
    variables = _environment(settings, roots, environment)
    if isinstance(flags.get("api-key"), str):
        key = str(flags.pop("api-key"))
        if "api-key" not in flag_names(arguments):
            variables[API_KEY_ENV] = key
    argv = ["vllm", "serve", settings.model, *_lora_modules(adapters)]
    for name, value in flags.items():
        argv += _flag(name, value)
    return VllmCommand([*argv, *arguments], variables)


def plugin_names(current: str | None) -> str:
    """VLLM_PLUGINS with ours in it. Unset means "all" to vLLM: then all that are installed are named.

    Args:
        current: VLLM_PLUGINS as it is; None when unset.
    """
    if current is None:
        groups = entry_points().groups
        wanted = [g for g in groups if g.startswith("vllm.") and g.endswith("_plugins") and g != ENDPOINT_GROUP]
        names = sorted({entry.name for group in wanted for entry in entry_points(group=group)})
    else:
        names = [name.strip() for name in current.split(",") if name.strip()]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def _adapters(settings: ServeSettings) -> dict[str, str]:
    found = adapters_in(settings.adapters_dir) if settings.adapters_dir is not None else {}
    adapters = found | settings.adapter
    reasons = [reason for name in adapters if (reason := name_reason(name)) is not None]
    if reasons:
        raise ConfigError("; ".join(reasons))
    return adapters


def _roots(settings: ServeSettings, environment: Mapping[str, str]) -> list[Path]:
    given = [*settings.adapters_root, *([settings.adapters_dir] if settings.adapters_dir else [])]
    before = [Path(part) for part in environment.get("SMOA_ADAPTER_ROOTS", "").split(os.pathsep) if part]
    missing = [root for root in given if not root.expanduser().is_dir()]
    if missing:
        raise ConfigError(f"--adapters-root {missing[0]}: there is no such folder")
    return list(dict.fromkeys(root.expanduser().resolve() for root in [*given, *before]))


def _environment(settings: ServeSettings, roots: Iterable[Path], environment: Mapping[str, str]) -> dict[str, str]:
    result = {
        "VLLM_PLUGINS": plugin_names(environment.get("VLLM_PLUGINS")),
        "SMOA_SERVE_REQUIRED": "1",
        "SMOA_ADAPTER_ROOTS": os.pathsep.join(map(str, roots)),
    }
    switches = {
        "SMOA_ALLOW_PICKLE": settings.allow_pickle,
        "SMOA_STRICT_ORDER": settings.strict_order,
        "SMOA_ALLOW_HUB": settings.allow_hub,
    }
    return result | {name: str(int(on)) for name, on in switches.items() if on is not None}


def _lora_modules(adapters: Mapping[str, str]) -> list[str]:
    items = [json.dumps({"name": name, "path": str(Path(path).expanduser())}) for name, path in adapters.items()]
    return ["--lora-modules", *items] if items else []


def _flag(name: str, value: FlagValue) -> list[str]:
    """One flag as vLLM's parser takes it."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
