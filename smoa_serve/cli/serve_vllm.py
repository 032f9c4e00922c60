"""Settings → vLLM's own command line and environment."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import torch
from pydantic import SecretStr

from ..adapters import LoadOptions
from ..errors import ConfigError
from ..plugin import check_frontend
from ..registry.revisions import name_reason
from ..settings import TREE_VARIABLE, Settings
from ..settings.tree import Adapters
from ..settings.vllm_flags import FlagValue, as_arguments, flag_names, masked, revealed
from .adapter_limits import adapters_in, default_limits

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
        settings: what is served by, as vLLM's processes get it.
    """

    argv: list[str] = field(repr=False)
    environment: dict[str, str] = field(repr=False)
    settings: Settings

    def shown(self) -> str:
        """For a shell, a line per variable and one for the command; keys and tokens are masked."""
        tree = {name: value for name, value in self.settings.shown().items() if name != "vllm"}
        variables = self.environment | {TREE_VARIABLE: json.dumps(tree)}
        if API_KEY_ENV in variables:
            variables[API_KEY_ENV] = "***"
        lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return "\n".join([*lines, shlex.join(masked(self.argv))])


def vllm_command(settings: Settings, arguments: Sequence[str], environment: Mapping[str, str]) -> VllmCommand:
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
    adapters, roots = _adapters(settings.adapters), _roots(settings.adapters, environment)
    engine = settings.engine.model_copy(update={"required": settings.engine.required is not False})
    reached = settings.adapters.model_copy(update={"adapters_root": roots})
    served = settings.model_copy(update={"adapters": reached, "engine": engine})
    defaults: dict[str, FlagValue] = {"enable-lora": True}
    if torch.cuda.is_available() and not settings.engine.cuda_graphs:
        # The engine refuses adapters where there are graphs.
        defaults["enforce-eager"] = True
    if not given.issuperset(LIMITS):
        defaults |= default_limits(adapters, roots, LoadOptions(allow_pickle=settings.adapters.allow_pickle))
    # Several API servers, vLLM's default for data parallel, do not follow each other's loads.
    if "headless" not in given:
        defaults["api-server-count"] = 1
    flags = {name: value for name, value in defaults.items() if name not in given} | settings.vllm
    variables = {"VLLM_PLUGINS": plugin_names(environment.get("VLLM_PLUGINS")), TREE_VARIABLE: served.handed_on()}
    if isinstance(flags.get("api-key"), SecretStr):
        key = revealed(flags.pop("api-key"))
        if "api-key" not in flag_names(arguments):
            variables[API_KEY_ENV] = key
    argv = ["vllm", "serve", settings.model, *_lora_modules(adapters)]
    for name, value in flags.items():
        argv += as_arguments(name, value)
    return VllmCommand([*argv, *arguments], variables, served)


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


def _adapters(settings: Adapters) -> dict[str, str]:
    found = adapters_in(settings.adapters_dir) if settings.adapters_dir is not None else {}
    adapters = found | settings.adapter
    reasons = [reason for name in adapters if (reason := name_reason(name)) is not None]
    if reasons:
        raise ConfigError("; ".join(reasons))
    return adapters


def _roots(settings: Adapters, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where HTTP loads may come from. SMOA_ADAPTER_ROOTS adds to what flags and files say, and need not exist yet."""
    before = [Path(part) for part in environment.get("SMOA_ADAPTER_ROOTS", "").split(os.pathsep) if part]
    given = [*settings.adapters_root, *([settings.adapters_dir] if settings.adapters_dir else [])]
    missing = [root for root in given if root not in before and not root.expanduser().is_dir()]
    if missing:
        raise ConfigError(f"--adapters-root {missing[0]}: there is no such folder")
    return tuple(dict.fromkeys(root.expanduser().resolve() for root in [*given, *before]))


def _lora_modules(adapters: Mapping[str, str]) -> list[str]:
    items = [json.dumps({"name": name, "path": str(Path(path).expanduser())}) for name, path in adapters.items()]
    return ["--lora-modules", *items] if items else []
