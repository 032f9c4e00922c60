"""JSONL training data → examples: pieces of text, each with whether it is to be learnt."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SmoaError

FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
ALLOWED = '"messages", or "prompt" and "completion", or "text"'
ROLES = ("system", "user", "assistant", "tool")
MOST_REASONS = 20


class DataError(SmoaError):
    """Training data that cannot be used; every bad line is named with its number."""

    def __init__(self, reasons: Sequence[str]) -> None:
        shown = list(reasons[:MOST_REASONS])
        if len(reasons) > MOST_REASONS:
            shown.append(f"and {len(reasons) - MOST_REASONS} more")
        super().__init__("the training data cannot be used:" + "".join(f"\n  - {reason}" for reason in shown))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def as_template_input(self) -> dict[str, str]:
        """What chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        where: "data.jsonl:12".
        messages: a conversation, or nothing.
        prompt: comes first and is no answer; empty for a bare text.
        completion: what follows.
    """

    where: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""


def read_examples(files: Sequence[Path]) -> list[Example]:
    """Read JSONL files.

    Args:
        files: UTF-8, one JSON object a line; empty lines are skipped. Other keys (an id, a source) are left alone.

    Returns:
        Examples in the order of the files.

    Raises:
        DataError: with every line that cannot be used, and for files without any.
    """
    examples: list[Example] = []
    reasons: list[str] = []
    for file in files:
        before = len(examples) + len(reasons)
        try:
            for where, line in _lines(file):
                try:
                    examples.append(_example(where, line))
                except _BadLine as error:
                    reasons.append(f"{where}: {error}")
        except (OSError, UnicodeDecodeError) as error:
            reasons.append(f"{file}: cannot be read: {error}")
        if len(examples) + len(reasons) == before:
            reasons.append(f"{file}: has no lines")
    if reasons:
        raise DataError(reasons)
    return examples


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", line


class _BadLine(Exception):
    """What is wrong with a line."""


def _example(where: str, line: str) -> Example:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _BadLine(f"is no JSON ({error}); found {_short(line)}") from error
    if not isinstance(found, dict):
        raise _BadLine(f"found {_kind(found)}, each line must be a JSON object with {ALLOWED}")
    present = [form for form in FORMS if any(key in found for key in form)]
    if len(present) != 1:
        keys = ", ".join(map(repr, found)) or "no keys"
        raise _BadLine(f"found {keys}; exactly one of these is allowed: {ALLOWED}")
    form = present[0]
    missing = [key for key in form if key not in found]
    if missing:
        raise _BadLine(f"{missing[0]!r} is missing: {ALLOWED} are allowed")
    if form == ("messages",):
        return Example(where, messages=_conversation(found["messages"]))
    wrong = [f"{key!r} must be a text, found {_kind(found[key])}" for key in form if not isinstance(found[key], str)]
    if wrong:
        raise _BadLine("; ".join(wrong))
    answer = form[-1]
    if not found[answer]:
        raise _BadLine(f"{answer!r} is empty: there is nothing to learn")
    return Example(where, prompt=found.get("prompt", ""), completion=found[answer])


def _conversation(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise _BadLine(f"'messages' must be a list of turns, found {_kind(messages)}")
    turns: list[Message] = []
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict):
            raise _BadLine(f"messages[{number}] must have 'role' and 'content', found {_kind(turn)}")
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise _BadLine(f"messages[{number}]: role is {role!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _BadLine(f"messages[{number}]: content must be a text, found {_kind(content)}")
        turns.append(Message(role, content))
    if turns[-1].role != "assistant":
        raise _BadLine(
            f"the last message is the {turns[-1].role}'s; it must be the assistant's, which is what is learnt"
        )
    return tuple(turns)


def _kind(found: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing", bool: "a truth value"}
    return "an empty list" if found == [] else names.get(type(found), f"the number {found!r}")


def _short(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
