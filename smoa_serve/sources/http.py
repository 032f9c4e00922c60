"""Files by HTTP from hosts that are not trusted.

A name is resolved once: every address is judged, and one of these is connected to, so a name that means something else
a moment later leads nowhere. Redirects are followed by hand, each judged before. A deadline bounds every single read,
header lines and TLS included. Proxies of the environment are used for the hub only: behind one, addresses could not be
judged. Plain fsspec does none of this, and holds in memory whatever a server sends.
"""

import email.utils
import netrc
import os
import re
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from ..errors import AdapterError, SourceUnavailableError
from .policy import SourcePolicy
from .source import Pieces, Seen
from .uri import Place, masked

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_LATER = (408, 409, 423, 425, 429, 500, 502, 503, 504)
_CONNECT_S = 10.0

Judge = Callable[[str, str], None]  # of a redirect: scheme and host[:port]; raises PathNotAllowedError


class _Stream(httpcore.NetworkStream):
    """A connection on which nothing lasts longer than the deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def _left(self, timeout: float | None) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the time for the whole fetch is over")
        return left if timeout is None else min(left, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._left(timeout)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    """Connects to the addresses that were judged."""

    def __init__(self, policy: SourcePolicy, deadline: float, shown: str, trusted: Container[str | None]) -> None:
        self._policy, self._deadline, self._shown, self._trusted = policy, deadline, shown, trusted

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if host not in self._trusted:
            self._policy.check_addresses(host, addresses, self._shown)
        for number, address in enumerate(addresses, 1):
            try:
                stream = super().connect_tcp(address, port, timeout, local_address, socket_options)
                return _Stream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise httpcore.ConnectError(f"{host} has no address")


class Http:
    """GET requests of one fetch.

    Args:
        place: for messages.
        policy: its limits; its allowed addresses too, unless the operator's environment names the host.
        deadline: of `time.monotonic()`.
        judge: of redirects.
        operators_host: the environment names it (HF_ENDPOINT): any address, and by the environment's proxy.
    """

    def __init__(
        self, place: Place, policy: SourcePolicy, deadline: float, judge: Judge, *, operators_host: str | None = None
    ) -> None:
        self._shown, self._judge = place.shown, judge
        self._timeouts = {"connect": _CONNECT_S, "read": policy.stall_s, "write": policy.stall_s}
        said = getproxies().get("https") if operators_host and not proxy_bypass(operators_host) else None
        proxy = httpcore.Proxy(said) if said else None
        trusted = {operators_host, proxy.url.host.decode() if proxy else None}
        self._pool = httpcore.ConnectionPool(
            ssl_context=_trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
            network_backend=_Backend(policy, deadline, place.shown, trusted),
            proxy=proxy,
            max_connections=2 * policy.parallel,
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str], Iterable[bytes]]]:
        """Status, headers (lower case) and body of the answer after redirects, not of a refusal.

        Raises:
            PathNotAllowedError, AdapterError, SourceUnavailableError: see `Source`.
        """
        with self._told():
            for _ in range(_MOST_REDIRECTS + 1):
                sent = {"Host": urlsplit(url).netloc, "Accept-Encoding": "identity", **headers}
                with self._pool.stream(
                    "GET", url, headers=list(sent.items()), extensions={"timeout": self._timeouts}
                ) as response:
                    got = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                    if response.status not in _REDIRECTS:
                        self._check(response.status, got)
                        yield response.status, got, response.iter_stream()
                        return
                    url, headers = self._next(url, got.get("location", ""), headers)
            raise AdapterError(self._shown, f"it redirects more than {_MOST_REDIRECTS} times")

    def _next(self, url: str, location: str, headers: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
        """Where a redirect leads, if it may; without credentials where that is another host."""
        there, here = urljoin(url, location) if location else "", urlsplit(url)
        parts = urlsplit(there)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if "@" in parts.netloc or not parts.hostname or not there.isascii() or port == 0:
            raise AdapterError(self._shown, f"it redirects to {masked(there)!r}, which is no address of a file")
        if (parts.scheme, parts.netloc) == (here.scheme, here.netloc):
            return there, headers
        standard = {"https": 443, "http": 80}.get(parts.scheme)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._judge(parts.scheme, host if port in (None, standard) else f"{host}:{port}")
        return there, {name: value for name, value in headers.items() if name.lower() != "authorization"}

    def _check(self, status: int, headers: Mapping[str, str]) -> None:
        if status in _LATER:
            raise SourceUnavailableError(
                self._shown, f"the server answers {status}", retry_after_s=_retry_after(headers.get("retry-after"))
            )
        if status in (401, 403):
            raise AdapterError(
                self._shown, f"the server answers {status}: the credentials in this server's environment do not suffice"
            )
        if status not in (200, 206, 404, 410, 416):
            raise AdapterError(self._shown, f"the server answers {status}, which no file does")
        if headers.get("content-encoding", "identity") != "identity":
            raise AdapterError(self._shown, "the server packs its answer, although it was asked not to")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the network does into errors for users."""
        try:
            yield
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, socket.gaierror) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise AdapterError(
                    self._shown,
                    f"the server's certificate is not trusted: {cause.verify_message}; name its authority's file by "
                    "SSL_CERT_FILE",
                ) from error
            reason = masked(str(error)) or type(error).__name__
            raise SourceUnavailableError(self._shown, f"the connection failed: {reason}") from error
        except (httpcore.UnsupportedProtocol, httpcore.ProxyError, UnicodeError) as error:
            raise AdapterError(self._shown, f"no connection can be made: {masked(str(error))}") from error

    def look(self, url: str, headers: Mapping[str, str]) -> Seen | None:
        """Size and mark of a file, by asking for its first byte: addresses signed for GET refuse HEAD."""
        with self.get(url, {**headers, "Range": "bytes=0-0"}) as (status, got, _):
            if status in (404, 410):
                return None
            return Seen(_total(status, got), _mark(got))

    def read(self, url: str, headers: Mapping[str, str], seen: Seen, start: int) -> Pieces:
        """See `Source.read`; a mark that is sent is compared where `seen` has one."""
        asked = {"Range": f"bytes={start}-"} if start else {}
        with self.get(url, {**headers, **asked}) as (status, got, body):
            other = seen.mark not in (None, _mark(got)) or _total(status, got) not in (None, seen.size)
            if status not in (200, 206) or other:
                raise SourceUnavailableError(self._shown, "it changed while it was fetched")
            if status == 206:
                begin = re.match(r"bytes (\d+)-", got.get("content-range", ""))
                if begin is None or int(begin[1]) != start:
                    raise AdapterError(self._shown, "the server sends another part of the file than it was asked for")
            elif "content-length" not in got and "transfer-encoding" not in got:
                raise AdapterError(self._shown, "the server does not say where the file ends")
            offset = start if status == 206 else 0
            for piece in body:
                yield offset, piece
                offset += len(piece)


