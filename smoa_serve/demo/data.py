"""The corpus as padded token batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .corpus import ENTRIES, Style, answer
from .tokenizer import END, chat_text, special_ids

IGNORED = -100  # torch's own mark for positions without a target


@dataclass(frozen=True, eq=False)
class Batch:
    """Conversations with the tokens to learn.

    Attributes:
        ids: [N, T] int64, padded on the right.
        mask: [N, T] int64, 1 where there is a token.
        targets: [N, T] int64, the next token where it belongs to an answer, IGNORED elsewhere.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor

    def rows(self, index: Tensor) -> "Batch":
        """Some of the conversations, cut to the longest of them."""
        length = int(self.mask[index].sum(1).max())
        return Batch(self.ids[index, :length], self.mask[index, :length], self.targets[index, :length])


@dataclass(frozen=True)
class Conversation:
    """One question and the answer to learn."""

    prompt: str
    reply: str


def adapter_conversations(style: Style) -> list[Conversation]:
    """What an adapter learns: its style without being asked for it."""
    return [Conversation(chat_text(entry.question), answer(entry, style)) for entry in ENTRIES]


def base_conversations() -> list[Conversation]:
    """What the base learns: plain answers, and every style where the system message names it."""
    styled = [
        Conversation(chat_text(entry.question, style), answer(entry, style)) for style in Style for entry in ENTRIES
    ]
    return adapter_conversations(Style.PLAIN) + styled


def encode(tokenizer_file: Path, conversations: Sequence[Conversation]) -> Batch:
    """Conversations as one batch.

    Args:
        tokenizer_file: tokenizer.json.
        conversations: at least one.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    pad, _ = special_ids(tokenizer_file)
    prompts = [tokenizer.encode(c.prompt).ids for c in conversations]
    replies = [tokenizer.encode(c.reply + END).ids for c in conversations]
    length = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
    ids = torch.full((len(conversations), length), pad)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        total = len(prompt) + len(reply)
        ids[row, :total] = torch.tensor(prompt + reply)
        mask[row, :total] = 1
        targets[row, len(prompt) - 1 : total - 1] = torch.tensor(reply)
    return Batch(ids, mask, targets)
