"""The output head stays the base model's: vLLM's LoRA path on the logits is left out.

vLLM applies LoRA to the logits with one adapter index per sampled row. Prompt logprobs ask for the logits of one
request's whole prompt instead: the indices then belong to other rows, which gives wrong values or ends the engine. So
adapters on the output head are refused, and the head costs what it costs without adapters.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA


class BaseLogitsMixin:
    """In front of `LogitsProcessorWithLoRA`."""

    base_layer: Any

    def _get_logits(self, hidden_states: Tensor, lm_head: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        head = lm_head.base_layer if hasattr(lm_head, "base_layer") else lm_head
        logits: Tensor | None = self.base_layer._get_logits(hidden_states, head, *args, **kwargs)
        return logits

    def reset_lora(self, index: int) -> None:
        """No slot holds anything."""


@cache
def _base_class(cls: type) -> type:
    return type(f"Base{cls.__name__}", (BaseLogitsMixin, cls), {})


def leave_out(layer: LogitsProcessorWithLoRA) -> None:
    """Turn the wrapped logits processor back into the base model's, and free its slots."""
    cls: type = type(layer)
    layer.__class__ = _base_class(cls)
    layer.lora_a_stacked = torch.empty(0)
    layer.lora_b_stacked = torch.empty(0)
