"""Freed memory goes back to the system: glibc keeps it for itself, more and more of it in pieces."""

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Give back what is free; a few milliseconds. Does nothing where the C library has no `malloc_trim`."""
    function = _malloc_trim()
    if function is not None:
        function(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
