"""Which vLLM this project knows, and whether the seams it enters by look as they should."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from smoa_serve.errors import CompatibilityError

# Lowest and highest (major, minor) the test suite or the seam check has seen; see docs/explain/architecture.md.
SUPPORTED = ((0, 26), (0, 32))


def check_version(version: str) -> None:
    """Refuse a vLLM outside the supported range.

    Raises:
        CompatibilityError: names the version found and the range.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    found = (int(match[1]), int(match[2])) if match else None
    low, high = SUPPORTED
    if found is None or not low <= found <= high:
        raise CompatibilityError(
            f"vLLM {version} is installed; smoa-serve enters vLLM {low[0]}.{low[1]} to {high[0]}.{high[1]}. "
            "Install one of these, or a smoa-serve release that knows this vLLM."
        )


def check_signatures(seams: dict[str, tuple[Callable[..., Any], tuple[str, ...]]]) -> None:
    """Check that each function still takes the parameters this project passes or overrides.

    Args:
        seams: name for the message -> (function, parameter names in order, without self).

    Raises:
        CompatibilityError: lists every seam that changed.
    """
    changed = []
    for name, (function, expected) in seams.items():
        found = tuple(parameter for parameter in inspect.signature(function).parameters if parameter != "self")
        if found[: len(expected)] != expected:
            changed.append(f"{name} takes ({', '.join(found)}), known is ({', '.join(expected)})")
    if changed:
        raise CompatibilityError(
            "vLLM changed where smoa-serve enters it:" + "".join(f"\n  - {line}" for line in changed)
        )
