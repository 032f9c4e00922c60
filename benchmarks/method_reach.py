"""How much of a weight an update family reaches: rank, effective rank, and singular directions that are touched."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.method_models import METHODS, Fit, adapt, learned_updates

SHARE = 0.9


@dataclass(frozen=True)
class Reach:
    """Figures of one update, as shares of min(H_out, H_in).

    Attributes:
        rank: numerical rank.
        effective_rank: exp of the entropy of the singular values.
        directions: singular directions of W (input side) that hold 90 % of the update's energy.
    """

    rank: float
    effective_rank: float
    directions: float


def reach_of(update: Tensor, weight: Tensor) -> Reach:
    """Measure one update.

    Args:
        update: [H_out, H_in].
        weight: [H_out, H_in], what it is added to.
    """
    size = min(weight.shape)
    sigma = torch.linalg.svdvals(update.double())
    share = sigma / sigma.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    _, _, directions = torch.linalg.svd(weight.double(), full_matrices=False)  # [size, H_in]
    energy = (update.double() @ directions.T).pow(2).sum(0).sort(descending=True).values
    needed = int((energy.cumsum(0) < SHARE * energy.sum()).sum()) + 1
    tolerance = sigma[0] * max(update.shape) * torch.finfo(torch.float32).eps
    return Reach(int((sigma > tolerance).sum()) / size, float(entropy.exp()) / size, needed / size)


def mean_reach(updates: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, float]:
    """Mean of the figures over layers."""
    found = [asdict(reach_of(update, weights[name])) for name, update in updates.items()]
    return {key: sum(figures[key] for figures in found) / len(found) for key in found[0]}


def family_reach(weight: Tensor, rank: int, seeds: int) -> list[dict[str, object]]:
    """What random factors reach: the family itself, before anything is learnt.

    Args:
        weight: [H_out, H_in].
        rank: of LoRA; see Fit.
        seeds: drawings, averaged.
    """
    rows: list[dict[str, object]] = []
    for method in METHODS:
        found = [asdict(_random_reach(weight, method, rank, seed)) for seed in range(seeds)]
        means = {key: sum(figures[key] for figures in found) / seeds for key in found[0]}
        rows.append({"kind": "reach", "method": method, **means})
    return rows


def _random_reach(weight: Tensor, method: str, rank: int, seed: int) -> Reach:
    base = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})
    base["layer"].weight.data.copy_(weight)
    adapted = adapt(base, Fit(method, rank, 0.0, 0, seed), ["layer"])
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_()
    return reach_of(learned_updates(adapted, {"layer.weight": weight})["layer.weight"], weight)
