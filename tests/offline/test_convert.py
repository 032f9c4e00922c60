"""Conversion between formats."""

from pathlib import Path

import pytest
import torch

from smoa_serve.adapters import LoadOptions, load_adapter
from smoa_serve.adapters.model import AdapterKind
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError, ConfigError
from smoa_serve.offline.convert import TargetFormat, convert

PICKLE = LoadOptions(allow_pickle=True)


@pytest.fixture
def base(vectors: Path) -> BaseCheckpoint:
    return BaseCheckpoint.open(vectors / "e2e/tiny-qwen2/base")


@pytest.fixture
def published(vectors: Path) -> Path:
    return vectors / "e2e/tiny-qwen2/adapters/branch_2_0_3_k3"


def test_published_to_portable_to_hira_changes_no_update(base: BaseCheckpoint, published: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    made = convert(
        published, tmp_path / "p", TargetFormat.PORTABLE, base, PICKLE, progress=lambda *call: seen.append(call)
    )
    assert [call[1:] for call in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    portable = load_adapter(tmp_path / "p", None)
    assert portable.digest == made.digest
    convert(tmp_path / "p", tmp_path / "h", TargetFormat.HIRA, None)
    hira = load_adapter(tmp_path / "h", base)
    assert hira.kind is AdapterKind.HIRA
    for name, update in portable.modules.items():
        weight = base.weight(name)
        torch.testing.assert_close(hira.modules[name].dense(weight), update.dense(weight), rtol=1e-6, atol=1e-8)


def test_a_converted_hira_adapter_knows_its_base(base: BaseCheckpoint, published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "h", TargetFormat.HIRA, base, PICKLE)
    convert(tmp_path / "h", tmp_path / "p", TargetFormat.PORTABLE, base)
    found = load_adapter(tmp_path / "p", base)
    assert found.kind is AdapterKind.HIRA
    assert {name: update.base for name, update in found.modules.items()} == {
        name: base.fingerprint(name) for name in found.modules
    }


def test_a_folder_in_use_is_never_overwritten(base: BaseCheckpoint, published: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not an empty folder"):
        convert(published, tmp_path, TargetFormat.PORTABLE, base, PICKLE)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_conversion_leaves_nothing(base: BaseCheckpoint, published: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        convert(published, tmp_path / "out", TargetFormat.PORTABLE, base)
    assert list(tmp_path.iterdir()) == []


def test_the_result_can_be_read_by_others(base: BaseCheckpoint, published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "p", TargetFormat.PORTABLE, base, PICKLE)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "p").iterdir()} == {"0o644"}
