"""JSON objects out of files that anybody may have written: bounded, unambiguous, and all of it can be written again."""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

BYTES_LIMIT = 64 * 2**20
DEPTH_LIMIT = 64
ENTRIES_LIMIT = 100_000  # of one list or object


class JsonError(ValueError):
    """What a file holds cannot be taken; says why."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it cannot be read.
        JsonError: it is no JSON object, or one of those above; names what is allowed.
    """
    with file.open("rb") as handle:
        return load_json(handle)


def load_json(handle: BinaryIO) -> dict[str, Any]:
    """The JSON object in an open file; raises as `read_json` does."""
    data = handle.read(BYTES_LIMIT + 1)
    if len(data) > BYTES_LIMIT:
        raise JsonError(f"it has more than {BYTES_LIMIT} bytes")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant
        )
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"it is nested deeper than {DEPTH_LIMIT} levels") from None
    except ValueError as error:
        raise JsonError(f"it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise JsonError("it does not hold a JSON object")
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {twice[:200]!r} is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"the number {text[:40]} is too large")
    return value


def _no_constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is no JSON number")


def _check(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise JsonError(f"it is nested deeper than {DEPTH_LIMIT} levels")
        following: list[Any] = []
        for container in level:
            if len(container) > ENTRIES_LIMIT:
                raise JsonError(f"a list or object has {len(container)} entries, allowed are {ENTRIES_LIMIT}")
            items = [*container, *container.values()] if isinstance(container, dict) else container
            for item in items:
                if isinstance(item, str):
                    _check_text(item)
                elif isinstance(item, dict | list):
                    following.append(item)
        level = following


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError(f"the text {text[:200]!r} has half of a surrogate pair") from None
