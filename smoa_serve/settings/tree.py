"""The tree. A field declared here is a flag, a YAML key, a variable, a line of the reference and a place in the JSON
that `smoa-serve serve` hands to vLLM's processes: `--auto-merge`, `residence: {auto-merge: ...}`, `SMOA_AUTO_MERGE`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from .vllm_flags import FlagValue, checked_flags, revealed, shown

TREE_VARIABLE = "SMOA_SETTINGS"
CONFIG_VARIABLE = "SMOA_SERVE_CONFIG"
# What else begins with SMOA_, and who reads it. SMOA_SERVE_VLLM_<FLAG> and SMOA_TEST_<ANYTHING> are known as well.
OTHER_VARIABLES: Mapping[str, str] = {
    TREE_VARIABLE: "every process: the whole tree as JSON; it counts more than single variables",
    CONFIG_VARIABLE: "`smoa-serve serve`: the YAML file, as `--config`",
    "SMOA_URL": "`smoa-serve adapters`, `smoa-serve bench`: the server, as `--url`",
    "SMOA_API_KEY": "`smoa-serve adapters`, `smoa-serve bench`: the server's key, as `--api-key`",
    "SMOA_DEMO_DIR": "`python -m smoa_serve.demo`: where the demo's models lie, as `--root`",
    "SMOA_VENV": "`scripts/setup_env.py`: the virtual environment, as `--venv`",
    "SMOA_DEVICE": "`scripts/setup_env.py`: auto, cpu or cuda, as `--device`",
    "SMOA_VLLM_VERSION": "`scripts/setup_env.py`: the engine's release, as `--vllm`",
    "SMOA_PEFT_VERSION": "`scripts/setup_env.py`: PEFT's release, as `--peft`",
    "SMOA_LOCKED": "`scripts/setup_env.py`: install the versions of requirements.lock, as `--locked`",
    "SMOA_TORCH_INDEX_URL": "`scripts/setup_env.py`: a mirror of PyTorch's index",
    "SMOA_FAULTS": "`tests/engine/test_faults.py`: how many of the places are tried",
}


class OthersGet(StrEnum):
    """What other requests get while an adapter is merged.

    COMPENSATE: the merged weight and the difference back, in the same step.
    EXCLUSIVE: the original weight; the merged one serves only steps in which all tokens are the merged adapter's.
    """

    COMPENSATE = "compensate"
    EXCLUSIVE = "exclusive"


MergePolicy = OthersGet  # its name until the next release


def _setting(default: Any, what: str, unset: str = "", *, also: str = "", **limits: Any) -> Any:
    """Declare a setting.

    Args:
        default: its value where nobody says anything.
        what: its line in `--help` and in the reference.
        unset: in words, what a default of None or of nothing comes to.
        also: an older variable that means it.
        limits: as for pydantic's Field.
    """
    return Field(default, description=what, json_schema_extra={"also": also, "unset": unset}, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Adapters(_Section):
    """Which adapters there are, and what is accepted as one."""

    adapter: dict[str, str] = _setting({}, "An adapter served from the start; may be repeated.", "none")
    adapters_dir: Path | None = _setting(
        None, "Every sub-folder that holds an adapter is one of its name; HTTP may load from there, too.", "none"
    )
    adapters_root: tuple[Path, ...] = _setting(
        (),
        "Folder that adapters may be loaded from over HTTP; may be repeated.",
        "none: nothing can be loaded over HTTP",
        also="SMOA_ADAPTER_ROOTS",
    )
    allow_pickle: bool = _setting(False, "Read .bin adapter files (weights only).")
    strict_order: bool = _setting(False, "Refuse published files whose spectral order is not fully determined.")
    allow_hub: bool = _setting(False, "Let HTTP loads name a repository of the Hugging Face hub.")

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


class Residence(_Section):
    """Where adapters reside, and what the automatic policy may do."""

    auto_merge: bool = _setting(False, "Merge the adapter that carries most of the traffic.")
    auto_resident: bool = _setting(True, "Keep hot adapters resident.")
    # On a GPU, --gpu-memory-utilization has to leave it free.
    ladder_mib: int | None = _setting(
        None, "Memory for what the policy moves, all workers together, MiB.", "1024 on a CPU, 0 on a GPU", ge=0
    )
    others_get: OthersGet = _setting(
        OthersGet.COMPENSATE, "What others get while the policy has merged one.", also="SMOA_MERGE_POLICY"
    )
    policy_interval_s: float = _setting(5.0, "How often the policy looks, seconds.", gt=0)


class Store(_Section):
    """Folders that a server writes."""

    store_dir: Path | None = _setting(None, "Private copies of adapters.", "in the user's cache folder")
    cache_dir: Path | None = _setting(None, "What can be computed again: orders.", "in the user's cache folder")


class Engine(_Section):
    """How the engine computes, and what it insists on."""

    # Not yet proven on a GPU, so an engine with graphs refuses SMoA and HiRA.
    cuda_graphs: bool = _setting(False, "Serve SMoA and HiRA inside CUDA graphs; not yet proven on a GPU.")
    # Steps whose adapters share that order read a weight once for base and deltas.
    one_pass: bool = _setting(True, "On a CPU, keep the weights a second time, in the order of the adapters' blocks.")
    kernels_isa: str | None = _setting(
        None, "Best instruction set of the C++ kernel: amx_bf16, avx512_bf16, avx512, avx2.", "the CPU's best"
    )
    required: bool | None = _setting(
        None, "Start only if every process has this plugin.", "on with smoa-serve serve, off with vllm serve"
    )


class Settings(BaseSettings):
    """The whole tree. What it is made with is all it has: `load_settings` asks the environment and files."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    model: str | None = _setting(None, "The base: a folder or a hub id.", "none: it has to be given")
    adapters: Adapters = Adapters()
    residence: Residence = Residence()
    store: Store = Store()
    engine: Engine = Engine()
    vllm: dict[str, FlagValue] = {}  # vLLM's own flags, without dashes in front

    @field_validator("vllm", mode="before")
    @classmethod
    def _flags(cls, value: object) -> object:
        return checked_flags(value) if isinstance(value, dict) else value

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """None but what it is made with."""
        return (init_settings,)

    def handed_on(self) -> str:
        """What SMOA_SETTINGS holds, secrets included: all but vLLM's own flags, which stand in its command line."""
        return json.dumps(self.model_dump(exclude={"vllm"}), default=lambda value: str(revealed(value)))

    def shown(self) -> dict[str, Any]:
        """The tree as JSON and YAML take it and anybody may see it: dashes in the keys, secrets masked."""
        tree: dict[str, Any] = json.loads(json.dumps(self.model_dump(), default=shown))
        sections = {name: {dashed(inner): value for inner, value in tree[name].items()} for name in SECTIONS}
        return tree | sections


