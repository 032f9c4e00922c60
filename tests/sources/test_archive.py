"""Archives: what an adapter's may hold, and malformed ones, each refused with its reason and nothing left behind."""

import gzip
import io
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator

import pytest
from sources_web import CONFIG, WEIGHTS, Web, content, files_of, left_in, serving

from smoa_serve.errors import AdapterError, AdapterNotFoundError, SourceUnavailableError
from smoa_serve.sources import Cache, SourcePolicy, fetch

FILES = files_of(nbytes=20_000)
LIMIT = 100_000


def tarred(
    members: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] | None = None, **options: object
) -> bytes:
    """A tar archive; `change` edits the header of the last member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:  # type: ignore[call-overload]
        for number, (name, data) in enumerate(members.items(), 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change is not None and number == len(members):
                change(info)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(
    members: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] | None = None, method: int = 8
) -> bytes:
    """A zip archive; `change` edits the entry of the last member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for number, (name, data) in enumerate(members.items(), 1):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            if change is not None and number == len(members):
                change(info)
            archive.writestr(info, data)
    return out.getvalue()


def typed(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, target, 0

    return change


def linked(info: zipfile.ZipInfo) -> None:
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16


def piped(info: zipfile.ZipInfo) -> None:
    info.create_system, info.external_attr = 3, (stat.S_IFIFO | 0o666) << 16


def patched(archive: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in archive
    return archive.replace(old, new, count)


def sparse() -> bytes:
    """A member of which the header says that it has a terabyte, all of it holes."""
    said = {"major": "1", "minor": "0", "realsize": str(1 << 40), "name": WEIGHTS}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        config = tarfile.TarInfo(CONFIG)
        config.size = len(FILES[CONFIG])
        archive.addfile(config, io.BytesIO(FILES[CONFIG]))
        info = tarfile.TarInfo("GNUSparseFile.0/" + WEIGHTS)
        info.pax_headers = {f"GNU.sparse.{name}": value for name, value in said.items()}
        data = b"1\n0\n0\n".ljust(512, b"\0")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def negative() -> bytes:
    """A member whose size is below zero, in base 256."""
    archive = bytearray(tarred(FILES))
    archive[124:136] = b"\xff" * 11 + b"\xfe"
    header = archive[:148] + b" " * 8 + archive[156:512]
    archive[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(archive)


def huge_header() -> bytes:
    """An extended header that says that it has 8 GiB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    return info.tobuf(tarfile.GNU_FORMAT) + b"30 path=a\n" * 100 + tarred(FILES)


def huge_directory() -> bytes:
    """A directory that says that it has 4 GiB."""
    return patched(zipped(FILES), struct.pack("<L", zipfile.ZipFile(io.BytesIO(zipped(FILES))).start_dir), b"\0\0\0\0")


def bomb() -> bytes:
    """Far more bytes than allowed, in few."""
    return zipped({**FILES, "zeros": bytes(5 << 20)})


def lying_size() -> bytes:
    """Its weights say that they have ten bytes, and unpack to more."""
    return patched(zipped(FILES), struct.pack("<L", len(FILES[WEIGHTS])), struct.pack("<L", 10), 3)


def directory_name(old: str, new: str) -> bytes:
    """Names differ between the directory and the member's own header."""
    archive = zipped(FILES)
    at = archive.rindex(old.encode())
    return archive[:at] + new.encode() + archive[at + len(old) :]


def nested(folder: str) -> dict[str, bytes]:
    return {f"{folder}{name}": data for name, data in FILES.items()}


def and_(name: str) -> dict[str, bytes]:
    return {**FILES, name: b"more"}


def twice_tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in [*FILES.items(), (f"./{WEIGHTS}", b"other")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def twice_zipped() -> bytes:
    return patched(zipped({**FILES, "adapter_model.safetensorz": b"other"}), b"safetensorz", b"safetensors")


def encrypted(archive: bytes) -> bytes:
    """The last entry of the directory says that it is encrypted."""
    at = archive.rindex(b"PK\1\2")
    return archive[: at + 8] + b"\1\0" + archive[at + 10 :]


def renamed_in_directory() -> bytes:
    archive = zipped({CONFIG: b"{}", WEIGHTS.replace("model", "madel"): b"x"})
    at = archive.rindex(b"madel")
    return archive[:at] + b"model" + archive[at + 5 :]


TAR, ZIP = "tar", "zip"
MALFORMED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "tar: empty": (TAR, lambda: b"", "cannot be read"),
    "tar: no members": (TAR, lambda: tarred({}), "is empty|cannot be read"),
    "tar: noise": (TAR, lambda: files_of(5)[WEIGHTS][:50_000], "cannot be read"),
    "tar: really a zip": (TAR, lambda: zipped(FILES), "cannot be read"),
    "tar: really gzip": (TAR, lambda: gzip.compress(tarred(FILES)), "cannot be read"),
    "tar: ends in a member": (TAR, lambda: tarred(FILES)[:9000], "cannot be read"),
    "tar: ends in a header": (TAR, lambda: tarred(FILES)[:1100], "cannot be read|none of"),
    "tar: link": (TAR, lambda: tarred(and_("l"), typed(tarfile.SYMTYPE, "/etc/passwd")), "'l' is a link"),
    "tar: hard link": (TAR, lambda: tarred(and_("l"), typed(tarfile.LNKTYPE, CONFIG)), "'l' is a link"),
    "tar: weights are a link": (TAR, lambda: tarred(FILES, typed(tarfile.SYMTYPE, "/etc/passwd")), "is a link"),
    "tar: device": (TAR, lambda: tarred(and_("d"), typed(tarfile.CHRTYPE)), "is no file or folder"),
    "tar: pipe": (TAR, lambda: tarred(and_("p"), typed(tarfile.FIFOTYPE)), "is no file or folder"),
    "tar: sparse": (TAR, sparse, "is a sparse file"),
    "tar: absolute": (TAR, lambda: tarred(and_("/etc/cron.d/x")), "absolute path"),
    "tar: leads out": (TAR, lambda: tarred(and_("../x")), "leads out"),
    "tar: leads out in between": (TAR, lambda: tarred(and_("a/../../x")), "leads out"),
    "tar: backslashes": (TAR, lambda: tarred(and_("..\\x")), "of another system"),
    "tar: drive": (TAR, lambda: tarred(and_("C:x")), "of another system"),
    "tar: control characters": (TAR, lambda: tarred(and_("a\x1b[2Jb")), "not to be printed"),
    "tar: long name": (TAR, lambda: tarred(and_("x" * 2000)), "too long"),
    "tar: twice": (TAR, twice_tarred, "is there twice"),
    "tar: two adapters": (TAR, lambda: tarred({**nested("a/"), **nested("b/")}), "has 2 files"),
    "tar: no configuration": (TAR, lambda: tarred({WEIGHTS: b"x"}), "has 0 files"),
    "tar: no weights": (TAR, lambda: tarred({CONFIG: b"{}"}), f"none of {WEIGHTS}"),
    "tar: weights elsewhere": (TAR, lambda: tarred({CONFIG: b"{}", f"a/{WEIGHTS}": b"x"}), "none of"),
    "tar: pickle": (TAR, lambda: tarred({CONFIG: b"{}", "adapter_model.bin": b"x"}), "--allow-pickle"),
    "tar: too many": (TAR, lambda: tarred({**FILES, **{f"f{n}": b"" for n in range(20)}}), "more than 10 members"),
    "tar: size below zero": (TAR, negative, "bytes|cannot be read"),
    "tar: huge header": (TAR, huge_header, "cannot be read"),
    "tar: huge member": (TAR, lambda: tarred({**FILES, "big": bytes(LIMIT)}), "allowed are 100000"),
    "zip: empty": (ZIP, lambda: b"", "cannot be read"),
    "zip: no members": (ZIP, lambda: zipped({}), "is empty"),
    "zip: noise": (ZIP, lambda: files_of(5)[WEIGHTS][:50_000], "cannot be read"),
    "zip: really a tar": (ZIP, lambda: tarred(FILES), "cannot be read"),
    "zip: cut": (ZIP, lambda: zipped(FILES)[:-40], "cannot be read"),
    "zip: damaged": (
        ZIP,
        lambda: patched(zipped(FILES, method=0), FILES[WEIGHTS][100:110], bytes(10)),
        "cannot be read",
    ),
    "zip: link": (ZIP, lambda: zipped(FILES, linked), "is a link"),
    "zip: pipe": (ZIP, lambda: zipped(and_("p"), piped), "is no file or folder"),
    "zip: encrypted": (ZIP, lambda: encrypted(zipped(FILES)), "is encrypted"),
    "zip: other packing": (ZIP, lambda: zipped(FILES, method=zipfile.ZIP_LZMA), "packed by method 14"),
    "zip: absolute": (ZIP, lambda: zipped(and_("/x")), "absolute path"),
    "zip: leads out": (ZIP, lambda: zipped(and_("a/../../x")), "leads out"),
    "zip: null byte": (ZIP, lambda: patched(zipped(and_("a0b")), b"a0b", b"a\0b"), "not to be printed"),
    "zip: twice": (ZIP, twice_zipped, "is there twice"),
    "zip: two names": (ZIP, lambda: directory_name(WEIGHTS, WEIGHTS.replace("model", "madel")), "none of"),
    "zip: two names, ours in the directory": (ZIP, renamed_in_directory, "cannot be read"),
    "zip: bomb": (ZIP, bomb, "allowed are 100000"),
    "zip: lies about a size": (ZIP, lying_size, "another size|cannot be read"),
    "zip: directory is elsewhere": (ZIP, huge_directory, "cannot be read"),
    "zip: too many": (ZIP, lambda: zipped({**FILES, **{f"f{n}": b"" for n in range(20)}}), "more than 10 members"),
}


@pytest.fixture(scope="module")
def plain() -> Iterator[Web]:
    with serving("http") as server:
        yield server


@pytest.fixture
def policy(plain: Web, make_policy: Callable[..., SourcePolicy]) -> SourcePolicy:
    return make_policy(plain.url, max_bytes=LIMIT, max_files=10)


@pytest.mark.parametrize(("kind", "make", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_archive_is_refused_whole(
    kind: str, make: Callable[[], bytes], reason: str, plain: Web, policy: SourcePolicy, cache: Cache
) -> None:
    plain.files[f"/a.{kind}"] = make()
    with pytest.raises(AdapterError, match=reason) as raised:
        fetch(f"{plain.url}/a.{kind}", policy, cache)
    assert not isinstance(raised.value, SourceUnavailableError | AdapterNotFoundError)
    assert left_in(cache) == []
    assert list((cache.root / "content").iterdir()) == []


GOOD = {
    "tar": (TAR, lambda: tarred(FILES)),
    "tar, gnu": (TAR, lambda: tarred(nested("./a/"), format=tarfile.GNU_FORMAT)),
    "tar, ustar": (TAR, lambda: tarred(nested("a/b/"), format=tarfile.USTAR_FORMAT)),
    "tar with more": (TAR, lambda: tarred(and_("README.md"))),
    "zip": (ZIP, lambda: zipped(FILES)),
    "zip, stored, in a folder": (ZIP, lambda: zipped(nested("a/"), method=0)),
    "zip with more": (ZIP, lambda: zipped(and_("__MACOSX/._adapter_config.json"))),
}


@pytest.mark.parametrize(("kind", "make"), GOOD.values(), ids=GOOD.keys())
def test_an_archive_gives_the_adapters_files_alone(
    kind: str, make: Callable[[], bytes], plain: Web, policy: SourcePolicy, cache: Cache
) -> None:
    plain.files[f"/b.{kind}"] = make()
    with fetch(f"{plain.url}/b.{kind}", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
    assert left_in(cache) == []


def test_an_archive_that_is_not_there_is_not_found(plain: Web, policy: SourcePolicy, cache: Cache) -> None:
    with pytest.raises(AdapterNotFoundError, match="no such archive"):
        fetch(f"{plain.url}/absent.tar", policy, cache)


def test_a_header_of_gigabytes_takes_no_memory(
    plain: Web, make_policy: Callable[..., SourcePolicy], cache: Cache
) -> None:
    plain.files["/c.tar"] = huge_header() + bytes(64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="a header has more than 16777216 bytes"):
            fetch(f"{plain.url}/c.tar", make_policy(plain.url), cache)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
