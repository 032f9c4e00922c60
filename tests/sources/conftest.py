"""Real servers that adapters are fetched from, a cache, and adapters as bytes."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tenacity import wait_fixed

from smoa_serve.sources import Cache, SourcePolicy

sys.path.append(str(Path(__file__).parent))  # test folders are no packages

from sources_web import Web, serving


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts, unless the other side asks for more."""
    monkeypatch.setattr("smoa_serve.sources.fetching._BACKOFF", wait_fixed(0.02))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def make_policy() -> Callable[..., SourcePolicy]:
    """A policy that waits for nothing long."""

    def make(*allow: str, **settings: object) -> SourcePolicy:
        return SourcePolicy(**{"allow": allow, "timeout_s": 60.0, "stall_s": 10.0, "attempts": 3, **settings})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("authority")


@pytest.fixture(scope="session")
def _web(authority: Path) -> Iterator[Web]:
    with serving("https", authority) as server:
        yield server


@pytest.fixture
def web(_web: Web, authority: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """An https server whose authority is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    monkeypatch.setenv("NETRC", str(authority / "absent"))
    for held in (_web.files, _web.faults, _web.looks, _web.asked, _web.headers):
        held.clear()
    _web.marks = True
    return _web
