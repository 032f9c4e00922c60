"""Two kinds of tasks: a linear layer with a known target update, and a character model that gets another dialect."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.method_models import NUM_BLOCKS, Fit, adapt, learned_updates, train
from benchmarks.method_reach import mean_reach

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


@dataclass(frozen=True)
class Result:
    """Outcome of one training.

    Attributes:
        error: lower is better; see the task.
        parameters: trainable numbers.
        reach: of the learned update.
    """

    error: float
    parameters: int
    reach: dict[str, float]


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
    rank = {LOW_RANK: REGRESSION_RANK, MODULATION: REGRESSION_RANK, ALIGNED: REGRESSION_RANK, FULL_RANK: H_IN}[kind]
    product = torch.randn(H_OUT, rank, generator=generator) @ torch.randn(rank, H_IN, generator=generator)
    if kind == MODULATION:
        product *= weight
    elif kind == ALIGNED:
        rows, cols = (block_ids(pieces) for pieces in spectral_pieces(weight, NUM_BLOCKS, "gram"))
        product *= weight * (rows[:, None] == cols)
    return product * (STRENGTH * weight.norm() / product.norm())


def regression(kind: str, fit: Fit) -> Result:
    """Learn a known update from inputs and outputs; the error is ‖dW - target‖ / ‖target‖."""
    weight = llm_like_weight(fit.seed)
    target = target_update(kind, weight, fit.seed)
    model = nn.ModuleDict({"layer": nn.Linear(H_IN, H_OUT, bias=False)})
    model["layer"].weight.data.copy_(weight)
    adapted = adapt(model, fit, ["layer"])
    layer = adapted.base_model.model["layer"]
    generator = torch.Generator().manual_seed(2000 + fit.seed)

    def loss_of(step: int) -> Tensor:
        x = torch.randn(BATCH, H_IN, generator=generator)
        return functional.mse_loss(layer(x), x @ (weight + target).T)

    parameters = train(adapted, fit, loss_of)
    update = learned_updates(adapted, {"layer.weight": weight}).get("layer.weight", torch.zeros_like(weight))
    error = float((update - target).norm() / target.norm())
    return Result(error, parameters, mean_reach({"w": update}, {"w": weight}) if update.any() else {})


def sentences(dialect: str | None, seed: int, characters: int) -> str:
    """Text of a small grammar: "the old cat sees the green apple near the hill."; None is what the base knows."""
    rng = random.Random(seed)
    lines: list[str] = []
    length = 0
    while length < characters:
        subject, thing = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        verb, place = rng.choice(VERBS), f"near the {rng.choice(PLACES)}"
        order = (subject, thing, place, verb) if dialect == VERB_LAST else (subject, verb, thing, place)
        line = " ".join(order) + ".\n"
        lines.append(line.translate(str.maketrans("aeiou", "eioua")) if dialect == VOWELS else line)
        length += len(line)
    return "".join(lines)[:characters]


def sequences(dialect: str | None, seed: int, count: int) -> Tensor:
    """[count, LENGTH] int64."""
    text = sentences(dialect, seed, count * LENGTH)
    return torch.tensor([ALPHABET.index(character) for character in text]).view(count, LENGTH)


def character_model() -> Any:
    """A llama of two layers that reads characters, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(ALPHABET)}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False))


def pretrain(file: Path, steps: int) -> float:
    """Teach a character model the grammar and keep its weights in `file`; returns its loss on new sentences."""
    model = character_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = sequences(None, step, SEQUENCES)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), file)
    return _held_out(model, None)


def dialect(kind: str, fit: Fit, base_file: Path) -> Result:
    """Teach the pretrained model a dialect; the error is the loss on new sentences, nats per character."""
    model = character_model()
    before = _weights(base_file)
    model.load_state_dict(before)
    adapted = adapt(model, fit, "all-linear")

    def loss_of(step: int) -> Tensor:
        ids = sequences(kind, 10_000 * (1 + fit.seed) + step, SEQUENCES)
        loss: Tensor = adapted(input_ids=ids, labels=ids).loss
        return loss

    parameters = train(adapted, fit, loss_of)
    error = _held_out(adapted, kind)
    return Result(error, parameters, mean_reach(learned_updates(adapted, before), before))


def untouched_loss(kind: str, base_file: Path) -> float:
    """The pretrained model's loss on a dialect before anything is learnt."""
    model = character_model()
    model.load_state_dict(_weights(base_file))
    return _held_out(model, kind)


@cache
def _weights(base_file: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(base_file, weights_only=True)
    return weights


@torch.no_grad()
def _held_out(model: Any, kind: str | None) -> float:
    ids = sequences(kind, 999_999, 64)
    return float(model(input_ids=ids, labels=ids).loss)
