"""Errors of the disk as users can act on them."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def writing(what: str, elsewhere: str) -> Iterator[None]:
    """Turn what the operating system refuses into one clear error.

    Args:
        what: is written, and where to, for the message.
        elsewhere: how to have it written to another place.

    Raises:
        StorageError: with what was refused and what to do.
    """
    try:
        yield
    except (OSError, SafetensorError, NotImplementedError) as error:
        number = _number(error)
        if number is None and isinstance(error, SafetensorError):
            raise
        remedy = "see to it"
        if number in _FULL:
            remedy = "free some space there"
        elif number in _CLOSED:
            remedy = "let the user that this runs as write there"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"{what} cannot be written: {reason}; {remedy}, or {elsewhere}") from error


def _number(error: Exception) -> int | None:
    """The operating system's number; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
