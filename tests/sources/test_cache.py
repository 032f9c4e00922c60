"""The cache: whole entries alone, whatever fails; bounded, and nothing goes that is in use."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sources_web import CONFIG, WEIGHTS, Web, content, files_of, left_in, serving
from test_archive import tarred

from smoa_serve.errors import SmoaError, StorageError
from smoa_serve.sources import Cache, SourcePolicy, fetch
from smoa_serve.sources.cache import digest_of

FILES = files_of(nbytes=20_000)
# What Python tells its audit hooks of operations on files that may fail for want of room or rights.
EVENTS = {"open", "os.mkdir", "os.rename", "os.chmod", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "os.utime",
          "os.truncate", "fcntl.flock"}  # fmt: skip


@dataclass
class Disk:
    """Fails at operation number `fails_at` below `folder`, and at all later ones where `stays` is set."""

    folder: str = "/nowhere"
    fails_at: int = -1
    number: int = errno.ENOSPC
    stays: bool = False
    seen: list[str] = field(default_factory=list)

    def step(self, event: str, path: object) -> None:
        if event == "fcntl.flock" and isinstance(path, int) and path >= 0:
            path = os.readlink(f"/proc/self/fd/{path}")
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        self.seen.append(f"{event} {path}")
        if len(self.seen) == self.fails_at or (self.stays and 0 < self.fails_at < len(self.seen)):
            raise OSError(self.number, os.strerror(self.number), os.fspath(path))


DISK = Disk()
_HOOKED: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS and arguments and DISK.folder != "/nowhere" and arguments[-1] != fcntl.LOCK_UN:
        DISK.step(event, arguments[0])


@contextmanager
def failing(folder: Path, at: int = -1, number: int = errno.ENOSPC, *, stays: bool = False) -> Iterator[Disk]:
    """Operations below `folder` are counted, and number `at` fails."""
    if not _HOOKED:
        sys.addaudithook(_audit)  # for ever; it does nothing outside of this block
        _HOOKED.append(True)
    DISK.__init__(str(folder), at, number, stays)  # type: ignore[misc]
    try:
        yield DISK
    finally:
        DISK.folder = "/nowhere"


@pytest.fixture(scope="module")
def plain() -> Iterator[Web]:
    with serving("http") as server:
        server.files["/a.tar"] = tarred(FILES)
        for seed in range(6):
            server.files.update({f"/a{seed}/{name}": data for name, data in files_of(seed, 20_000).items()})
        yield server


@pytest.fixture
def policy(plain: Web, make_policy: Callable[..., SourcePolicy]) -> SourcePolicy:
    return make_policy(plain.url, attempts=1)


def whole(cache: Cache) -> list[str]:
    """The digests of all entries, each compared with its content."""
    entries = list((cache.root / "content").iterdir())
    assert all(digest_of(entry) == entry.name for entry in entries)
    return [entry.name for entry in entries]


def refusal(call: Callable[[], Any]) -> SmoaError | None:
    """What a call raises; only errors for users are let through."""
    try:
        call().close()
    except SmoaError as error:
        return error
    return None


@pytest.mark.parametrize(("number", "stays"), [(errno.ENOSPC, False), (errno.EACCES, True)], ids=["once", "for good"])
@pytest.mark.parametrize(
    ("what", "before"), [("a0", "nothing"), ("a0", "another"), ("a0", "a damaged one"), ("a.tar", "nothing")]
)
def test_a_fetch_fails_whole_at_every_operation(
    what: str, before: str, number: int, stays: bool, plain: Web, policy: SourcePolicy, tmp_path: Path
) -> None:
    uri, failed, at = f"{plain.url}/{what}", 0, 0
    while True:
        at += 1
        cache = Cache(tmp_path / f"cache{at}")
        if before == "another":
            fetch(f"{plain.url}/a1", policy, cache).close()
        elif before == "a damaged one":
            with fetch(uri, policy, cache) as fetched:
                (fetched.folder / WEIGHTS).write_bytes(b"damaged")
        kept = whole(cache) if before == "another" else []
        with failing(cache.root, at, number, stays=stays) as disk:
            error = refusal(lambda: fetch(uri, policy, Cache(cache.root)))  # noqa: B023
        if len(disk.seen) < at:
            break
        if error is not None:
            failed += 1
            assert isinstance(error, StorageError), disk.seen[at - 1]
            assert str(cache.root) in str(error) or uri in str(error)
        if before != "a damaged one":
            assert set(kept) <= set(whole(cache))
        again = Cache(cache.root)
        with fetch(uri, policy, again) as fetched:
            assert content(fetched.folder) == FILES
        assert left_in(again) == [], disk.seen[at - 1]
        whole(again)
    assert error is None
    assert failed > 15


def test_the_least_recently_used_goes_first_and_none_that_is_in_use(
    plain: Web, policy: SourcePolicy, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=65_000)  # three
    first = fetch(f"{plain.url}/a0", policy, cache)
    digests = [first.digest]
    for seed in (1, 2):
        with fetch(f"{plain.url}/a{seed}", policy, cache) as fetched:
            digests.append(fetched.digest)
    for age, digest in enumerate(digests):
        os.utime(cache.root / "content" / str(digest), (age, age))
    fetch(f"{plain.url}/a1", policy, cache).close()  # used again
    fetch(f"{plain.url}/a3", policy, cache).close()
    assert digests[2] not in whole(cache)
    assert {digests[0], digests[1]} < set(whole(cache))
    first.close()
    fetch(f"{plain.url}/a4", policy, cache).close()
    assert digests[0] not in whole(cache)
    assert len(whole(cache)) == 3
    assert left_in(cache) == []


def test_when_all_is_in_use_nothing_goes_and_the_remedy_is_named(
    plain: Web, policy: SourcePolicy, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=45_000)
    held = [fetch(f"{plain.url}/a{seed}", policy, cache) for seed in (0, 1)]
    with pytest.raises(StorageError, match=r"may hold 45000 bytes.* in use; let it hold more"):
        fetch(f"{plain.url}/a2", policy, cache)
    assert [content(one.folder) for one in held] == [files_of(seed, 20_000) for seed in (0, 1)]


def test_another_process_holds_its_entries_until_it_ends(plain: Web, policy: SourcePolicy, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=25_000)
    with fetch(f"{plain.url}/a0", policy, cache) as fetched:
        digest = fetched.digest
    code = (
        "import fcntl, os, sys\nhandle = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.flock(handle, fcntl.LOCK_SH)\nprint('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(cache.root / "content" / str(digest))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StorageError):
            fetch(f"{plain.url}/a1", policy, cache)
        process.send_signal(signal.SIGKILL)
        process.wait()
    fetch(f"{plain.url}/a1", policy, cache).close()
    assert digest not in whole(cache)


def test_a_damaged_entry_is_fetched_again(plain: Web, policy: SourcePolicy, cache: Cache) -> None:
    for damage in (
        lambda f: (f / CONFIG).unlink(),
        lambda f: (f / WEIGHTS).write_bytes(b""),
        lambda f: (f / "x").touch(),
    ):
        with fetch(f"{plain.url}/a0", policy, cache) as fetched:
            damage(fetched.folder)
        with fetch(f"{plain.url}/a0", policy, cache) as again:
            assert again.downloaded
            assert content(again.folder) == FILES
    assert whole(cache) == [again.digest]


def test_a_note_that_cannot_be_read_costs_a_download(plain: Web, policy: SourcePolicy, cache: Cache) -> None:
    fetch(f"{plain.url}/a0", policy, cache).close()
    (note,) = (cache.root / "notes").iterdir()
    for text in ("", "{}", '{"marks": 1}', "[]"):
        note.write_text(text)
        with fetch(f"{plain.url}/a0", policy, cache) as again:
            assert content(again.folder) == FILES


def test_two_uris_of_the_same_content_share_an_entry(plain: Web, policy: SourcePolicy, cache: Cache) -> None:
    with fetch(f"{plain.url}/a0", policy, cache) as one, fetch(f"{plain.url}/a.tar", policy, cache) as other:
        assert one.folder == other.folder
    assert len(whole(cache)) == 1


def test_what_a_dead_process_left_goes_with_the_next_start_and_a_living_ones_stays(cache: Cache) -> None:
    (cache.root / "work" / "dead").mkdir()
    (cache.root / "work" / "dead" / "archive").write_text("x")
    with cache.workspace() as living:
        (living / "archive").write_text("x")
        Cache(cache.root)
        assert left_in(cache) == sorted([f"work/{living.name}", f"work/{living.name}/archive"])
    assert left_in(cache) == []


def test_notes_that_nobody_asked_for_in_a_month_go(plain: Web, policy: SourcePolicy, cache: Cache) -> None:
    for seed in (0, 1):
        fetch(f"{plain.url}/a{seed}", policy, cache).close()
    old, _ = sorted((cache.root / "notes").iterdir(), key=lambda file: file.stat().st_mtime)
    os.utime(old, (time.time() - 31 * 24 * 3600,) * 2)
    Cache(cache.root)
    assert len(list((cache.root / "notes").iterdir())) == 1


def test_names_that_do_not_exist_leave_nothing(plain: Web, policy: SourcePolicy, cache: Cache) -> None:
    for number in range(5):
        with pytest.raises(SmoaError):
            fetch(f"{plain.url}/absent{number}", policy, cache)
    assert [file for file in cache.root.rglob("*") if file.parent != cache.root] == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="choose another cache folder"):
        Cache(tmp_path / "file" / "cache")
