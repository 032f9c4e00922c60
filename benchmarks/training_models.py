"""Models for the training benchmark: the same base with our layers, with the dense formulation, or without adapters.

    python -m benchmarks.training_models VARIANT RANK BLOCKS TOKENS

prints the peak memory of training steps in a process of their own: bytes above what was resident before the first.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
VARIANTS = ("base", "ours", "dense")


@dataclass(frozen=True)
class Setting:
    """One configuration.

    Attributes:
        rank: total rank r.
        num_blocks: K.
        tokens: of one step, in sequences of 128.
        dtype: of the base.
    """

    rank: int
    num_blocks: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """For tables."""
        return f"r={self.rank} K={self.num_blocks}"


class DenseFormulation(nn.Module):
    """The update as it is published: every block's product times a float32 copy of its weights, written into a matrix
    of the layer's size, on every forward pass; gradients by autograd.

    Args:
        layer: of ours, whose blocks and first factors are taken over.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        self.blocks = layer.blocks("default")
        self.scaling = layer.entries["default"].scaling
        a, b = layer.smoa_a["default"].detach(), layer.smoa_b["default"].detach()
        factors = [block.factors(a, b) for block in self.blocks]
        self.a = nn.ParameterList([nn.Parameter(a_k.clone()) for a_k, _ in factors])
        self.b = nn.ParameterList([nn.Parameter(b_k.clone()) for _, b_k in factors])
        self.anchors = [block.weight(layer.matrix, torch.float32) for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus x times the dense update."""
        weight = self.base_layer.weight
        delta = torch.zeros(weight.shape, device=x.device)
        for block, a, b, anchor in zip(self.blocks, self.a, self.b, self.anchors, strict=True):
            delta[block.rows[:, None], block.cols] = (b @ a) * anchor * self.scaling
        return self.base_layer(x) + nn.functional.linear(x, delta.to(x.dtype))  # type: ignore[no-any-return]


def make_model(variant: str, setting: Setting) -> nn.Module:
    """A llama of hidden size 1024 with 8 layers and random weights; the same numbers for every variant."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from smoa_serve.peft import SMoAConfig, SMoALinear

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 1024}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, use_cache=False)
    model = LlamaForCausalLM(config).to(setting.dtype).requires_grad_(False)
    # As with adapters below: gradients flow through the whole model, so that only the adapters make the difference.
    model.enable_input_require_grads()
    if variant == "base":
        return model
    settings = SMoAConfig(
        r=setting.rank, num_blocks=setting.num_blocks, lora_alpha=setting.rank, lora_dropout=0.0,
        target_modules=list(TARGETS),
    )  # fmt: skip
    adapted: nn.Module = get_peft_model(model, settings)
    if variant == "dense":
        for name, layer in list(adapted.named_modules()):
            if isinstance(layer, SMoALinear):
                parent, _, child = name.rpartition(".")
                setattr(adapted.get_submodule(parent), child, DenseFormulation(layer))
    return adapted


def make_step(model: nn.Module, setting: Setting) -> Callable[[], float]:
    """One training step on random tokens: forward, backward and, where there is something to train, AdamW."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, (max(1, setting.tokens // 128), min(128, setting.tokens)), generator=generator)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, foreach=False) if trainable else None

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak_bytes(step: Callable[[], float], repeats: int) -> int:
    """Highest resident memory of this process while it takes steps."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(repeats):
        step()
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux reports it for every process"
    return int(found[1]) * 1024


def main() -> None:
    """Measure one variant's memory."""
    variant, rank, num_blocks, tokens, dtype = sys.argv[1:]
    setting = Setting(int(rank), int(num_blocks), int(tokens), getattr(torch, dtype))
    model = make_model(variant, setting)
    step = make_step(model, setting)
    step()  # what is made once: optimizer state, threads' scratch
    print(json.dumps({"peak_bytes": peak_bytes(step, 2)}))


if __name__ == "__main__":
    main()
