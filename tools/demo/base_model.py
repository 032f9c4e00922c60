"""The demo's base: a small Llama, trained from nothing on two books and to know the answers by heart."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifacts import build_folder
from .books import answers, books
from .data import Batch, base_conversations, book_tokens, encode, passages
from .tokenizer import VOCAB_SIZE, special_ids, write_tokenizer
from .training import Report, Schedule, TrainingError, learn, read, worst_probability

SEED = 20260524
# Rounding to bfloat16 costs a little of what training reached.
ROUNDED_CONFIDENCE = 0.7


@dataclass(frozen=True)
class BaseShape:
    """Sizes of the base. head_dim is 64: vLLM's CPU attention needs 32 or more."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 640
    max_position_embeddings: int = 1024


SHAPE = BaseShape()


@dataclass(frozen=True)
class Reading:
    """How much of the books is read, in passages: `count` a step, `beside` of them while the answers are learned."""

    steps: int = 300
    learning_rate: float = 3e-3
    count: int = 16
    beside: int = 1
    length: int = 128


READING = Reading()
SCHEDULE = Schedule(max_steps=500, learning_rate=3e-3, batch_size=42, check_every=10, confidence=0.93, warmup=30)


def base_recipe() -> dict[str, object]:
    """Everything the base depends on."""
    texts = hashlib.sha256("\0".join([*books(), *answers()]).encode()).hexdigest()
    parts = {"shape": asdict(SHAPE), "reading": asdict(READING), "schedule": asdict(SCHEDULE)}
    return parts | {"seed": SEED, "texts": texts, "version": 3}


def build_base(folder: Path, report: Report) -> bool:
    """Train the base into `folder` unless it is there. True when it had to be trained."""
    return build_folder(folder, base_recipe(), lambda out: _train(out, report))


def load_base(folder: Path) -> Any:
    """The stored base in float32, frozen: what adapters are trained on."""
    from transformers import LlamaForCausalLM

    _hide_progress_bars()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def logits(model: Any, batch: Batch) -> Tensor:
    """[N, T, vocabulary] of the base, or of a PEFT model of it."""
    result: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return result


def _train(out: Path, report: Report) -> None:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    _hide_progress_bars()
    write_tokenizer(out)
    batch = encode(out / "tokenizer.json", base_conversations())
    pad, end = special_ids(out / "tokenizer.json")
    config = LlamaConfig(
        **asdict(SHAPE),
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    parameters, tokens = list(model.parameters()), book_tokens(out / "tokenizer.json")

    def forward(part: Batch) -> Tensor:
        return logits(model, part)

    def some(count: int) -> Batch:
        return passages(tokens, count, READING.length)

    read(forward, parameters, lambda: some(READING.count), READING.steps, READING.learning_rate, report)
    learn(
        "base", forward, parameters, batch, SCHEDULE,
        lambda step, state: report(READING.steps + step, state), lambda: some(READING.beside),
    )  # fmt: skip
    model = model.to(torch.bfloat16)
    worst = worst_probability(forward, batch)
    if worst < ROUNDED_CONFIDENCE:
        raise TrainingError(f"base: rounded to bfloat16 the worst answer token has probability {worst:.3f}")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(out)


def _hide_progress_bars() -> None:
    """The demo shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
