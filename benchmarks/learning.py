"""Adapters that learn: the methods at equal trainable parameters, two kinds of tasks, and what an update reaches.

The tasks are a linear layer with a known target update, and a character model that gets another dialect.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BLOCKS = 4  # K of SMoA
LORA, DORA, HIRA, SMOA, SHUFFLED = "LoRA", "DoRA", "HiRA", "SMoA", "SMoA, random order"
METHODS = (LORA, DORA, HIRA, SMOA, SHUFFLED)

H_OUT, H_IN, REGRESSION_RANK = 128, 96, 4
BATCH = 128
STRENGTH = 0.3  # size of the target update, in units of the weight's
LOW_RANK, MODULATION, ALIGNED, FULL_RANK = "low rank", "low rank ⊙ W", "spectral blocks ⊙ W", "dense Gaussian"
TARGETS = (LOW_RANK, MODULATION, ALIGNED, FULL_RANK)

ALPHABET = "abcdefghijklmnopqrstuvwxyz .\n"
LENGTH, SEQUENCES, CHARACTER_RANK = 64, 16, 2
VOWELS, VERB_LAST = "vowels shifted", "verb last"
DIALECTS = (VOWELS, VERB_LAST)
ADJECTIVES = ("small", "old", "green", "quiet", "broken", "warm", "yellow", "empty")
NOUNS = ("cat", "river", "baker", "window", "sailor", "garden", "train", "letter", "apple", "bridge")
VERBS = ("sees", "finds", "follows", "carries", "paints", "forgets", "keeps")
PLACES = ("hill", "harbour", "market", "station", "forest")
Reach = dict[str, float]


@dataclass(frozen=True)
class Fit:
    method: str  # one of METHODS
    rank: int  # of LoRA; the others get the rank with as many parameters
    learning_rate: float = 0.0  # of Adam, falling to zero in a straight line
    steps: int = 0
    seed: int = 0  # of factors, order and data
    num_blocks: int = NUM_BLOCKS  # of SMoA


@dataclass(frozen=True)
class Result:
    """Outcome of one training: an error of which less is better, trainable numbers, what the learned update reaches."""

    error: float
    parameters: int
    reach: Reach


def adapt(model: nn.Module, fit: Fit, targets: list[str] | str) -> Any:
    """The model with a new adapter, of scale 1. DoRA's magnitudes come on top: it gets rather more than the others."""
    from peft import HiraConfig, LoraConfig, get_peft_model

    from smoa_serve.peft import SMoAConfig, SMoALinear

    torch.manual_seed(fit.seed)
    rank = fit.rank * fit.num_blocks
    if fit.method in (LORA, DORA):
        config = LoraConfig(r=fit.rank, lora_alpha=fit.rank, target_modules=targets, use_dora=fit.method == DORA)
    elif fit.method == HIRA:
        config = HiraConfig(r=fit.rank, target_modules=targets)
    else:
        sizes = {"r": rank, "num_blocks": fit.num_blocks, "lora_alpha": rank, "lora_dropout": 0.0}
        config = SMoAConfig(**sizes, target_modules=targets)
    adapted = get_peft_model(model, config)
    if fit.method == SHUFFLED:  # a random permutation in the place of the spectral order; the same sizes and ranks
        for layer in adapted.modules():
            for ids in (layer.smoa_row_block, layer.smoa_col_block) if isinstance(layer, SMoALinear) else ():
                ids["default"] = ids["default"][torch.randperm(ids["default"].numel())]
    return adapted


def train(optimizer: Any, steps: int, loss_of: Callable[[int], Tensor], rate_at: Callable[[int], float]) -> None:
    """So many steps, at a share of the optimizer's learning rate."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def train_adapter(adapted: nn.Module, fit: Fit, loss_of: Callable[[int], Tensor]) -> int:
    """Adam on what can be trained; returns how many numbers that are."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=fit.learning_rate)
    train(optimizer, fit.steps, loss_of, lambda step: 1 - step / fit.steps)
    return sum(p.numel() for p in parameters)


def learned_updates(adapted: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every adapted weight was changed by, [H_out, H_in]; the adapter is merged for it, and of no more use."""
    merged = adapted.merge_and_unload()
    changes = {name: p.detach() - before[name] for name, p in merged.named_parameters() if name in before}
    return {name: change for name, change in changes.items() if change.dim() == 2 and bool(change.any())}


def reach_of(update: Tensor, weight: Tensor) -> Reach:
    """Of one update of a weight, both [H_out, H_in], as shares of min(H_out, H_in).

    `rank` is the numerical rank, `effective_rank` exp of the entropy of the singular values, `directions` the singular
    directions of W (input side) that hold 90 % of the update's energy.
    """
    size = min(weight.shape)
    sigma = torch.linalg.svdvals(update.double())
    share = sigma / sigma.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    _, _, right = torch.linalg.svd(weight.double(), full_matrices=False)  # [size, H_in]
    energy = (update.double() @ right.T).square().sum(0).sort(descending=True).values
    needed = int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
    tolerance = sigma[0] * max(update.shape) * torch.finfo(torch.float32).eps
    shares = (int((sigma > tolerance).sum()) / size, float(entropy.exp()) / size, needed / size)
    return dict(zip(("rank", "effective_rank", "directions"), shares, strict=True))


def mean_reach(found: Iterable[Reach]) -> Reach:
    """Of several updates; empty where nothing was learnt."""
    figures = [one for one in found if one]
    return {key: sum(one[key] for one in figures) / len(figures) for key in (figures[0] if figures else ())}


def random_reach(weight: Tensor, method: str, rank: int, seeds: int) -> Reach:
    """What random factors reach, averaged over drawings: the family itself, before anything is learnt."""
    found = []
    for seed in range(seeds):
        adapted = adapt(_linear(weight), Fit(method, rank, seed=seed), ["layer"])
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data.normal_()
        found.append(reach_of(learned_updates(adapted, {"layer.weight": weight})["layer.weight"], weight))
    return mean_reach(found)


def llm_like_weight(seed: int) -> Tensor:
    """[H_OUT, H_IN] float32: Gaussian with rows and columns of unequal size, so that the spectral order means
    something, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randn(size, generator=generator).mul(0.7).exp() for size in (H_OUT, H_IN))
    return torch.randn(H_OUT, H_IN, generator=generator) * rows[:, None] * cols / H_IN**0.5


