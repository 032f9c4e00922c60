""".tar and .zip archives from anybody: every member is judged before one byte is unpacked, and only adapter files are.

A member is read by its stream and written under a name of ours: no path, link, owner or mode of the archive is used.
"""

import errno
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..adapters.source import CONFIG_NAME
from ..errors import AdapterError
from ..files.disk import writing

_PIECE = 1 << 20
_HEADER_LIMIT = 16 << 20  # tarfile and zipfile read extended headers and the directory into memory
_NAME_LIMIT = 1024


@dataclass(frozen=True)
class _Member:
    """One entry of an archive: its name as stored, size in bytes when unpacked, why it cannot be taken, its stream."""

    name: str
    size: int
    is_folder: bool
    reason: str | None
    open: Callable[[], IO[bytes] | None]


class _Bounded:
    """A file of which no single read is large: what a header claims is not believed."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle

    def read(self, size: int = -1) -> bytes:
        data = self._handle.read(_HEADER_LIMIT + 1 if size < 0 else min(size, _HEADER_LIMIT + 1))
        if len(data) > _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header has more than {_HEADER_LIMIT} bytes")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def unpack(archive: Path, form: str, folder: Path, names: Sequence[str], limits: tuple[int, int], shown: str) -> None:
    """Unpack the adapter in an archive.

    Args:
        archive: the file.
        form: "tar" or "zip".
        folder: empty; gets the files.
        names: of the files to take. They lie at the top or in one folder.
        limits: bytes of all members unpacked, and number of members.
        shown: the source, for messages.

    Raises:
        AdapterError: with what is wrong with it.
        StorageError: the folder cannot be written.
    """
    with writing(f"what is unpacked from {shown}", "choose another cache folder"):
        try:
            with archive.open("rb") as handle:
                _unpack(_Bounded(handle), form, folder, names, limits, shown)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which says where a header led
                raise
            raise AdapterError(shown, f"the .{form} archive cannot be read: {error}") from error


def _unpack(handle: Any, form: str, folder: Path, names: Sequence[str], limits: tuple[int, int], shown: str) -> None:
    members = (_tar_members if form == "tar" else _zip_members)(handle, limits[1], shown)
    _check(members, limits, shown)
    base = _base(members, shown)
    for name in names:
        member = next((m for m in members if PurePosixPath(m.name) == base / name), None)
        if member is not None:
            _copy(member, folder / name, shown)


def _tar_members(handle: IO[bytes], most: int, shown: str) -> list[_Member]:
    archive = tarfile.open(fileobj=handle, mode="r:")  # noqa: SIM115 - the handle is the caller's
    members: list[_Member] = []
    for info in archive:
        _check_count(len(members) + 1, most, shown)
        reason = None
        if info.issym() or info.islnk():
            reason = "is a link"
        elif info.issparse():
            reason = "is a sparse file"
        elif not (info.isreg() or info.isdir()):
            reason = "is no file or folder"
        members.append(_Member(info.name, info.size, info.isdir(), reason, partial(archive.extractfile, info)))
    if not members:
        raise AdapterError(shown, "the archive is empty")
    return members


def _zip_members(handle: IO[bytes], most: int, shown: str) -> list[_Member]:
    archive = zipfile.ZipFile(handle)
    members: list[_Member] = []
    for info in archive.infolist():
        _check_count(len(members) + 1, most, shown)
        mode = info.external_attr >> 16
        reason = None
        if stat.S_ISLNK(mode):
            reason = "is a link"
        elif mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            reason = "is no file or folder"
        elif info.flag_bits & 0x1:
            reason = "is encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = f"is packed by method {info.compress_type}; stored and deflated are read"
        members.append(_Member(info.orig_filename, info.file_size, info.is_dir(), reason, partial(archive.open, info)))
    if not members:
        raise AdapterError(shown, "the archive is empty")
    return members


def _check_count(number: int, most: int, shown: str) -> None:
    if number > most:
        raise AdapterError(shown, f"the archive has more than {most} members")


def _check(members: Sequence[_Member], limits: tuple[int, int], shown: str) -> None:
    """Refuse an archive with any member that an adapter's has not, with every reason."""
    reasons, seen = [], set()
    for member in members:
        path = PurePosixPath(member.name)
        reason = member.reason or _name_reason(member.name)
        if reason is None and path in seen and not member.is_folder:
            reason = "is there twice"
        if reason is None and member.size < 0:
            reason = f"says that it has {member.size} bytes"
        if reason is not None:
            reasons.append(f"the member {member.name[:200]!r} {reason}")
        seen.add(path)
    total = sum(member.size for member in members)
    if total > limits[0]:
        reasons.append(f"the archive has {total} bytes when unpacked, allowed are {limits[0]}")
    if reasons:
        raise AdapterError(shown, reasons)


def _name_reason(name: str) -> str | None:
    if len(name) > _NAME_LIMIT or not name.isprintable():
        return "has a name that is too long or not to be printed"
    if name.startswith("/") or "\\" in name or name[1:2] == ":":
        return "has an absolute path, or one of another system"
    if ".." in PurePosixPath(name).parts:
        return "has a path that leads out of the archive"
    return None


def _base(members: Sequence[_Member], shown: str) -> PurePosixPath:
    """The folder of the one adapter in it."""
    found = [
        PurePosixPath(m.name).parent for m in members if PurePosixPath(m.name).name == CONFIG_NAME and not m.is_folder
    ]
    if len(found) != 1:
        raise AdapterError(shown, f"the archive has {len(found)} files {CONFIG_NAME}; an adapter's has one")
    return found[0]


def _copy(member: _Member, target: Path, shown: str) -> None:
    """Unpack one member: exactly as many bytes as its header says."""
    left = member.size
    source = member.open()
    assert source is not None, "only a link or a folder has none"
    with source, target.open("xb") as out:
        while piece := source.read(min(_PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                break
            out.write(piece)
    if left:
        raise AdapterError(shown, f"the member {member.name!r} has another size than its header says")
