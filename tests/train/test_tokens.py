"""Tokens are those that a server makes of the prompt, and only answers are learnt."""

from typing import Any

import pytest

from smoa_serve.train.data import DataError, Example, Message
from smoa_serve.train.tokens import IGNORED, collate, tokenize

TURNS = (
    Message("user", "What is a tree?"),
    Message("assistant", "A plant."),
    Message("user", "How do I make tea?"),
    Message("assistant", "Boil water."),
)
CHAT = Example("x:1", messages=TURNS)


def learnt(row: dict[str, list[int]], tokenizer: Any) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != IGNORED])


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("answers", "A plant.<|end|>Boil water.<|end|>"),
        ("last_answer", "Boil water.<|end|>"),
        ("everything", None),
    ],
)
def test_what_counts_is_learnt(tokenizer: Any, loss_on: str, expected: str | None) -> None:
    row = tokenize([CHAT], tokenizer, 256, loss_on)[0]
    whole = tokenizer.apply_chat_template([turn.as_template_input() for turn in TURNS], tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == whole
    assert learnt(row, tokenizer) == (expected or whole)


def test_prompts_are_tokenized_as_the_server_does(tokenizer: Any) -> None:
    row = tokenize([CHAT], tokenizer, 256, "last_answer")[0]
    prompt = tokenizer.apply_chat_template(
        [turn.as_template_input() for turn in TURNS[:-1]], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_texts_and_completions_end(tokenizer: Any) -> None:
    examples = [Example("x:1", completion="Cats."), Example("x:2", prompt="The sky is ", completion="blue.")]
    text, pair = tokenize(examples, tokenizer, 256, "answers").rows
    assert tokenizer.decode(text[0]) == "Cats.<|end|>"
    assert text[0] == text[1]
    assert learnt({"labels": pair[1]}, tokenizer) == "blue.<|end|>"


def test_long_examples_are_cut_and_counted(tokenizer: Any) -> None:
    long = Example("x:1", prompt="The sky is blue. " * 20, completion="yes")
    short = Example("x:2", completion="Cats eat fish and mice and drink water all day.")
    data = tokenize([long, short], tokenizer, 6, "answers")
    assert (data.cut, data.dropped, len(data)) == (2, 1, 1)
    assert data.num_tokens == 6
    with pytest.raises(DataError, match="anything to learn within max_length=6"):
        tokenize([long], tokenizer, 6, "answers")


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    import copy

    changing = copy.deepcopy(tokenizer)
    changing.chat_template = (
        "{% for message in messages %}{% if loop.last or message.role == 'user' %}{{ message.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match=r"x:1: .*set data\.loss_on to last_answer"):
        tokenize([CHAT], changing, 256, "answers")
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(DataError, match="refuses it: no systems here"):
        tokenize([CHAT], refusing, 256, "answers")
    refusing.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        tokenize([CHAT], refusing, 256, "answers")


def test_batches_are_padded_on_the_right() -> None:
    batch = collate([{"input_ids": [1, 2], "labels": [IGNORED, 2]}, {"input_ids": [3], "labels": [3]}], pad=9)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][0].tolist() == [1, 2, 9, 9, 9, 9, 9, 9]
    assert batch["labels"][1].tolist() == [3] + [IGNORED] * 7
    assert batch["attention_mask"].sum(1).tolist() == [2, 1]
