"""The methods that are compared, at equal trainable parameters, and one way to train all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NUM_BLOCKS = 4  # K of SMoA
GRID = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # learning rates, the same for every method
LORA, DORA, HIRA, SMOA, SHUFFLED = "LoRA", "DoRA", "HiRA", "SMoA", "SMoA, random order"
METHODS = (LORA, DORA, HIRA, SMOA, SHUFFLED)


@dataclass(frozen=True)
class Fit:
    """How one adapter is trained.

    Attributes:
        method: one of METHODS.
        rank: of LoRA; the others get the rank with as many parameters.
        learning_rate: of Adam, falling to zero in a straight line.
        steps: optimizer steps.
        seed: of factors, order and data.
    """

    method: str
    rank: int
    learning_rate: float
    steps: int
    seed: int


def adapt(model: nn.Module, fit: Fit, targets: list[str] | str) -> Any:
    """The model with a new adapter; scale 1 for every method that has one.

    DoRA's magnitudes come on top of LoRA's parameters: it gets more rather than less than the others.
    """
    from peft import HiraConfig, LoraConfig, get_peft_model

    from smoa_serve.peft import SMoAConfig

    torch.manual_seed(fit.seed)
    if fit.method in (LORA, DORA):
        config = LoraConfig(r=fit.rank, lora_alpha=fit.rank, target_modules=targets, use_dora=fit.method == DORA)
    elif fit.method == HIRA:
        config = HiraConfig(r=fit.rank, target_modules=targets)
    else:
        rank = fit.rank * NUM_BLOCKS
        config = SMoAConfig(
            r=rank, num_blocks=NUM_BLOCKS, lora_alpha=rank, lora_dropout=0.0, target_modules=targets
        )  # fmt: skip
    adapted = get_peft_model(model, config)
    if fit.method == SHUFFLED:
        _shuffle(adapted)
    return adapted


def _shuffle(adapted: nn.Module) -> None:
    """Blocks of a random permutation in the place of the spectral order; the same sizes and ranks."""
    from smoa_serve.peft import SMoALinear

    for layer in adapted.modules():
        if isinstance(layer, SMoALinear):
            for ids in (layer.smoa_row_block, layer.smoa_col_block):
                ids["default"] = ids["default"][torch.randperm(ids["default"].numel())]


def train(adapted: nn.Module, fit: Fit, loss_of: Callable[[int], Tensor]) -> int:
    """Adam on what can be trained.

    Args:
        adapted: from `adapt`.
        fit: steps and learning rate.
        loss_of: step → loss.

    Returns:
        Trainable parameters.
    """
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=fit.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / fit.steps)
    for step in range(fit.steps):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return sum(p.numel() for p in parameters)


def learned_updates(adapted: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every adapted weight was changed by, [H_out, H_in]; the adapter is merged for it.

    Args:
        adapted: trained; not to be used afterwards.
        before: weights of the base by parameter name.
    """
    merged = adapted.merge_and_unload()
    changes = {name: p.detach() - before[name] for name, p in merged.named_parameters() if name in before}
    return {name: change for name, change in changes.items() if change.dim() == 2 and bool(change.any())}
