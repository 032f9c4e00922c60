"""Compiled models on a CPU with adapters: vLLM compiles none with LoRA, and base traffic pays for that.

vLLM's CPU kernels for LoRA branch in Python on the batch, which a compiled graph would freeze. Here everything that
depends on the batch runs inside one opaque op per layer, so the rest of the model may be compiled. A model with a
wrapped layer that this project does not turn into such an op stays uncompiled.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA


def allow_compilation(
    wrapped: Callable[[Any], None], platform: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A wrapper of `CpuPlatform.check_and_update_config`, which turns compilation off when LoRA is enabled."""
    config: Any = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    lora_config, config.lora_config = config.lora_config, None
    try:
        wrapped(config)
    finally:
        config.lora_config = lora_config


def forbid_compilation(model: nn.Module) -> None:
    """Run a model as it is written, whatever the configuration says."""
    for module in model.modules():
        if hasattr(module, "do_not_compile"):
            module.do_not_compile = True  # type: ignore[assignment]


class EmbeddingMixin:
    """In front of `VocabParallelEmbeddingWithLoRA`: the LoRA part runs inside an opaque op."""

    base_layer: Any
    punica_wrapper: Any
    smoa_key: str

    def forward(self, x: Tensor) -> Tensor:
        """[T] token ids -> [T, H]."""
        output: Tensor = self.base_layer.forward(x)
        torch.ops.smoa_serve.embedding_delta(output, x, self.smoa_key)
        return output

    def add_deltas(self, y: Tensor, x: Tensor) -> None:
        """y [T, H] becomes what vLLM's own layer makes of tokens x [T], where any of them has a LoRA adapter."""
        if not self.punica_wrapper.no_lora:
            y.copy_(super().forward(x))  # type: ignore[misc]


@cache
def _embedding_class(cls: type) -> type:
    return type(f"Opaque{cls.__name__}", (EmbeddingMixin, cls), {})


def make_opaque(layer: VocabParallelEmbeddingWithLoRA, key: str) -> None:
    """Turn a wrapped embedding into one that may stand in a compiled graph."""
    cls: type = type(layer)
    layer.__class__ = _embedding_class(cls)
    layer.smoa_key = key


def embedding_delta(y: Tensor, x: Tensor, layer_name: str) -> None:
    """The op `smoa_serve::embedding_delta`."""
    get_forward_context().no_compile_layers[layer_name].add_deltas(y, x)
