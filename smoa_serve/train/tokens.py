"""Examples → tokens and targets, exactly as the server will build the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .data import DataError, Example

IGNORED = -100  # torch's own mark for positions without a target
PAD_TO = 8  # lengths of batches; matrix units like multiples
LossOn = str
Piece = tuple[str, bool]
"""A text, and whether it is an answer."""


@dataclass
class TokenizedData:
    """Examples as tokens; indexed like a list.

    Attributes:
        rows: of each example the token ids, and the same as targets with IGNORED where nothing is learnt.
        cut: examples that were longer than the limit.
        dropped: examples whose answers lay behind the limit altogether.
    """

    rows: list[tuple[list[int], list[int]]] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self.rows[index]
        return {"input_ids": ids, "labels": labels}

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(ids) for ids, _ in self.rows)


def tokenize(examples: Sequence[Example], tokenizer: Any, max_length: int, loss_on: LossOn) -> TokenizedData:
    """Examples as tokens.

    A prompt and its answer are tokenized apart: that is how they meet in a server, where the answer is generated.

    Args:
        examples: at least one.
        tokenizer: of transformers; conversations need its chat template.
        max_length: tokens; see DataSettings.
        loss_on: see DataSettings.

    Raises:
        DataError: conversations that the chat template cannot render turn by turn, or nothing is left to learn.
    """
    data = TokenizedData()
    reasons: list[str] = []
    if any(example.messages for example in examples) and not tokenizer.chat_template:
        raise DataError(["the base's tokenizer has no chat template: use 'prompt' and 'completion', or 'text'"])
    for example in examples:
        try:
            row = _tokens(example, tokenizer, loss_on)
        except _TemplateRefusal as error:
            reasons.append(f"{example.where}: {error}")
            continue
        ids, labels = row[0][:max_length], row[1][:max_length]
        data.cut += len(row[0]) > max_length
        # The first token has no prediction before it.
        if all(label == IGNORED for label in labels[1:]):
            data.dropped += 1
        else:
            data.rows.append((ids, labels))
    if not reasons and not data.rows:
        reasons = [f"no example has anything to learn within max_length={max_length} tokens; raise data.max_length"]
    if reasons:
        raise DataError(reasons)
    return data


class _TemplateRefusal(Exception):
    """A chat template does not render this conversation, or changes earlier turns when later ones come."""


def _tokens(example: Example, tokenizer: Any, loss_on: LossOn) -> tuple[list[int], list[int]]:
    if example.messages:
        pieces, special = _chat_pieces(example, tokenizer, loss_on), False
    else:
        end = tokenizer.eos_token or ""
        pieces = [(example.prompt, False), (example.completion + end, True)] if example.prompt else []
        pieces = pieces or [(example.completion + end, True)]
        special = True
    ids: list[int] = []
    labels: list[int] = []
    for text, is_answer in pieces:
        piece = tokenizer(text, add_special_tokens=special)["input_ids"] if text else []
        if special and not ids and piece and piece[-1] == tokenizer.eos_token_id and not is_answer:
            piece = piece[:-1]  # some tokenizers end every text
        special = False
        learnt = is_answer or loss_on == "everything"
        ids += piece
        labels += piece if learnt else [IGNORED] * len(piece)
    return ids, labels


def _chat_pieces(example: Example, tokenizer: Any, loss_on: LossOn) -> list[Piece]:
    """The rendered conversation, cut where the assistant begins and ends to speak."""
    turns = [message.as_template_input() for message in example.messages]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if loss_on == "last_answer":
        answers = answers[-1:]
    pieces: list[Piece] = []
    done = ""
    for number in answers:
        prompt = _render(tokenizer, turns[:number], prompt=True)
        answered = _render(tokenizer, turns[: number + 1], prompt=False)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise _TemplateRefusal(
                "the base's chat template renders earlier turns anew when later ones come; "
                "set data.loss_on to last_answer, or give one answer a line"
            )
        pieces += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
        done = answered
    return pieces


def _render(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise _TemplateRefusal(f"the base's chat template refuses it: {error}") from error
    return text


def collate(rows: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch, padded on the right.

    Args:
        rows: of TokenizedData.
        pad: token id.

    Returns:
        input_ids, labels, attention_mask: [N, T] int64.
    """
    length = -(-max(len(row["input_ids"]) for row in rows) // PAD_TO) * PAD_TO

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", pad), "labels": padded("labels", IGNORED), "attention_mask": mask}
