"""The PEFT tuner: which layers get adapters, and what is recorded of them."""

import copy
import logging
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.config import ModuleEntry
from ..base.checkpoint import BaseCheckpoint
from ..errors import AdapterError, ConfigError
from .checkpoint import with_peft_names
from .config import SMoAConfig
from .layer import SMoALayer, SMoALinear

logger = logging.getLogger(__name__)

PUBLISHED_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


class SMoAModel(BaseTuner):  # type: ignore[misc]
    """A model whose linear layers carry SMoA adapters; made by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix: str = "smoa_"
    tuner_layer_cls = SMoALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | dict.fromkeys(
        LLAMA_LIKE, PUBLISHED_TARGETS
    )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every target; its configuration becomes the model's own, with what is recorded."""
        config = copy.copy(self.peft_config[adapter_name])
        if not config.is_recorded:
            config.modules = {}
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: SMoAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        recorded = self._recorded(peft_config, adapter_name, current_key)
        if recorded is None:
            logger.info("Adapter %s: taking the spectral order of %s", adapter_name, current_key)
        if isinstance(target, SMoALinear):
            target.update_layer(adapter_name, peft_config, recorded)
            layer = target
        elif isinstance(target, nn.Linear | Conv1D):
            layer = SMoALinear(target, adapter_name, peft_config, recorded)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        else:
            raise ConfigError(
                f"{current_key} is a {type(target).__name__}; SMoA adapts nn.Linear and transformers' Conv1D"
            )
        peft_config.modules[current_key] = layer.entries[adapter_name].model_dump(mode="json")

    def record_base(self, base: BaseCheckpoint) -> None:
        """Record the stored weights as what every adapter belongs to.

        A base that is loaded in another dtype than it is stored in has other bytes in memory, and a server compares
        with the stored ones.

        Args:
            base: the checkpoint that this model was loaded from.

        Raises:
            BaseModelError: an adapted module is not in it.
        """
        for module, layer in self.model.named_modules():
            if not isinstance(layer, SMoALinear):
                continue
            mark = base.fingerprint(module)
            for adapter_name, entry in layer.entries.items():
                layer.entries[adapter_name] = entry.model_copy(update={"base": mark})
                facts = layer.entries[adapter_name].model_dump(mode="json")
                self.peft_config[adapter_name].modules[module] = facts

    @staticmethod
    def _recorded(config: SMoAConfig, adapter_name: str, module: str) -> ModuleEntry | None:
        if not config.is_recorded:
            return None
        if module not in config.modules:
            raise AdapterError(adapter_name, f"{module} is a target, but the checkpoint has no factors for it")
        return ModuleEntry.model_validate(config.modules[module])

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SMoAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook for the names in a file; releases without it are handled in `registration`."""
        named = with_peft_names(state_dict, config.modules, adapter_name)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        return remapped
