"""Source URIs: their parts, and what may be shown of them."""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from ..errors import SHOWN_CHARACTERS, AdapterError, shown

REMOTE = ("hf", "s3", "gs", "az", "https", "http")
_HTTP = ("https", "http")
_PORTS = {"https": "443", "http": "80"}
_LIMIT = 4096  # characters
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HOST = re.compile(r"([a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")
_HUB_REFS = re.compile(r"@(refs/(?:pr|convert)/[^/]+)")
_URL = re.compile(r"(?P<scheme>\w+)://(?P<rest>[^\s'\"<>]*)")
_SAFE = "-._~!$&'()*+,;=:@"


def masked(text: str) -> str:
    """The text without user names, passwords and queries (which may be signed) of the URLs in it."""

    def hide(found: re.Match[str]) -> str:
        path, mark, _ = found["rest"].partition("?")
        before, at, after = path.rpartition("@")
        if at and (found["scheme"] != "hf" or ":" in before):  # hf://org/repo@revision has no secret
            path = f"***@{after}"
        return f"{found['scheme']}://{path}{mark and '?***'}"

    return _URL.sub(hide, text)


@dataclass(frozen=True)
class Place:
    """A source URI, taken apart.

    Attributes:
        shown: the URI, fit for messages, logs and tables.
        scheme: one of REMOTE.
        host: bucket, container, organisation of the hub, or host[:port]; empty in a prefix that allows all.
        segments: of the path, decoded; of the hub the repository first.
        query: of https, without the question mark.
        revision: of the hub.
    """

    shown: str
    scheme: str
    host: str
    segments: tuple[str, ...]
    query: str = ""
    revision: str | None = None

    @property
    def archive(self) -> str | None:
        """ "tar" or "zip" where the URI names an archive."""
        name, _, suffix = self.segments[-1].rpartition(".") if self.segments else ("", "", "")
        return suffix if name and suffix in ("tar", "zip") and self.scheme != "hf" else None

    def is_under(self, prefix: "Place") -> bool:
        """Whether `prefix` names this place or a folder above it."""
        return (
            self.scheme == prefix.scheme
            and prefix.host in ("", self.host)
            and self.segments[: len(prefix.segments)] == prefix.segments
            and prefix.revision in (None, self.revision)
        )

    def path(self, name: str = "") -> str:
        """`segments`, and `name` below them, joined by "/"."""
        return "/".join((*self.segments, *([name] if name else [])))

    def url(self, name: str = "") -> str:
        """The address of a file of an https source."""
        return f"{self.scheme}://{self.host}/{quote(self.path(name), safe=_SAFE + '/')}{self.query and '?'}{self.query}"


def is_uri(source: str) -> bool:
    """Whether a source has a scheme; else it is a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def parse(uri: str, *, prefix: bool = False) -> Place:
    """Take a remote URI apart.

    Args:
        uri: what a user sent.
        prefix: it is what an operator allows: host and path may be left out.

    Raises:
        AdapterError: it is none that can be read.
    """
    scheme, _, rest = uri.partition("://")
    scheme, name = scheme.lower(), masked(uri)
    reason = _reason(uri, scheme, rest)
    if reason is not None:
        raise AdapterError(name[:SHOWN_CHARACTERS], reason)
    path, _, query = rest.partition("?")
    host, _, path = path.partition("/")
    host = host.lower().removesuffix(f":{_PORTS[scheme]}") if scheme in _HTTP else host
    revision = None
    if scheme == "hf":
        path, revision = _split_revision(path)
    segments = (
        tuple(unquote(s) if scheme in _HTTP else s for s in path.rstrip("/").split("/")) if path.strip("/") else ()
    )
    place = Place(name, scheme, host, segments, query, revision)
    reason = _part_reason(place, prefix)
    if reason is not None:
        raise AdapterError(place.shown, reason)
    return place


def _reason(uri: str, scheme: str, rest: str) -> str | None:
    """Why the URI as a whole cannot be used."""
    authority = re.split(r"[/?#]", rest)[0]
    if len(uri) > _LIMIT or not uri.isprintable() or "\\" in uri:
        return f"a source has at most {_LIMIT} characters, all printable, and no backslash"
    if scheme not in REMOTE:
        return f"the scheme {shown(scheme)} is unknown; known are a path, file, {', '.join(REMOTE)}"
    if "@" in authority or (scheme in _HTTP and "@" in rest.partition("?")[0]):
        return "it holds a user name or password; leave them out: the server's environment has the credentials"
    if "#" in rest or ("?" in rest and scheme not in _HTTP):
        return "it has a query or fragment, which sources of this scheme do not have"
    return None


def _split_revision(path: str) -> tuple[str, str | None]:
    """ "repo@revision/sub" → "repo/sub", "revision"; a revision with slashes is percent-encoded, or one of refs/…"""
    found = _HUB_REFS.search(path) or re.search(r"@([^/]*)", path)
    return (path, None) if found is None else (path[: found.start()] + path[found.end() :], unquote(found[1]))


def _part_reason(place: Place, prefix: bool) -> str | None:
    """Why a part of the URI cannot be used."""
    if not (prefix and not place.host and not place.segments):
        host = _HOST.fullmatch(place.host) if place.scheme in _HTTP else _BUCKET.fullmatch(place.host)
        if host is None:
            return f"{shown(place.host)} is no name of a host, bucket or organisation"
    for segment in place.segments:
        twice = unquote(segment)
        if {segment, twice} & {"", ".", ".."} or any(c in part for part in (segment, twice) for c in "/\\"):
            return f"the part {shown(segment)} of its path is empty, leads elsewhere or hides a slash"
    if place.revision is not None and (not _REVISION.fullmatch(place.revision) or ".." in place.revision):
        return f"{shown(place.revision)} is no revision: a branch, tag or commit"
    if not prefix and not place.segments:
        return "it names no adapter: a folder, an archive or a repository has to follow"
    if prefix and place.query:
        return "a prefix has no query"
    return None