def target_update(kind: str, weight: Tensor, seed: int) -> Tensor:
    """[H_OUT, H_IN], of the norm STRENGTH · ‖weight‖."""
    from smoa_serve.peft.start import block_ids, spectral_pieces

    generator = torch.Generator().manual_seed(1000 + seed)
    rank = H_IN if kind == FULL_RANK else REGRESSION_RANK
    product = torch.randn(H_OUT, rank, generator=generator) @ torch.randn(rank, H_IN, generator=generator)
    if kind == MODULATION:
        product *= weight
    elif kind == ALIGNED:
        rows, cols = (block_ids(pieces) for pieces in spectral_pieces(weight, NUM_BLOCKS, "gram"))
        product *= weight * (rows[:, None] == cols)
    return product * (STRENGTH * weight.norm() / product.norm())


def _linear(weight: Tensor) -> nn.ModuleDict:
    model = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})
    model["layer"].weight.data.copy_(weight)
    return model


def regression(kind: str, fit: Fit) -> Result:
    """Learn a known update from inputs and outputs; the error is ‖dW - target‖ / ‖target‖."""
    weight = llm_like_weight(fit.seed)
    target = target_update(kind, weight, fit.seed)
    adapted = adapt(_linear(weight), fit, ["layer"])
    layer = adapted.base_model.model["layer"]
    generator = torch.Generator().manual_seed(2000 + fit.seed)

    def loss_of(step: int) -> Tensor:
        x = torch.randn(BATCH, H_IN, generator=generator)
        return functional.mse_loss(layer(x), x @ (weight + target).T)

    parameters = train_adapter(adapted, fit, loss_of)
    update = learned_updates(adapted, {"layer.weight": weight}).get("layer.weight", torch.zeros_like(weight))
    error = float((update - target).norm() / target.norm())
    return Result(error, parameters, reach_of(update, weight) if update.any() else {})


def sentences(dialect: str | None, seed: int, characters: int) -> str:
    """Text of a small grammar: "the old cat sees the green apple near the hill."; None is what the base knows."""
    rng = random.Random(seed)
    lines: list[str] = []
    while sum(map(len, lines)) < characters:
        subject, thing = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        verb, place = rng.choice(VERBS), f"near the {rng.choice(PLACES)}"
        order = (subject, thing, place, verb) if dialect == VERB_LAST else (subject, verb, thing, place)
        line = " ".join(order) + ".\n"
        lines.append(line.translate(str.maketrans("aeiou", "eioua")) if dialect == VOWELS else line)
    return "".join(lines)[:characters]


def llama(hidden: int, wide: int, layers: int, vocabulary: int, heads: int, key_heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "vocab_size": vocabulary}
    attention = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    return LlamaForCausalLM(LlamaConfig(**sizes, **attention, use_cache=False))


def character_model(weights: Path | None = None) -> Any:
    """A llama of two layers that reads characters, with random weights or these."""
    model = llama(64, 128, 2, len(ALPHABET), 2, 2)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def pretrain(file: Path, steps: int) -> float:
    """Teach a character model the grammar and keep its weights in `file`; returns its loss on new sentences."""
    model = character_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(optimizer, steps, lambda step: _loss(model, None, step, SEQUENCES), lambda step: 1.0)
    torch.save(model.state_dict(), file)
    return held_out(model, None)


def dialect(kind: str, fit: Fit, base_file: Path) -> Result:
    """Teach the pretrained model a dialect; the error is the loss on new sentences, nats per character."""
    model = character_model(base_file)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted, first_seed = adapt(model, fit, "all-linear"), 10_000 * (1 + fit.seed)
    parameters = train_adapter(adapted, fit, lambda step: _loss(adapted, kind, first_seed + step, SEQUENCES))
    error, updates = held_out(adapted, kind), learned_updates(adapted, before)
    return Result(error, parameters, mean_reach(reach_of(update, before[name]) for name, update in updates.items()))


@torch.no_grad()
def held_out(model: Any, kind: str | None) -> float:
    return float(_loss(model, kind, 999_999, 64))


def _loss(model: Any, kind: str | None, seed: int, count: int) -> Tensor:
    text = sentences(kind, seed, count * LENGTH)
    ids = torch.tensor([ALPHABET.index(character) for character in text]).view(count, LENGTH)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss
