"""Make SMoA known to PEFT."""

from functools import wraps
from typing import Any

import peft.peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from .checkpoint import with_peft_names
from .config import SMoAConfig
from .model import SMoAModel
from .peft_type import SMOA


def register() -> None:
    """Register the method, once per process."""
    if SMOA in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name="smoa", config_cls=SMoAConfig, model_cls=SMoAModel, prefix=SMoAModel.prefix)
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        _accept_portable_names()


def _accept_portable_names() -> None:
    """PEFT 0.19 asks no tuner what the names in a file mean (0.21 does): translate them where it hands them on."""
    original = peft.peft_model.set_peft_model_state_dict

    @wraps(original)
    def accepting(
        model: nn.Module, tensors: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]  # type: ignore[index]
        if isinstance(config, SMoAConfig):
            tensors = with_peft_names(tensors, config.modules, adapter_name)
        return original(model, tensors, adapter_name, *args, **kwargs)

    peft.peft_model.set_peft_model_state_dict = accepting
