"""A folder of adapters that is watched: one folder an adapter, its name the adapter's.

It is looked through again and again instead of waiting for inotify (watchfiles): network and FUSE mounts, where such
folders mostly lie, tell inotify nothing of other machines' writes, a bind mount may not either, and "quiet for two
seconds" has to be looked for anyway. A look is three stat calls an adapter: 2,000 adapters cost a few hundredths of a
second.

What is judged is what was seen to stay the same, not the clock of the file server. A folder that was renamed after its
last file came into it counts at once.
"""

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..adapters.source import CONFIG_NAME

logger = logging.getLogger(__name__)

State = tuple[tuple[str, int, int, int], ...]  # of each file: name, inode, bytes, time of its last change in ns


class Change(StrEnum):
    """What happened to an adapter's folder."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


@dataclass(frozen=True)
class FolderEvent:
    """One change: the adapter's name, and its folder."""

    change: Change
    name: str
    folder: Path


@dataclass
class _Watched:
    state: State | None  # None: it is gone
    since: float  # of that state, monotonic seconds
    told: State | None = None


def watch(
    folder: Path, *, quiet_s: float = 2.0, interval_s: float = 0.5, stop: threading.Event | None = None
) -> Iterator[FolderEvent]:
    """Yield what happens to the adapters in a folder, those that are there already first.

    A folder counts when it holds an adapter_config.json, its name does not begin with ".", and its files stayed the
    same for `quiet_s`, or it appeared by rename. A folder that is gone counts after `quiet_s` too, so that one that
    replaces it is a change. While the watched folder cannot be read, nothing has happened.

    Args:
        folder: which holds the adapters' folders.
        quiet_s: see above.
        interval_s: between two looks.
        stop: ends it.
    """
    stop = stop or threading.Event()
    watched: dict[str, _Watched] = {}
    readable = True
    while not stop.is_set():
        try:
            found = _look(folder)
            readable = True
        except OSError as error:
            if readable:
                logger.warning("The watched folder %s cannot be read; its adapters stay as they are: %s", folder, error)
            readable = False
        else:
            yield from _events(folder, found, watched, quiet_s)
        stop.wait(interval_s)


def _events(
    folder: Path, found: dict[str, tuple[State, bool]], watched: dict[str, _Watched], quiet_s: float
) -> Iterator[FolderEvent]:
    now = time.monotonic()
    for name in sorted({*found, *watched}):
        state, renamed = found.get(name, (None, False))
        one = watched.setdefault(name, _Watched(state, now))
        if one.state != state:
            one.state, one.since = state, now
        if state == one.told or (not renamed and now - one.since < quiet_s):
            continue
        change = Change.REMOVED if state is None else Change.ADDED if one.told is None else Change.CHANGED
        one.told = state
        yield FolderEvent(change, name, folder / name)
    for name in [name for name, one in watched.items() if one.state is None and one.told is None]:
        del watched[name]


def _look(folder: Path) -> dict[str, tuple[State, bool]]:
    """The state of each adapter's folder, and whether it was renamed after its last change."""
    found = {}
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        try:
            state = _state(entry)
            itself = entry.stat()
        except OSError:  # it goes as it is looked at, or may not be read
            continue
        if any(name == CONFIG_NAME for name, *_ in state):
            # A rename changes the folder's own record (ctime), not its list of files (mtime); writing a file into it
            # changes both at once.
            last = max(itself.st_mtime_ns, *(file.stat().st_ctime_ns for file in entry.iterdir()))
            found[entry.name] = (state, itself.st_ctime_ns > last)
    return found


def _state(folder: Path) -> State:
    files = [(file.name, file.stat()) for file in folder.iterdir()]
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in files if not name.startswith(".")))
