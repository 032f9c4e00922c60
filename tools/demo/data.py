"""Books and answers as token batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smoa_serve.demo.prompts import ENTRIES, Style, answer

from .books import books
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


def book_tokens(tokenizer_file: Path) -> Tensor:
    """The books one after the other, as token ids: [N] int64."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    _, end = special_ids(tokenizer_file)
    return torch.tensor([token for book in books() for token in [*tokenizer.encode(book).ids, end]])


def passages(tokens: Tensor, count: int, length: int) -> Batch:
    """Random passages of a text, every token of which is to be learned.

    Args:
        tokens: [N], see `book_tokens`.
        count: how many.
        length: tokens of each.
    """
    starts = torch.randint(0, len(tokens) - length, (count, 1))
    taken = tokens[starts + torch.arange(length + 1)]
    return Batch(taken[:, :-1], torch.ones(count, length, dtype=torch.int64), taken[:, 1:].contiguous())


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
