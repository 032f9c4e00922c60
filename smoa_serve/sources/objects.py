"""s3://, gs:// and az:// by fsspec. Endpoint and credentials are those of the environment, as s3fs, gcsfs and adlfs
read them (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST, AZURE_STORAGE_CONNECTION_STRING, and others): no part of the URI."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from ..errors import AdapterError, ConfigError, SourceUnavailableError
from .policy import SourcePolicy
from .source import Pieces, Seen
from .uri import Place, masked

_PIECE = 16 << 20
_CLASSES = {
    "s3": ("s3fs", "S3FileSystem"),
    "gs": ("gcsfs", "GCSFileSystem"),
    "az": ("adlfs", "AzureBlobFileSystem"),
}
_MARKS = ("ETag", "etag", "generation", "LastModified", "last_modified")
_CREDENTIALS = ("credential", "authentic", "forbidden", "access denied", "accessdenied", "unauthorized")


def file_system(scheme: str) -> Any:
    """fsspec's class for a scheme, made from the environment.

    Raises:
        ConfigError: its extra is not installed.
    """
    module, name = _CLASSES[scheme]
    try:
        made = getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// cannot be read: {error}; install the extra, as in pip install 'smoa-serve[{scheme}]'"
        ) from error
    return made(use_listings_cache=False)


class ObjectSource:
    """A folder or archive in a bucket."""

    def __init__(self, place: Place, policy: SourcePolicy, deadline: float) -> None:
        self._place, self._policy = place, policy
        self._files = self._asked(partial(file_system, place.scheme))

    def look(self, name: str) -> Seen | None:
        """What is known about a file; None when there is none of that name."""
        try:
            info = self._asked(partial(self._wait, self._files._info, self._path(name)))
        except FileNotFoundError:
            return None
        if info.get("type") != "file":
            return None
        return Seen(info.get("size"), next((str(info[mark]) for mark in _MARKS if info.get(mark)), None))

    def read(self, name: str, seen: Seen, start: int) -> Pieces:
        """The bytes of a file from `start` on, each piece with its offset."""
        if seen.size is None:
            raise AdapterError(self._place.shown, f"the store does not say how large {name or 'it'} is")
        while start < seen.size:
            end = min(start + _PIECE, seen.size)
            reading = partial(self._wait, self._files._cat_file, self._path(name), start=start, end=end)
            try:
                piece: bytes = self._asked(reading)
            except FileNotFoundError:
                piece = b""
            if len(piece) != end - start:
                raise SourceUnavailableError(self._place.shown, "it changed while it was fetched")
            yield start, piece
            start = end

    def revision(self) -> str | None:
        """The commit that all files belong to; None where there is none."""
        return None

    def close(self) -> None:
        """The connections are shared by all sources of a scheme."""

    def _path(self, name: str) -> str:
        return f"{self._place.host}/{self._place.path(name)}"

    def _wait(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self._files.loop, method, *arguments, timeout=self._policy.stall_s, **named)

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What a call gives. FileNotFoundError passes; each library has its own classes for the rest."""
        try:
            return call()
        except (FileNotFoundError, ConfigError):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {masked(str(error).strip()).partition(chr(10))[0]}"
            if isinstance(error, PermissionError) or any(word in text.lower() for word in _CREDENTIALS):
                reason = f"access was refused ({text}); see to the credentials in this server's environment"
                raise AdapterError(self._place.shown, reason) from error
            if isinstance(error, ValueError | TypeError):
                raise AdapterError(self._place.shown, f"it cannot be asked for: {text}") from error
            raise SourceUnavailableError(self._place.shown, f"the store failed: {text}") from error
