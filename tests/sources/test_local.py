"""Where an adapter named by a path or file:// may lie."""

from pathlib import Path

import pytest
from sources_web import content, files_of

from smoa_serve.errors import AdapterError, AdapterNotFoundError, PathNotAllowedError
from smoa_serve.sources import Cache, SourcePolicy, fetch

FILES = files_of(nbytes=100)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter, and a secret beside it."""
    for folder in (tmp_path / "root" / "legal", tmp_path / "secret"):
        folder.mkdir(parents=True)
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
    return tmp_path / "root"


@pytest.fixture
def policy(root: Path, tmp_path: Path) -> SourcePolicy:
    return SourcePolicy(roots=(tmp_path / "other", root))


def test_a_path_below_a_root_is_taken_absolute_relative_or_as_a_uri(
    root: Path, policy: SourcePolicy, cache: Cache
) -> None:
    (root / "a b").symlink_to(root / "legal")
    for uri in (
        "legal",
        str(root / "legal"),
        f"file://{root}/legal",
        f"FILE://localhost{root}/legal",
        f"file://{root}/a%20b",
    ):
        with fetch(uri, policy, cache) as fetched:
            assert fetched.folder == root / "legal"
            assert content(fetched.folder) == FILES
            assert (fetched.uri, fetched.digest, fetched.downloaded) == (uri, None, False)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "legal/../../secret",
        "legal/../legal",
        "/etc",
        "\0",
        "x" * 5000,
        "file:///etc",
        "file:///%2e%2e/etc",
    ],
)
def test_a_path_that_leaves_the_roots_is_refused(path: str, policy: SourcePolicy, cache: Cache) -> None:
    with pytest.raises(PathNotAllowedError, match="outside the configured folders"):
        fetch(path, policy, cache)


def test_links_are_followed_before_they_are_judged(root: Path, tmp_path: Path, cache: Cache) -> None:
    policy = SourcePolicy(roots=(root,))
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to(root / "legal")
    (root / "loop").symlink_to(root / "loop")
    assert fetch("in", policy, cache).folder == root / "legal"
    for name in ("out", "loop"):
        with pytest.raises(PathNotAllowedError):
            fetch(name, policy, cache)


def test_a_file_of_the_adapter_may_not_be_a_link_out(
    root: Path, tmp_path: Path, policy: SourcePolicy, cache: Cache
) -> None:
    (root / "legal" / "adapter_model.bin").symlink_to(tmp_path / "secret" / "adapter_config.json")
    with pytest.raises(PathNotAllowedError, match=r"adapter_model\.bin"):
        fetch("legal", policy, cache)


def test_what_is_missing_inside_a_root_is_not_found(policy: SourcePolicy, cache: Cache) -> None:
    with pytest.raises(AdapterNotFoundError, match="nothing at this path"):
        fetch("absent", policy, cache)


def test_without_roots_nothing_is_loaded_and_the_remedy_is_named(root: Path, cache: Cache) -> None:
    with pytest.raises(PathNotAllowedError, match="--adapters-root"):
        fetch(str(root / "legal"), SourcePolicy(allow=("s3://b",)), cache)


@pytest.mark.parametrize("uri", ["file://host/x", "file://legal", "file:///x?y", "file:///x#y"])
def test_a_file_uri_is_an_absolute_path(uri: str, policy: SourcePolicy, cache: Cache) -> None:
    with pytest.raises(AdapterError, match="absolute path"):
        fetch(uri, policy, cache)
