"""A bounded folder of fetched adapters by content, shared by the processes of one machine.

    content/<digest>/   adapter files, complete: it appears by rename
    notes/<key>.json    what a URI gave last (its hash is the key; no URI is written down): marks and digest
    locks/<key>.lock    held by whoever fetches that URI
    work/<random>/      what is being fetched or removed, under a lock of the folder itself

A lock of a folder (flock) ends with its process and goes with its inode through a rename. Whoever uses an entry holds
it shared; an entry is removed only under an exclusive one. Files that a process left in work/ go with the next start.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import StorageError
from ..files.disk import writing
from ..files.json_file import read_json

logger = logging.getLogger(__name__)
DEFAULT_BYTES = 20 << 30
_NOTE_S = 30 * 24 * 3600  # URIs that were signed anew each time leave theirs


@dataclass(frozen=True)
class Note:
    """What a URI gave: the marks of its files then, the entry, and the commit or mark that users see."""

    marks: str | None
    digest: str
    resolved: str
    when: int


class Lease:
    """An entry that stays while this is open; also closed when nothing refers to it any more."""

    def __init__(self, folder: Path, lock: int = fcntl.LOCK_SH) -> None:
        """Raises OSError: there is no such folder, or (with LOCK_NB) somebody else has it."""
        self.folder = folder
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._handle, lock)
        except OSError:
            self.close()
            raise

    def is_of(self, folder: Path) -> bool:
        """Whether the folder of that path is the one that is locked."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._handle), os.stat(folder))
        return False

    def close(self) -> None:
        """Let it go."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    __del__ = close


class Cache:
    """See the module.

    Args:
        root: its folder.
        max_bytes: of all entries; the least recently used go first, none that is in use.
    """

    def __init__(self, root: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.root, self.max_bytes = root.expanduser().resolve(), max_bytes
        with self._writing():
            for name in ("content", "notes", "locks", "work"):
                (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.root / "work").iterdir():
                with suppress(OSError):
                    lock = Lease(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.close()
            for note in (self.root / "notes").iterdir():
                with suppress(OSError):
                    if note.stat().st_mtime < time.time() - _NOTE_S:
                        note.unlink()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"the cache of fetched adapters in {self.root}", "choose another cache folder")

    @contextmanager
    def lock(self, key: str, timeout_s: float) -> Iterator[None]:
        """Hold the lock of a URI, over all threads and processes.

        Raises:
            Timeout: somebody else held it all the time.
            StorageError: it cannot be made.
        """
        file = self.root / "locks" / f"{key}.lock"
        lock = FileLock(file, timeout=timeout_s)
        with self._writing(), suppress(Timeout):
            lock.acquire()
        if not lock.is_locked:
            raise Timeout(str(file))
        try:
            yield
        finally:
            # While it is held: who waits opens the file anew at each try. Names that do not exist leave nothing.
            with suppress(OSError):
                file.unlink()
            lock.release()

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder that is gone afterwards, with what is then still in it.

        Raises:
            StorageError: it cannot be made.
        """
        with self._writing():
            folder = Path(tempfile.mkdtemp(dir=self.root / "work"))
            try:
                lease = Lease(folder)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lease.close()

    def note(self, key: str) -> Note | None:
        """What the URI of that key gave last."""
        with suppress(OSError, ValueError, TypeError):
            return Note(**read_json(self.root / "notes" / f"{key}.json"))
        return None

    def lease(self, digest: str) -> Lease | None:
        """An intact entry, marked as used just now; None when there is none. A damaged one is removed."""
        folder = self.root / "content" / digest
        try:
            lease = Lease(folder)
        except OSError:
            return None
        try:
            if lease.is_of(folder):
                if digest_of(folder) == digest:
                    os.utime(folder)
                    return lease
                logger.warning("The cached adapter %s is damaged and is fetched again", digest[:16])
                self._discard(folder)
        except OSError as error:
            logger.warning("The cached adapter %s cannot be read: %s", digest[:16], error)
        lease.close()
        return None

    def add(self, folder: Path, key: str, marks: str | None, resolved: str | None) -> tuple[Lease, Note]:
        """Make a folder of files, in a workspace, an entry, and note that the URI of that key gave it.

        Raises:
            StorageError: it cannot be written, or has no room.
        """
        with self._writing():
            self.make_room(_size(folder))
            for file in folder.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            digest = digest_of(folder)
            note = Note(marks, digest, resolved or digest, time.time_ns())
            written = folder.with_name("note")
            written.write_text(json.dumps(asdict(note)), encoding="utf-8")
            lease = self.lease(digest) or self._put(folder, digest)
            os.replace(written, self.root / "notes" / f"{key}.json")
        return lease, note

    def _put(self, folder: Path, digest: str) -> Lease:
        lease, entry = Lease(folder), self.root / "content" / digest
        try:
            folder.rename(entry)
        except OSError:
            lease.close()
            other = self.lease(digest)  # another URI gave the same, just now
            if other is None:
                raise
            return other
        lease.folder = entry
        return lease

    def make_room(self, nbytes: int) -> None:
        """Remove entries until `nbytes` more fit: the least recently used first, none that is in use.

        Raises:
            StorageError: they cannot be made to fit.
        """
        entries = []
        with self._writing():
            for folder in (self.root / "content").iterdir():
                with suppress(FileNotFoundError):  # somebody else makes room
                    entries.append((folder.stat().st_mtime_ns, _size(folder), folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total + nbytes <= self.max_bytes:
                return
            with suppress(OSError):
                lock = Lease(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.is_of(folder) and self._discard(folder):
                    total -= size
                lock.close()
        if total + nbytes > self.max_bytes:
            raise StorageError(
                f"the cache of fetched adapters in {self.root} may hold {self.max_bytes} bytes, and {nbytes} more do "
                f"not fit beside the {total} that are in use; let it hold more"
            )

    def _discard(self, folder: Path) -> bool:
        """Take an entry out at once, then remove it."""
        trash = self.root / "work" / f"{folder.name}-{time.monotonic_ns()}"
        try:
            folder.rename(trash)
        except OSError as error:
            logger.warning("The cached adapter %s stays: %s", folder.name[:16], error)
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True


def digest_of(folder: Path) -> str:
    """sha256 (hex) of the names and bytes of a folder's files.

    Raises:
        OSError: one cannot be read.
    """
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as handle:
            whole.update(f"{hashlib.file_digest(handle, 'sha256').hexdigest()} {file.name}\n".encode())
    return whole.hexdigest()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
