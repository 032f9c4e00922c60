"""JSONL lines: three forms, and every bad line is named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from smoa_serve.train.data import DataError, read_examples


def test_the_three_forms_are_read_in_order(write_data: Callable[..., Path]) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    file = write_data({"messages": turns, "id": 7}, "", {"prompt": "p", "completion": "c"}, {"text": "t"})
    chat, pair, text = read_examples([file])
    assert [(turn.role, turn.content) for turn in chat.messages] == [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert (pair.prompt, pair.completion, pair.messages) == ("p", "c", ())
    assert (text.prompt, text.completion) == ("", "t")
    assert pair.where.endswith("train.jsonl:3")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"is no JSON .*; found '\{'"),
        ("[1]", "found a list, each line must be a JSON object"),
        ({}, "found no keys; exactly one of these"),
        ({"content": "x"}, "found 'content'; exactly one of these is allowed"),
        ({"text": "a", "prompt": "b"}, "found 'text', 'prompt'; exactly one"),
        ({"prompt": "b"}, "'completion' is missing"),
        ({"completion": "b"}, "'prompt' is missing"),
        ({"text": 3}, "'text' must be a text, found the number 3"),
        ({"prompt": None, "completion": "x"}, "'prompt' must be a text, found nothing"),
        ({"text": ""}, "'text' is empty"),
        ({"messages": []}, "'messages' must be a list of turns, found an empty list"),
        ({"messages": ["hi"]}, r"messages\[0\] must have 'role' and 'content', found a text"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            r"messages\[0\]: role is 'bot'; allowed are system, user",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\]: content must be a text, found a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is the user's"),
    ],
)
def test_a_bad_line_is_named_with_its_number(write_data: Callable[..., Path], line: object, reason: str) -> None:
    file = write_data({"text": "good"}, line)
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {reason}"):
        read_examples([file])


def test_all_bad_lines_are_named_up_to_twenty(write_data: Callable[..., Path]) -> None:
    file = write_data(*[{"no": 1}] * 25)
    with pytest.raises(DataError) as caught:
        read_examples([file])
    text = str(caught.value)
    assert "train.jsonl:20" in text
    assert "train.jsonl:21" not in text
    assert text.endswith("and 5 more")


def test_files_without_lines_and_missing_files_are_named(write_data: Callable[..., Path], tmp_path: Path) -> None:
    empty = write_data(name="empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: has no lines\n.*none\.jsonl: cannot be read"):
        read_examples([empty, tmp_path / "none.jsonl"])