@dataclass(frozen=True)
class Declared:
    """One setting as it was declared.

    Attributes:
        section: in the tree; None at its root.
        field: its name in the section, and with dashes everywhere a user writes it.
        info: what pydantic knows of it.
    """

    section: str | None
    field: str
    info: FieldInfo

    @property
    def name(self) -> str:
        """As a user writes it: "auto-merge"."""
        return dashed(self.field)

    @property
    def key(self) -> str:
        """Its place in a file: "residence.auto-merge"."""
        return dashed(f"{self.section}.{self.field}" if self.section else self.field)

    @property
    def variables(self) -> list[str]:
        """Every variable that means it: the name to use first, the one that counts most last."""
        upper = self.field.upper()
        return [name for name in (f"SMOA_{upper}", self._told("also"), f"SMOA_SERVE_{upper}") if name]

    @property
    def default(self) -> str:
        """In words."""
        value = self.info.default
        if isinstance(value, bool):
            return "on" if value else "off"
        return self._told("unset") or str(value)

    def holds(self, wanted: type) -> bool:
        """Whether its values are of a type; None may stand beside it."""
        return wanted in (self.info.annotation, *get_args(self.info.annotation))

    def _told(self, key: str) -> str:
        extra = self.info.json_schema_extra
        return str(extra[key]) if isinstance(extra, dict) else ""


def dashed(name: str) -> str:
    """A field's name as a user writes it."""
    return name.replace("_", "-")


SECTIONS: Mapping[str, type[BaseModel]] = {
    name: info.annotation
    for name, info in Settings.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, _Section)
}
FIELDS: Mapping[str, Declared] = {"model": Declared(None, "model", Settings.model_fields["model"])} | {
    field: Declared(name, field, info) for name, kind in SECTIONS.items() for field, info in kind.model_fields.items()
}
"""Field → declaration. A field's name is its own in the whole tree."""
