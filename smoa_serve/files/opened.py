"""A file that is opened once: whatever comes to stand at its path, this one is read."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

# A larger file, as a Trainer may leave, would be held twice for a moment if it was read whole.
READ_WHOLE_BYTES = 1 << 30


class OpenedFile:
    """A file that is open for reading until nobody refers to this object.

    Args:
        path: of a regular file.

    Attributes:
        path: likewise; never opened again.
        nbytes: its size.
        is_large: it is better mapped than read whole.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = path.open("rb")
        weakref.finalize(self, self._handle.close)
        found = os.fstat(self._handle.fileno())
        self._mark, self.nbytes = _mark(found), found.st_size
        self.is_large = self.nbytes >= READ_WHOLE_BYTES

    @property
    def path_by_number(self) -> str:
        """A path for libraries that take nothing else: it leads to this very file, even where that was removed."""
        return f"/dev/fd/{self._handle.fileno()}"

    def is_in_place(self) -> bool:
        """Whether its path still leads to it."""
        return _mark(self.path.stat()) == self._mark

    @contextmanager
    def reading(self) -> Iterator[BufferedReader]:
        """Its bytes, from the first.

        Raises:
            OSError: they cannot be read, or somebody wrote into the file since it was opened.
        """
        self._handle.seek(0)
        yield self._handle
        if _mark(os.fstat(self._handle.fileno())) != self._mark:
            raise OSError(f"{self.path.name} was changed while it was read; try again when nobody writes it")


def _mark(found: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or written; not with its name or its rights."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
