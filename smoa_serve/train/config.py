"""What a fine-tune is told: a YAML file, and single settings on top of it."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Names = list[str] | str
PUBLISHED_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterSettings(Section):
    """What every method has.

    Attributes:
        r: total rank.
        dropout: on the input of the update.
        target_modules: names (equal, or the end after a dot), one regular expression, or "all-linear".
        exclude_modules: taken away again, by the same rule.
        layers_to_transform: only these layer numbers.
    """

    r: Count = 8
    dropout: Share = 0.0
    target_modules: Names = list(PUBLISHED_TARGETS)
    exclude_modules: Names | None = None
    layers_to_transform: list[int] | int | None = None

    @model_validator(mode="after")
    def _layers_of_a_list(self) -> "AdapterSettings":
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names")
        return self


class SmoaSettings(AdapterSettings):
    """SMoA, by `smoa_serve.peft`; the defaults are the published ones.

    Attributes:
        num_blocks: K.
        branch_ranks: r_k of each block, summing to r; None splits r evenly.
        alpha: the update is scaled by alpha / r.
        order: "gram" (float64, the same on every machine) or "published" (float32 SVD on the CPU).
    """

    method: Literal["smoa"]
    num_blocks: Count = 2
    branch_ranks: list[NotNegative] | None = None
    alpha: Positive = 8.0
    dropout: Share = 0.05
    order: Literal["gram", "published"] = "gram"


class HiraSettings(AdapterSettings):
    """HiRA, by PEFT, which has no scale for it."""

    method: Literal["hira"]


class LoraSettings(AdapterSettings):
    """LoRA, by PEFT.

    Attributes:
        alpha: the update is scaled by alpha / r.
    """

    method: Literal["lora"]
    alpha: Positive = 8.0


class DataSettings(Section):
    """What is learnt.

    Attributes:
        train: JSONL files; a line has `messages`, or `prompt` and `completion`, or `text`.
        validation: likewise; measured, not learnt.
        max_length: tokens; longer examples are cut on the right.
        loss_on: "answers" counts what the assistant says (or the completion), "last_answer" the last of them only,
            "everything" every token.
    """

    train: Annotated[list[Path], Field(min_length=1)]
    validation: list[Path] = []
    max_length: Annotated[int, Field(ge=2)] = 1024
    loss_on: Literal["answers", "last_answer", "everything"] = "answers"

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: [value] if key in ("train", "validation") and isinstance(value, str) else value
                for key, value in data.items()}  # fmt: skip


class TrainingSettings(Section):
    """How it is learnt.

    Attributes:
        epochs: passes over the data; ignored where `max_steps` is given.
        max_steps: optimizer steps.
        batch_size: examples of one process and forward pass.
        gradient_accumulation: forward passes of one step.
        learning_rate: at its highest.
        schedule: how it changes after the warm-up.
        warmup_steps: optimizer steps up to the highest learning rate.
        weight_decay: of AdamW.
        max_grad_norm: longer gradients are shortened.
        gradient_checkpointing: less memory, more time.
        save_every: steps between checkpoints that `--resume` can go on from; one is always written at the end.
        keep_checkpoints: how many of them stay.
        log_every: steps between figures of the loss.
        evaluate_every: steps between measurements on the validation data; None: at the end only.
    """

    epochs: Positive = 3.0
    max_steps: Count | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Positive = 2e-3
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_steps: NotNegative = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    gradient_checkpointing: bool = False
    save_every: Count = 200
    keep_checkpoints: Count = 1
    log_every: Count = 10
    evaluate_every: Count | None = None


class TrainConfig(Section):
    """One fine-tune.

    Attributes:
        base: folder of the base checkpoint, or a hub id.
        output: folder of the adapter to write.
        seed: of the factors' first numbers, the order of the data and dropout.
        dtype: of the base in memory; "auto" is the stored one. Factors are float32 in any case.
        bf16: run the forward pass in bfloat16 (autocast) where the base is float32.
    """

    base: str
    output: Path
    seed: NotNegative = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    bf16: bool = False
    adapter: Annotated[SmoaSettings | HiraSettings | LoraSettings, Field(discriminator="method")]
    data: DataSettings
    training: TrainingSettings = TrainingSettings()


def load_config(file: Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration.

    Args:
        file: YAML.
        assignments: "adapter.r=16": a dotted key and a YAML value, on top of the file.

    Raises:
        ConfigError: unreadable, an unknown key or a value that cannot be used; names all of them.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration {file} must be a mapping of settings, found {_kind(content)}")
    for assignment in assignments:
        _assign(content, assignment)
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        reasons = "".join(f"\n  - {_reason(detail, content)}" for detail in error.errors())
        raise ConfigError(f"the configuration {file} cannot be used:{reasons}") from None


def _assign(content: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"--set {assignment!r} is not KEY=VALUE, for example adapter.r=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment!r}: the value cannot be read as YAML: {error}") from error
    for depth, part in enumerate(path[:-1], start=1):
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {assignment!r}: {'.'.join(path[:depth])} is a value, it has no keys below it")
    # YAML 1.1 takes 1e-3 for a text; a user means the number.
    content[path[-1]] = _number(value)


def _number(value: object) -> object:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _reason(detail: Any, content: Mapping[str, Any]) -> str:
    """One sentence; union members that pydantic puts into the place are no keys of the user's."""
    parts = [str(part) for part in detail["loc"]]
    if parts[:1] == ["adapter"] and len(parts) > 1 and parts[1] in ("smoa", "hira", "lora"):
        del parts[1]
    where = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        allowed = _allowed(parts[:-1], content)
        near = difflib.get_close_matches(parts[-1], allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: this key is not known; {hint}Allowed are {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{where}: this key is missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}, found {detail['input']!r}"


def _allowed(section: list[str], content: Mapping[str, Any]) -> list[str]:
    methods: dict[str, type[Section]] = {"smoa": SmoaSettings, "hira": HiraSettings, "lora": LoraSettings}
    sections: dict[str, type[Section]] = {"data": DataSettings, "training": TrainingSettings}
    if section == ["adapter"]:
        return list(methods[content["adapter"]["method"]].model_fields)
    return list(sections[section[0]].model_fields if section else TrainConfig.model_fields)


def _kind(content: object) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"
