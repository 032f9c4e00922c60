"""hf:// from a hub that HF_ENDPOINT names, asked by the real huggingface_hub client."""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sources_web import CONFIG, WEIGHTS, Fault, Web, content, cut, files_of, left_in, serving, status

from smoa_serve.errors import AdapterError, AdapterNotFoundError, PathNotAllowedError, SourceUnavailableError
from smoa_serve.sources import Cache, SourcePolicy, fetch

FILES = files_of()
LISTING = "/api/models/org/legal"
FIRST, SECOND = "a" * 40, "b" * 40
MakePolicy = Callable[..., SourcePolicy]


@pytest.fixture(scope="module")
def _hub() -> Iterator[Web]:
    with serving("http") as server:
        yield server


@pytest.fixture
def hub(_hub: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    monkeypatch.setenv("HF_ENDPOINT", _hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for held in (_hub.files, _hub.faults, _hub.looks, _hub.asked, _hub.headers):
        held.clear()
    return _hub


def publish(hub: Web, files: dict[str, bytes], commit: str = FIRST, *revisions: str) -> None:
    """A commit of org/legal, which `revisions` name: its listing, and its files, the weights as LFS has them."""
    siblings = []
    for name, data in files.items():
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        siblings.append({"rfilename": name, "size": len(data), **({"lfs": lfs} if name.endswith(WEIGHTS) else {})})
        hub.files[f"/org/legal/resolve/{commit}/{name}"] = data
    listing = json.dumps({"id": "org/legal", "sha": commit, "siblings": siblings}).encode()
    hub.files[LISTING] = listing
    for revision in revisions:
        hub.files[f"/api/models/org/legal/revision/{revision}"] = listing


def asked(hub: Web) -> list[str]:
    """Paths of all requests about repositories: each release of the client asks for more."""
    return [path for path, _ in hub.asked if "/legal" in path]


@pytest.fixture
def policy(make_policy: MakePolicy) -> SourcePolicy:
    return make_policy("hf://org")


def test_adapter_files_of_a_commit_are_fetched(hub: Web, policy: SourcePolicy, cache: Cache) -> None:
    publish(hub, {**FILES, "README.md": b"x", "adapter_model.bin": b"x", "optimizer.pt": b"x"})
    with fetch("hf://org/legal", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
        assert fetched.resolved == FIRST
        assert fetched.uri == "hf://org/legal"
    assert set(asked(hub)) == {LISTING, *(f"/org/legal/resolve/{FIRST}/{name}" for name in FILES)}
    sent = [headers for (path, _), headers in zip(hub.asked, hub.headers, strict=True) if "/legal" in path]
    assert all("authorization" in {name.lower() for name in headers} for headers in sent)
    with fetch("hf://org/legal", policy, cache) as again:
        assert not again.downloaded
    publish(hub, files_of(1), SECOND)
    with fetch("hf://org/legal", policy, cache) as changed:
        assert (changed.downloaded, changed.resolved) == (True, SECOND)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "uri", ["hf://org/legal@v1/sub/one", "hf://org/legal@refs%2Fpr%2F1/sub/one", "hf://org/legal@refs/pr/1/sub/one"]
)
def test_a_revision_and_a_subfolder_are_asked_for(uri: str, hub: Web, policy: SourcePolicy, cache: Cache) -> None:
    publish(hub, {f"sub/one/{name}": data for name, data in FILES.items()}, SECOND, "v1", "refs%2Fpr%2F1")
    del hub.files[LISTING]
    with fetch(uri, policy, cache) as fetched:
        assert content(fetched.folder) == FILES
        assert fetched.resolved == SECOND


def test_a_read_that_is_cut_goes_on_where_it_ended(hub: Web, policy: SourcePolicy, cache: Cache) -> None:
    publish(hub, FILES)
    path = f"/org/legal/resolve/{FIRST}/{WEIGHTS}"
    hub.faults[path] = [cut(100_000)]
    with fetch("hf://org/legal", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
    assert hub.reads(path) == [None, "bytes=100000-"]


def test_bytes_that_are_not_the_hubs_are_never_taken(hub: Web, policy: SourcePolicy, cache: Cache) -> None:
    publish(hub, FILES)
    hub.files[f"/org/legal/resolve/{FIRST}/{WEIGHTS}"] = files_of(9)[WEIGHTS]
    with pytest.raises(SourceUnavailableError, match="sha256"):
        fetch("hf://org/legal", policy, cache)
    assert left_in(cache) == []
    assert list((cache.root / "content").iterdir()) == []


def test_large_files_come_from_the_hubs_own_servers_without_the_token(
    hub: Web, policy: SourcePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, FILES)
    path = f"/org/legal/resolve/{FIRST}/{WEIGHTS}"
    with serving("http") as other:
        other.files["/blob"] = FILES[WEIGHTS]
        hub.faults[path] = [status(302, Location=f"{other.url}/blob")] * 3
        with pytest.raises(PathNotAllowedError, match=rf"redirects to {other.url}"):
            fetch("hf://org/legal", policy, cache)
        assert other.asked == []
        with fetch("hf://org/legal", SourcePolicy(allow=("hf://org", other.url)), cache) as fetched:  # names localhost
            assert content(fetched.folder) == FILES
        assert not any("authorization" in {name.lower() for name in headers} for headers in other.headers)


def test_a_host_that_the_hub_redirects_to_is_judged_by_its_address(
    hub: Web, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def rebound(host: str, *rest: Any, **named: Any) -> Any:
        return real("127.0.0.1" if host == "cdn.example" else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    publish(hub, FILES)
    hub.faults[f"/org/legal/resolve/{FIRST}/{WEIGHTS}"] = [status(302, Location="https://cdn.example/blob")]
    with pytest.raises(PathNotAllowedError, match=r"cdn\.example leads to an address that is not public"):
        fetch("hf://org/legal", make_policy("hf://org", "https://cdn.example"), cache)


MISSING: dict[str, tuple[list[Fault], str]] = {
    "no repository": ([status(404, X_Error_Code="RepoNotFound")], "the hub gave none"),
    "no revision": ([status(404, X_Error_Code="RevisionNotFound")], "the hub gave none"),
    "private": ([status(401)], "HF_TOKEN"),
    "gated": ([status(403, X_Error_Code="GatedRepo")], "HF_TOKEN"),
}


@pytest.mark.parametrize(("faults", "reason"), MISSING.values(), ids=MISSING.keys())
def test_a_repository_that_cannot_be_had_is_not_found(
    faults: list[Fault], reason: str, hub: Web, policy: SourcePolicy, cache: Cache
) -> None:
    hub.faults[LISTING] = faults
    with pytest.raises(AdapterNotFoundError, match=reason) as raised:
        fetch("hf://org/legal", policy, cache)
    assert "s3cret" not in str(raised.value)
    assert asked(hub) == [LISTING]


@pytest.mark.parametrize("offline", [False, True])
def test_a_name_that_is_no_repositorys_is_not_found(
    offline: bool, hub: Web, policy: SourcePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(AdapterNotFoundError, match="the hub gave none"):
        fetch("hf://org/not a repository", policy, cache)
    assert asked(hub) == []


@pytest.mark.parametrize("number", [429, 500, 503])
def test_a_hub_that_is_busy_may_not_be_later(number: int, hub: Web, policy: SourcePolicy, cache: Cache) -> None:
    publish(hub, FILES)
    hub.faults[LISTING] = [status(number)]
    with fetch("hf://org/legal", policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def test_what_is_too_large_is_not_fetched(hub: Web, make_policy: MakePolicy, cache: Cache) -> None:
    publish(hub, FILES)
    with pytest.raises(AdapterError, match="allowed are 1000"):
        fetch("hf://org/legal", make_policy("hf://", max_bytes=1000), cache)
    assert asked(hub) == [LISTING]


def held_by_the_hubs_cache(tmp_path: Path, files: dict[str, bytes]) -> None:
    """As huggingface_hub lays it down."""
    folder = tmp_path / "hub" / "models--org--legal"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(FIRST)
    (folder / "snapshots" / FIRST).mkdir(parents=True)
    (folder / "blobs").mkdir()
    for name, data in files.items():
        (folder / "blobs" / name).write_bytes(data)
        (folder / "snapshots" / FIRST / name).symlink_to(folder / "blobs" / name)


@pytest.mark.parametrize("away", ["offline", "no connection"])
def test_without_the_hub_its_own_cache_is_read(
    away: str, hub: Web, policy: SourcePolicy, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_by_the_hubs_cache(tmp_path, FILES)
    if away == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with fetch("hf://org/legal", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
        assert fetched.resolved == FIRST
    assert asked(hub) == []


def test_without_the_hub_and_its_cache_it_is_not_found_offline_and_may_be_later_else(
    hub: Web, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("hf://org", attempts=1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailableError, match="the hub does not answer"):
        fetch("hf://org/legal", policy, cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterNotFoundError, match="the hub gave none"):
        fetch("hf://org/legal", policy, cache)


def test_a_repository_without_an_adapter_is_not_found(hub: Web, policy: SourcePolicy, cache: Cache) -> None:
    publish(hub, {"model.safetensors": b"x", f"sub/{CONFIG}": b"{}"})
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        fetch("hf://org/legal", policy, cache)
