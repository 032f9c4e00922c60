"""What `smoa-serve merge --check` does: the merged model's logits against base + adapter formula, in transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.model import Delta
from ..base.checkpoint import BaseCheckpoint
from ..errors import BaseModelError

PROMPT_TOKENS = (8, 16, 32)
# Share of the largest logit that rounding the merged weights to a dtype may move one.
ALLOWED = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class MergeCheck:
    """Merged model against base + adapter formula.

    Attributes:
        max_abs: largest difference of a logit.
        largest: largest logit, for scale.
        allowed: difference that the dtype of the merged weights explains.
    """

    max_abs: float
    largest: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True when the merged model computes what the adapter does."""
        return self.max_abs <= self.allowed


def check_merge(base: BaseCheckpoint, deltas: Mapping[str, Delta], merged: str | Path) -> MergeCheck:
    """Compare logits in float32 on prompts of random tokens. Holds one whole model in memory at a time.

    Args:
        base: base model.
        deltas: from `load_deltas`.
        merged: folder written by `merge`.

    Raises:
        BaseModelError: transformers names a module of the base differently.
    """
    written = BaseCheckpoint.open(merged)
    dtypes = {written.fingerprint(name).dtype for name in deltas}
    prompts = _prompts(base)
    expected = _logits(base.path, prompts, base, deltas)
    found = _logits(written.path, prompts, written, {})
    pairs = list(zip(found, expected, strict=True))
    largest = max(float(e.abs().max()) for _, e in pairs)
    share = max(ALLOWED.get(dtype, ALLOWED["float32"]) for dtype in dtypes)
    return MergeCheck(max(float((f - e).abs().max()) for f, e in pairs), largest, share * largest)


def _prompts(base: BaseCheckpoint) -> list[Tensor]:
    text = base.config.get("text_config") or base.config
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(int(text["vocab_size"]), (1, size), generator=generator) for size in PROMPT_TOKENS]


@torch.inference_mode()
def _logits(path: Path, prompts: list[Tensor], base: BaseCheckpoint, deltas: Mapping[str, Delta]) -> list[Tensor]:
    """Logits [1, tokens, vocab] of each prompt, with `x @ delta^T` added behind the named layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for name, delta in deltas.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise BaseModelError(f"transformers has no module {name!r} in {path}: --check is not possible") from error
        layer.register_forward_hook(_adding(delta(base.weight(name))))
    return [model(prompt).logits for prompt in prompts]


def _adding(update: Tensor) -> Any:
    def hook(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(args[0], update)

    return hook
