"""What the environment says to the plugin: the same in the API server, the engine core and every worker."""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from smoa_serve.errors import ConfigError

_VARIABLES = {
    "adapter_roots": "SMOA_ADAPTER_ROOTS",
    "allow_pickle": "SMOA_ALLOW_PICKLE",
    "strict_order": "SMOA_STRICT_ORDER",
    "allow_hub": "SMOA_ALLOW_HUB",
    "required": "SMOA_SERVE_REQUIRED",
    "cuda_graphs": "SMOA_CUDA_GRAPHS",
    "one_pass": "SMOA_ONE_PASS",
    "auto_merge": "SMOA_AUTO_MERGE",
    "auto_resident": "SMOA_AUTO_RESIDENT",
    "ladder_mib": "SMOA_LADDER_MIB",
    "merge_policy": "SMOA_MERGE_POLICY",
    "policy_interval_s": "SMOA_POLICY_INTERVAL_S",
}


class MergePolicy(StrEnum):
    """What other requests get while an adapter is merged.

    COMPENSATE: the merged weight and the difference back, in the same step.
    EXCLUSIVE: the original weight; the merged one serves only steps in which all tokens are the merged adapter's.
    """

    COMPENSATE = "compensate"
    EXCLUSIVE = "exclusive"


class Settings(BaseModel):
    """Settings that plain `vllm serve` takes from the environment and `smoa-serve serve` sets from its flags.

    Attributes:
        adapter_roots: folders that adapters loaded over HTTP must lie in; none = nothing can be loaded over HTTP.
        allow_pickle: read `.bin` files (with `weights_only=True`).
        strict_order: refuse published files whose spectral order is not well determined.
        allow_hub: let HTTP loads name a repository of the Hugging Face hub.
        cuda_graphs: serve SMoA inside CUDA graphs. Off: not yet proven on a GPU, so such an engine refuses SMoA.
        one_pass: on a CPU, keep the layers' weights a second time, in the order of the adapters' blocks: steps whose
            adapters share it then read a weight once for base and deltas.
        auto_merge: let the automatic policy merge the adapter that carries most of the traffic.
        auto_resident: let it keep hot adapters resident.
        ladder_mib: memory it may use for both, all workers, MiB; None = 1024 on a CPU and none on a GPU, where it
            has to be left free by --gpu-memory-utilization.
        merge_policy: for the requests of others, when it merges.
        policy_interval_s: how often it looks.
        required: the server must not start unless every process has this plugin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter_roots: tuple[Path, ...] = Field(default=())
    allow_pickle: bool = False
    strict_order: bool = False
    allow_hub: bool = False
    required: bool = False
    cuda_graphs: bool = False
    one_pass: bool = True
    auto_merge: bool = False
    auto_resident: bool = True
    ladder_mib: int | None = Field(default=None, ge=0)
    merge_policy: MergePolicy = MergePolicy.COMPENSATE
    policy_interval_s: float = Field(default=5.0, gt=0)

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the variables named SMOA_*.

        Raises:
            ConfigError: a value cannot be used; names the variable, what was found and what is allowed.
        """
        given = {field: environment[name] for field, name in _VARIABLES.items() if environment.get(name)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            reasons = [
                f"{_VARIABLES[str(e['loc'][0])]}={given[str(e['loc'][0])]!r}: {e['msg']}" for e in error.errors()
            ]
            raise ConfigError("the environment cannot be used: " + "; ".join(reasons)) from None
