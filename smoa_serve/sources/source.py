"""What every remote source can do."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

# Bytes with their offsets. Whoever does not read them all closes it: left to the garbage collector, it would take the
# locks of its connection pool at any moment.
Pieces = Generator[tuple[int, bytes], None, None]


@dataclass(frozen=True)
class Seen:
    """What a source says of one file.

    Attributes:
        size: bytes; None where it does not say.
        mark: changes with the content (ETag, generation, commit); None where there is none.
        sha256: of the content, where the source knows it.
    """

    size: int | None
    mark: str | None
    sha256: str | None = None


class Source(Protocol):
    """One adapter somewhere else: a folder of files, or one archive, whose name is "".

    Both methods raise SourceUnavailableError for what may work later, and AdapterError or PathNotAllowedError for what
    will not.
    """

    def look(self, name: str) -> Seen | None:
        """What is known about a file; None when there is none of that name."""

    def read(self, name: str, seen: Seen, start: int) -> Pieces:
        """The bytes of a file from `start` on, each piece with its offset.

        A source that cannot begin there begins at 0. Content that is not the one `seen` is a SourceUnavailableError.
        """

    def revision(self) -> str | None:
        """The commit that all files belong to, where the source has such."""

    def close(self) -> None:
        """Let go of connections."""
