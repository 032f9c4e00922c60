"""The model that is trained: the base from its checkpoint, with a new adapter or one that goes on."""

import os
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from ..adapters.patterns import PatternError
from ..adapters.targets import select_modules, unmatched
from ..base.checkpoint import BaseCheckpoint
from ..errors import BaseModelError, ConfigError
from ..peft import SMoAConfig, SMoAModel
from .config import AdapterSettings, HiraSettings, LoraSettings, SmoaSettings, TrainConfig

ALL_LINEAR = "all-linear"


def adapted_modules(config: TrainConfig, base: BaseCheckpoint) -> list[str]:
    """The modules that will get an adapter.

    Args:
        config: what the user asked for.
        base: the checkpoint.

    Raises:
        ConfigError: a quantized base, targets that name nothing there, or nothing is left.
    """
    settings = config.adapter
    if base.is_quantized:
        raise ConfigError(f"base {config.base!r} is quantized; train on the float checkpoint it was made from")
    targets: list[str] | str = settings.target_modules
    if targets == ALL_LINEAR:
        targets = r".*(?<!lm_head)(?<!embed_out)"
    last_parts = sorted({module.rpartition(".")[2] for module in base.linear_modules})
    try:
        missing = unmatched(base.linear_modules, targets)
        chosen = select_modules(
            base.linear_modules,
            targets,
            exclude_modules=settings.exclude_modules,
            layers_to_transform=settings.layers_to_transform,
        )
    except PatternError as error:
        raise ConfigError(f"adapter.target_modules: {error}") from error
    if missing:
        raise ConfigError(
            f"adapter.target_modules: {', '.join(missing)} names no linear layer of {config.base!r}; "
            f'there are {", ".join(last_parts)}, or "{ALL_LINEAR}"'
        )
    if not chosen:
        raise ConfigError("adapter: exclude_modules and layers_to_transform leave no layer to train")
    return chosen


def load_model(config: TrainConfig, base: BaseCheckpoint, checkpoint: Path | None) -> PeftModel:
    """The base with its adapter, ready to train.

    Args:
        config: checked against the base.
        base: the checkpoint.
        checkpoint: adapter to go on with; its recorded blocks are taken, no order is computed.

    Raises:
        BaseModelError: transformers cannot make a model of the base.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=config.dtype)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base model {config.base!r}: transformers cannot load it: {error}") from error
    if torch.cuda.is_available():
        # Before the adapter is made: spectral orders take minutes less there.
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    model.config.use_cache = False
    if config.training.gradient_checkpointing:
        model.enable_input_require_grads()
    if checkpoint is not None:
        adapted: PeftModel = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    else:
        adapted = get_peft_model(model, peft_config(config, base))
    # Not the folder that a hub id was found in on this machine.
    adapted.peft_config["default"].base_model_name_or_path = config.base
    if isinstance(adapted.base_model, SMoAModel):
        adapted.base_model.record_base(base)
    return adapted


def peft_config(config: TrainConfig, base: BaseCheckpoint) -> PeftConfig:
    """The method's settings as PEFT wants them.

    Raises:
        ConfigError: this PEFT does not know the method.
    """
    settings = config.adapter
    match settings:
        case SmoaSettings():
            return SMoAConfig(
                num_blocks=settings.num_blocks,
                branch_ranks=settings.branch_ranks,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                order=settings.order,
                **_shared(settings),
            )
        case HiraSettings():
            if not hasattr(peft, "HiraConfig"):
                raise ConfigError(f"HiRA came with PEFT 0.20, this is {peft.__version__}; install a newer one")
            return peft.HiraConfig(
                hira_dropout=settings.dropout, fan_in_fan_out=_is_transposed(base), **_shared(settings)
            )
        case LoraSettings():
            return LoraConfig(
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                fan_in_fan_out=_is_transposed(base),
                **_shared(settings),
            )


def _shared(settings: AdapterSettings) -> dict[str, Any]:
    return {
        "r": settings.r,
        "target_modules": settings.target_modules,
        "exclude_modules": settings.exclude_modules,
        "layers_to_transform": settings.layers_to_transform,
        "task_type": "CAUSAL_LM",
    }


def _is_transposed(base: BaseCheckpoint) -> bool:
    return any(base.is_transposed(module) for module in base.linear_modules)
