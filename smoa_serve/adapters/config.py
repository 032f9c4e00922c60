"""`adapter_config.json`: the accepted keys, what they mean, what is refused."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..base.fingerprint import WeightFingerprint
from ..errors import AdapterError
from .model import AdapterKind, OrderStatus

# Keys that cannot change what a finished adapter computes. Every other unknown key is refused unless it is null.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "fan_in_fan_out",  # the layout follows from the base checkpoint
        "hira_dropout",  # training only, as are all inits and dropouts
        "inference_mode",
        "init_lora_weights",
        "init_weights",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    }
)

Rank = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Blocks = Annotated[int, Field(strict=True, ge=1, le=2**15 - 1)]  # a block id is an int16 in memory
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Names = list[str] | str


class AdapterConfig(BaseModel):
    """What SMoA and HiRA configurations share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    target_modules: Names | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names | None = None
    bias: str | None = "none"
    modules_to_save: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless(cls, data: dict[str, object]) -> dict[str, object]:
        known = set(cls.model_fields)
        return {key: value for key, value in data.items() if key in known or not (key in HARMLESS or value is None)}

    @field_validator("bias")
    @classmethod
    def _no_bias(cls, value: str | None) -> str | None:
        if value not in {None, "none"}:
            raise ValueError(f"trained biases ({value!r}) are not supported, only 'none'")
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _no_saved_modules(cls, value: list[str] | None) -> list[str] | None:
        if value:
            raise ValueError(f"fully trained modules ({', '.join(value)}) are not supported")
        return value

    @field_validator("target_modules", "layers_pattern", "layers_to_transform")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value in ([], "") else value


class PublishedConfig(AdapterConfig):
    """The published SMoA configuration. r, num_blocks and target_modules may be left out: the shapes tell them."""

    peft_type: Literal["SMOA"]
    r: Rank | None = None
    num_blocks: Blocks | None = None
    branch_ranks: list[Rank] | None = None
    lora_alpha: Number

    @model_validator(mode="after")
    def _branches_agree(self) -> "PublishedConfig":
        ranks = self.branch_ranks
        if ranks is not None and self.num_blocks is not None and len(ranks) != self.num_blocks:
            raise ValueError(f"branch_ranks has {len(ranks)} entries for num_blocks={self.num_blocks}")
        if ranks is not None and self.r is not None and sum(ranks) != self.r:
            raise ValueError(f"branch_ranks sum to {sum(ranks)}, but r={self.r}")
        return self


class HiraConfig(AdapterConfig):
    """The configuration of PEFT's HiRA."""

    peft_type: Literal["HIRA"]
    r: Count
    rank_pattern: dict[str, Count] | None = None
    exclude_modules: Names | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_something(cls, data: dict[str, object]) -> dict[str, object]:
        if data.get("target_modules") in ([], ""):
            raise ValueError("target_modules names nothing, so PEFT would adapt nothing")
        return data


class ModuleEntry(BaseModel):
    """One module in a portable configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    branch_ranks: Annotated[list[Rank], Field(max_length=2**15 - 1)]
    scaling: Number
    order_error: Annotated[Number, Field(ge=0)] = 0.0
    base: WeightFingerprint | None = None


class PortableConfig(BaseModel):
    """The configuration of the portable format; every key has a meaning, so every unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["SMOA"] = "SMOA"
    format: Literal["smoa-serve-portable"] = "smoa-serve-portable"
    format_version: Literal[1] = 1
    kind: AdapterKind
    digest: str
    rank: Rank
    num_blocks: Blocks
    alpha: Number
    order: OrderStatus
    base_model_name_or_path: str | None = None
    modules: dict[str, ModuleEntry]
    metadata: dict[str, object] = Field(default_factory=dict)

    @field_validator("kind")
    @classmethod
    def _not_lora(cls, value: AdapterKind) -> AdapterKind:
        if value is AdapterKind.LORA:
            raise ValueError("the portable format holds SMoA and HiRA adapters only")
        return value


Model = TypeVar("Model", bound=BaseModel)


def parse_config(model: type[Model], source: object, config: dict[str, object]) -> Model:
    """Validate a configuration.

    Raises:
        AdapterError: with one reason per wrong, missing or unknown key.
    """
    try:
        return model.model_validate(config)
    except ValidationError as error:
        raise AdapterError(source, [_reason(dict(detail)) for detail in error.errors()]) from error


def _reason(detail: dict[str, object]) -> str:
    where = ".".join(str(part) for part in detail["loc"])  # type: ignore[attr-defined]
    if detail["type"] == "extra_forbidden":
        return f"adapter_config.json: the key {where!r} ({detail['input']!r}) is not known and may change the maths"
    if detail["type"] == "missing":
        return f"adapter_config.json: the key {where!r} is missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"adapter_config.json: {where}: {message}" if where else f"adapter_config.json: {message}"


def is_portable(config: dict[str, object]) -> bool:
    """True when a configuration carries the marker of the portable format."""
    return "format" in config or "format_version" in config
