"""A watched folder: what counts, and when."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue

import pytest
from sources_web import CONFIG, WEIGHTS

from smoa_serve.sources import FolderEvent, watch

QUIET, NONE = 0.7, 1.2
Next = Callable[..., tuple[str, str] | None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def following(root: Path) -> Iterator[Next]:
    """The next event as (change, name); None when none comes for so long."""
    stop, events = threading.Event(), Queue[FolderEvent]()

    def follow() -> None:
        for event in watch(root, quiet_s=QUIET, interval_s=0.05, stop=stop):
            events.put(event)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()

    def following(seconds: float = 20) -> tuple[str, str] | None:
        try:
            event = events.get(timeout=seconds)
        except Empty:
            return None
        assert event.folder == root / event.name
        return event.change.value, event.name

    yield following
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def write(folder: Path, weights: bytes = b"x") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(json.dumps({}))
    return folder


def test_what_is_there_already_comes_first(root: Path) -> None:
    for name in ("b", "a", ".hidden"):
        write(root / name)
    (root / "no-adapter").mkdir()
    (root / "file").write_text("x")
    watching = watch(root, quiet_s=0.1, interval_s=0.02)
    assert [next(watching).name for _ in range(2)] == ["a", "b"]
    watching.close()  # type: ignore[attr-defined]


def test_a_folder_counts_when_its_files_have_been_quiet(root: Path, following: Next) -> None:
    folder = write(root / "legal")
    for number in range(8):
        (folder / WEIGHTS).write_bytes(b"x" * number)
        time.sleep(0.1)
    ended = time.monotonic()
    assert following() == ("added", "legal")
    assert time.monotonic() - ended > QUIET / 2
    assert following(NONE) is None


def test_a_folder_that_appears_by_rename_counts_at_once(root: Path, tmp_path: Path, following: Next) -> None:
    for ready in (write(tmp_path / "staging"), write(root / ".staging")):
        began = time.monotonic()
        ready.rename(root / f"from-{ready.parent.name}")
        assert following() == ("added", f"from-{ready.parent.name}") or pytest.fail("no event")
        assert time.monotonic() - began < QUIET
    assert {path.name for path in root.iterdir()} == {"from-adapters", f"from-{tmp_path.name}"}


def test_new_content_is_a_change_once_it_is_quiet(root: Path, following: Next) -> None:
    folder = write(root / "legal")
    assert following() == ("added", "legal")
    (folder / WEIGHTS).write_bytes(b"new")
    assert following() == ("changed", "legal")
    other = folder / ".part"
    other.write_bytes(b"abc")  # same size, other file
    other.rename(folder / WEIGHTS)
    assert following() == ("changed", "legal")


def test_a_folder_that_another_one_replaces_is_a_change(root: Path, tmp_path: Path, following: Next) -> None:
    write(root / "legal")
    assert following() == ("added", "legal")
    write(tmp_path / "next", b"new")
    (root / "legal").rename(tmp_path / "old")
    time.sleep(0.2)
    (tmp_path / "next").rename(root / "legal")
    assert following() == ("changed", "legal")
    assert following(NONE) is None


def test_a_folder_that_is_gone_is_removed(root: Path, following: Next) -> None:
    write(root / "legal")
    assert following() == ("added", "legal")
    shutil.rmtree(root / "legal")
    assert following() == ("removed", "legal")
    write(root / "legal")
    assert following() == ("added", "legal")


def test_a_folder_that_is_gone_before_it_counted_is_no_event(root: Path, following: Next) -> None:
    write(root / "legal")
    time.sleep(0.15)
    shutil.rmtree(root / "legal")
    assert following(NONE) is None


def test_while_the_folder_cannot_be_read_nothing_happens(
    root: Path, tmp_path: Path, following: Next, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "legal")
    assert following() == ("added", "legal")
    with caplog.at_level(logging.WARNING):
        root.rename(tmp_path / "away")
        assert following(NONE) is None
    assert "its adapters stay as they are" in caplog.text
    os.rename(tmp_path / "away", root)
    assert following(NONE) is None


def test_thousands_of_folders_are_looked_through_quickly(root: Path) -> None:
    for number in range(500):
        write(root / f"a{number:03}")
    watching = watch(root, quiet_s=0, interval_s=0)
    began = time.process_time()
    events = [next(watching) for _ in range(500)]
    assert len(events) == 500
    assert time.process_time() - began < 0.5
    watching.close()  # type: ignore[attr-defined]
