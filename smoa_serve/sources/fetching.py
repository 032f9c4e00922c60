"""`fetch`: from a source to a folder of adapter files, one download however many ask."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from filelock import Timeout
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from ..errors import AdapterError, AdapterNotFoundError, SourceUnavailableError
from ..files.disk import writing
from .archive import unpack
from .cache import Cache, Lease, Note
from .http import HttpSource
from .hub import HubSource
from .local import confine, local_path
from .objects import ObjectSource
from .policy import SourcePolicy
from .source import Pieces, Seen, Source
from .uri import Place, is_uri

_SLOWEST = 1024  # bytes a second
_PROGRESS = 64 << 10  # bytes: an attempt that brings these is none in vain
_BACKOFF = wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.2)
_KINDS: dict[str, Callable[[Place, SourcePolicy, float], Source]] = {
    "hf": HubSource,
    "http": HttpSource,
    "https": HttpSource,
}


@dataclass
class Fetched:
    """A folder of adapter files. Of a remote source it stays until this is closed: use it in a `with`.

    Attributes:
        folder: adapter_config.json and a weight file; of a local source what the path names.
        uri: the source as it may be shown and stored: without secrets.
        resolved: the hub's commit, else the ETag (or generation) of the weights, else the digest; empty of a local one.
        digest: sha256 (hex) of the files; None of a local one, which may change.
        downloaded: whether bytes were fetched for this.
    """

    folder: Path
    uri: str
    resolved: str = ""
    digest: str | None = None
    downloaded: bool = False
    _lease: Lease | None = field(default=None, repr=False)

    def close(self) -> None:
        """Let the cache remove the folder when it needs room."""
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> "Fetched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch(uri: str, policy: SourcePolicy, cache: Cache) -> Fetched:
    """Get an adapter. Blocks: call it in a thread of its own.

    Args:
        uri: a path, or a URI as in `smoa_serve.sources`.
        policy: what is allowed.
        cache: holds what is fetched; what it has is not fetched again while the source's marks are the same.

    Raises:
        PathNotAllowedError: no root, prefix or network allows it, or a redirect of it.
        AdapterNotFoundError: there is no adapter.
        AdapterError: it is no source, or what is there is none: too large, incomplete, a bad archive.
        SourceUnavailableError: it may work later; everything above will not.
        ConfigError: an extra is not installed.
        StorageError: the cache cannot be written, or has no room.
    """
    if not is_uri(uri) or uri.lower().startswith("file://"):
        return Fetched(confine(local_path(uri), policy.roots), uri)
    place = policy.place(uri)
    deadline = time.monotonic() + policy.timeout_s
    key = hashlib.sha256("\n".join((uri, *policy.names)).encode()).hexdigest()
    before = cache.note(key)
    try:
        with cache.lock(key, policy.timeout_s):
            note = cache.note(key)
            if note is not None and note != before:  # somebody fetched it while this one waited
                lease = cache.lease(note.digest)
                if lease is not None:
                    return Fetched(lease.folder, place.shown, note.resolved, note.digest, _lease=lease)
            with closing(_KINDS.get(place.scheme, ObjectSource)(place, policy, deadline)) as source:
                return _Fetch(place, policy, cache, key, source, deadline).run()
    except Timeout:
        raise SourceUnavailableError(place.shown, "another call still fetches it") from None


class _Fetch:
    """One fetch, which holds the lock of its URI. What an attempt brought is kept for the next one."""

    def __init__(
        self, place: Place, policy: SourcePolicy, cache: Cache, key: str, source: Source, deadline: float
    ) -> None:
        self._place, self._policy, self._cache, self._key = place, policy, cache, key
        self._source, self._deadline = source, deadline
        self._partial: dict[str, Seen] = {}
        self._sizes: dict[str, int] = {}
        self._best = 0
        self._in_vain = 0
        self._stop = threading.Event()

    def run(self) -> Fetched:
        retrying = Retrying(
            retry=retry_if_exception_type(SourceUnavailableError), wait=_pause, stop=self._given_up, reraise=True
        )
        with self._cache.workspace() as work:
            return retrying(self._attempt, work)

    def _given_up(self, state: RetryCallState) -> bool:
        """Whether no further attempt is made: the last ones brought nothing, or the next would come too late."""
        reached = sum(self._sizes.values())
        self._in_vain = 1 if reached >= self._best + _PROGRESS else self._in_vain + 1
        self._best = max(self._best, reached)
        return self._in_vain >= self._policy.attempts or time.monotonic() + state.upcoming_sleep >= self._deadline

    def _attempt(self, work: Path) -> Fetched:
        self._stop.clear()
        seen = self._look()
        marks = _marks(seen)
        note = self._cache.note(self._key)
        if note is not None and marks is not None and note.marks == marks:
            lease = self._cache.lease(note.digest)
            if lease is not None:
                return self._done(lease, note, downloaded=False)
        known = sum(one.size or 0 for one in seen.values())
        self._check_size(known)
        self._cache.make_room(known)
        self._download(seen, work)
        if marks is not None and _marks(self._look()) != marks:
            raise self._later("it changed while it was fetched")
        lease, note = self._cache.add(
            self._unpacked(work), self._key, marks, self._source.revision() or list(seen.values())[-1].mark
        )
        return self._done(lease, note, downloaded=True)

    def _done(self, lease: Lease, note: Note, *, downloaded: bool) -> Fetched:
        return Fetched(lease.folder, self._place.shown, note.resolved, note.digest, downloaded, lease)

    def _look(self) -> dict[str, Seen]:
        """The files to fetch: an archive, or the configuration and the first weight file that is there."""
        if self._place.archive:
            seen = self._source.look("")
            if seen is None:
                raise AdapterNotFoundError(self._place.shown, "there is no such archive")
            return {"": seen}
        config, *weights = self._policy.names
        found = self._source.look(config)
        if found is None:
            raise AdapterNotFoundError(self._place.shown, f"there is no {config} at this source")
        for name in weights:
            seen = self._source.look(name)
            if seen is not None:
                return {config: found, name: seen}
        raise self._no_weights()

    def _no_weights(self) -> AdapterError:
        more = "" if self._policy.allow_pickle else "; a .bin file is read with --allow-pickle only"
        return AdapterError(self._place.shown, f"it has none of {', '.join(self._policy.names[1:])}{more}")

    def _later(self, reason: str) -> SourceUnavailableError:
        return SourceUnavailableError(self._place.shown, reason)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._policy.max_bytes:
            raise AdapterError(
                self._place.shown, f"it has {nbytes} bytes or more, allowed are {self._policy.max_bytes} an adapter"
            )

    def _download(self, seen: dict[str, Seen], work: Path) -> None:
        folder = work / "files"
        with self._writing():
            folder.mkdir(exist_ok=True)
            for left in [file for file in folder.iterdir() if file.name not in seen]:
                left.unlink()  # of an earlier attempt, when the source had another weight file
                self._sizes.pop(left.name, None)
        with ThreadPoolExecutor(self._policy.parallel) as pool:
            running = [
                pool.submit(self._file, name, one, folder / name if name else work / "archive")
                for name, one in seen.items()
            ]
            wait(running, return_when=FIRST_EXCEPTION)
            self._stop.set()  # one that failed lasting or not: the others end at their next piece
            errors = [error for one in running if (error := one.exception()) is not None]
        lasting = [error for error in errors if not isinstance(error, SourceUnavailableError)]
        for error in lasting or errors:
            raise error

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"what is fetched from {self._place.shown}", "choose another cache folder")

    def _file(self, name: str, seen: Seen, path: Path) -> None:
        """Fetch one file, from where an earlier attempt at the same content ended."""
        with self._writing(), path.open("ab") as out:
            if seen.mark is None or self._partial.get(name) != seen:
                out.truncate(0)
            self._partial[name] = seen
            self._sizes[name] = start = out.seek(0, os.SEEK_END)
            if start != seen.size:
                with closing(self._source.read(name, seen, start)) as pieces:
                    self._write(name, seen.size, pieces, out)
            if self._stop.is_set():
                return
            length = out.tell()
        if seen.size is not None and length != seen.size:
            if length > seen.size:
                del self._partial[name]
            raise self._later(f"it ended after {length} of {seen.size} bytes")
        if seen.sha256 is not None and seen.sha256 != _sha256(path):
            del self._partial[name]
            raise self._later(f"the bytes of {name} that came are not those that the source names by their sha256")

    def _write(self, name: str, whole: int | None, pieces: Pieces, out: IO[bytes]) -> None:
        """Write what comes, as long as it is not too much, too slow or too late."""
        since, brought = time.monotonic(), 0
        for offset, piece in pieces:
            if self._stop.is_set():
                return
            if offset != out.tell():
                out.truncate(offset)  # the source began anew
                out.seek(offset)
            self._sizes[name] = offset + len(piece)
            self._check_size(sum(list(self._sizes.values())))
            out.write(piece)
            now, brought = time.monotonic(), brought + len(piece)
            if now >= self._deadline:
                raise self._later(f"it takes longer than {self._policy.timeout_s:g} s")
            if now - since >= self._policy.stall_s:
                if brought < _SLOWEST * self._policy.stall_s and out.tell() != whole:
                    raise self._later(f"only {brought} bytes came in {self._policy.stall_s:g} s")
                since, brought = now, 0

    def _unpacked(self, work: Path) -> Path:
        """The folder of adapter files: those that were fetched, or those in the archive."""
        form = self._place.archive
        if form is None:
            return work / "files"
        folder = work / "unpacked"
        with self._writing():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            limits = (self._policy.max_bytes, self._policy.max_files)
            unpack(work / "archive", form, folder, self._policy.names, limits, self._place.shown)
            if not any((folder / name).exists() for name in self._policy.names[1:]):
                raise self._no_weights()
        return folder


def _pause(state: RetryCallState) -> float:
    """Seconds before the next attempt: what the other side asks for, or ever more."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after_s if isinstance(error, SourceUnavailableError) else None
    return max(asked or 0.0, _BACKOFF(state))


def _marks(seen: dict[str, Seen]) -> str | None:
    """One text for what all files are now; None where one of them has no mark."""
    if any(one.mark is None for one in seen.values()):
        return None
    return hashlib.sha256(json.dumps([[name, one.size, one.mark] for name, one in seen.items()]).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
