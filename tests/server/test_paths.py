"""Where an adapter named over HTTP may lie."""

from pathlib import Path

import pytest

from smoa_serve.errors import AdapterNotFoundError, PathNotAllowedError
from smoa_serve.server.paths import download
from smoa_serve.sources.local import confine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one adapter, and a secret beside it."""
    (tmp_path / "root" / "legal").mkdir(parents=True)
    (tmp_path / "root" / "legal" / "adapter_config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    return tmp_path / "root"


def test_a_path_below_a_root_is_taken_absolute_or_relative(root: Path, tmp_path: Path) -> None:
    roots = (tmp_path / "other", root)
    assert confine(str(root / "legal"), roots) == root / "legal"
    assert confine("legal", roots) == root / "legal"


@pytest.mark.parametrize("path", ["../secret", "legal/../../secret", "legal/../legal", "/etc", "\0", "x" * 5000])
def test_a_path_that_leaves_the_roots_is_refused(path: str, root: Path) -> None:
    with pytest.raises(PathNotAllowedError, match="outside the configured folders"):
        confine(path, (root,))


def test_links_are_followed_before_they_are_judged(root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to(root / "legal")
    (root / "loop").symlink_to(root / "loop")
    assert confine("in", (root,)) == root / "legal"
    for name in ("out", "loop"):
        with pytest.raises(PathNotAllowedError):
            confine(name, (root,))


def test_a_file_of_the_adapter_may_not_be_a_link_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret" / "weights").write_text("x")
    (root / "legal" / "adapter_model.safetensors").symlink_to(tmp_path / "secret" / "weights")
    with pytest.raises(PathNotAllowedError, match=r"adapter_model\.safetensors"):
        confine("legal", (root,))


def test_what_is_missing_inside_a_root_is_not_found(root: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="nothing at this path"):
        confine("absent", (root,))


def test_without_roots_nothing_is_loaded_and_the_remedy_is_named(root: Path) -> None:
    with pytest.raises(PathNotAllowedError, match="--adapters-root"):
        confine(str(root / "legal"), ())


@pytest.mark.parametrize("repository", ["no/such-adapter", "not a repository"])
def test_a_repository_that_cannot_be_had_is_not_found(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterNotFoundError, match="the hub gave none"):
        download(repository)
