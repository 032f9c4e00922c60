"""hf://org/repo[@revision][/subfolder]: a model repository of the Hugging Face hub, or of HF_ENDPOINT's.

huggingface_hub says what the revision is and holds; the bytes come by `http`, under its limits, and a file that the hub
has a sha256 of is compared with it. Where the hub does not answer, or HF_HUB_OFFLINE is set, what huggingface_hub's own
cache holds of the revision is taken.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import AdapterError, AdapterNotFoundError, SourceUnavailableError
from .http import Http
from .policy import SourcePolicy
from .source import Pieces, Seen
from .uri import Place, masked

# Where the hub's answers may lead: its own servers of large files.
_HUB_DOMAINS = ("huggingface.co", "hf.co")
_PIECE = 1 << 20


class HubSource:
    """A hub repository at one commit."""

    def __init__(self, place: Place, policy: SourcePolicy, deadline: float) -> None:
        from huggingface_hub import constants

        self._place, self._policy = place, policy
        self._repository, self._folder = f"{place.host}/{place.segments[0]}", "/".join(place.segments[1:])
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        endpoint = urlsplit(self._endpoint)
        self._origin = (endpoint.scheme, endpoint.netloc)
        self._http = Http(place, policy, deadline, self._judge, operators_host=endpoint.hostname)

    def _judge(self, scheme: str, host: str) -> None:
        own = scheme == "https" and any(host == name or host.endswith(f".{name}") for name in _HUB_DOMAINS)
        if not own and (scheme, host) != self._origin:
            self._policy.check_origin(scheme, host, self._place.shown)

    @cached_property
    def _held(self) -> "dict[str, Any] | Path":
        """The repository's files by name, or the folder of them in huggingface_hub's cache."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if constants.HF_HUB_OFFLINE:
            local = self._local()
            if local is None:
                raise self._absent("HF_HUB_OFFLINE is set, and the hub's own cache does not hold it")
            return local
        revision, timeout_s = self._place.revision, self._policy.stall_s
        try:
            info = HfApi(endpoint=self._endpoint).model_info(
                self._repository, revision=revision, timeout=timeout_s, files_metadata=True
            )
        except HFValidationError as error:
            raise self._absent(str(error)) from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status == 429 or status >= 500:
                raise SourceUnavailableError(self._place.shown, f"the hub answers {status}") from error
            # The hub says 401 of what is private and of what is not there.
            raise self._absent(str(error)) from None
        except Exception as error:  # no connection: each release of the hub's client has its own class for it
            local = self._local()
            if local is not None:
                return local
            reason = masked(str(error)) or type(error).__name__
            raise SourceUnavailableError(self._place.shown, f"the hub does not answer: {reason}") from error
        if info.sha is None:
            raise AdapterError(self._place.shown, "the hub does not say which commit this is")
        self._commit = info.sha
        return {sibling.rfilename: sibling for sibling in info.siblings or ()}

    def _absent(self, said: str) -> AdapterNotFoundError:
        reason = masked(said.strip().partition("\n")[0])
        return AdapterNotFoundError(
            self._place.shown, f"the hub gave none: {reason}; a private one needs HF_TOKEN in the server's environment"
        )

    def _local(self) -> Path | None:
        from huggingface_hub import snapshot_download

        patterns = [self._path(name) for name in self._policy.names]
        try:
            found = snapshot_download(
                self._repository, revision=self._place.revision, allow_patterns=patterns, local_files_only=True
            )
        except (OSError, ValueError):  # not held, or no name of a repository
            return None
        self._commit = Path(found).name
        return Path(found)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def look(self, name: str) -> Seen | None:
        """What is known about a file; None when there is none of that name."""
        held = self._held
        if isinstance(held, Path):
            file = held / self._path(name)
            return Seen(file.stat().st_size, self._commit) if file.is_file() else None
        found = held.get(self._path(name))
        return None if found is None else Seen(found.size, self._commit, found.lfs.sha256 if found.lfs else None)

    def read(self, name: str, seen: Seen, start: int) -> Pieces:
        """The bytes of a file from `start` on, each piece with its offset."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if isinstance(self._held, Path):
            yield from _pieces(self._held / self._path(name), start)
            return
        url = hf_hub_url(self._repository, self._path(name), revision=self._commit, endpoint=self._endpoint)
        # A commit does not change, and its servers of large files have marks of their own.
        yield from self._http.read(url, build_hf_headers(), Seen(seen.size, None), start)

    def revision(self) -> str | None:
        """The commit that all files belong to; None where there is none."""
        _ = self._held
        return self._commit

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()


def _pieces(file: Path, start: int) -> Pieces:
    with file.open("rb") as handle:
        handle.seek(start)
        while piece := handle.read(_PIECE):
            yield start, piece
            start += len(piece)