class HttpSource:
    """An https:// source."""

    def __init__(self, place: Place, policy: SourcePolicy, deadline: float) -> None:
        self._place = place
        self._http = Http(place, policy, deadline, lambda scheme, host: policy.check_origin(scheme, host, place.shown))

    def look(self, name: str) -> Seen | None:
        """What is known about a file; None when there is none of that name."""
        return self._http.look(self._place.url(name), self._headers())

    def read(self, name: str, seen: Seen, start: int) -> Pieces:
        """The bytes of a file from `start` on, each piece with its offset."""
        return self._http.read(self._place.url(name), self._headers(), seen, start)

    def revision(self) -> str | None:
        """The commit that all files belong to; None where there is none."""
        return None

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()

    def _headers(self) -> dict[str, str]:
        """The user's netrc, as curl -n reads it."""
        with suppress(OSError, netrc.NetrcParseError):
            entries = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
            found = entries.authenticators(urlsplit(self._place.url()).hostname or "")
            if found is not None:
                return {"Authorization": "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()}
        return {}


@lru_cache(maxsize=8)
def _trust(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Authorities of the environment, else certifi's; reading them takes longer than a small file."""
    return httpx.create_ssl_context()


def _mark(headers: Mapping[str, str]) -> str | None:
    """What changes with the content: a strong ETag, else any, else the time of the last change."""
    return headers.get("etag") or headers.get("last-modified")


def _total(status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of the whole file, where the answer says."""
    said = headers.get("content-length") if status == 200 else headers.get("content-range", "").rpartition("/")[2]
    return int(said) if said and said.isdecimal() else None


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date."""
    if text is None:
        return None
    with suppress(ValueError, OverflowError):
        return max(0.0, float(text))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None
