"""Where an adapter starts: orders of large weights come from the cache, each computed once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smoa_serve.peft import SMoAConfig, SMoALinear, start

pytestmark = pytest.mark.matrix


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The orders that are computed, with an empty cache and a limit that tiny weights reach."""
    calls: list[str] = []
    original = start._positions

    def spy(weight: Tensor, order: str) -> tuple[Tensor, Tensor]:
        calls.append(order)
        return original(weight, order)

    monkeypatch.setattr(start, "_positions", spy)
    monkeypatch.setattr(start, "CACHED_FROM", 8)
    monkeypatch.setenv("SMOA_CACHE_DIR", str(tmp_path / "cache"))
    return calls


def block_ids(base: nn.Module, **settings: object) -> tuple[Tensor, Tensor]:
    layer = SMoALinear(base, "default", SMoAConfig(num_blocks=3, **settings), None)
    return layer.smoa_row_block["default"], layer.smoa_col_block["default"]


def test_an_order_is_computed_once_per_weight_and_kind(computed: list[str]) -> None:
    torch.manual_seed(0)
    base, other = nn.Linear(12, 10), nn.Linear(12, 10)
    first = block_ids(base)
    again = block_ids(base)
    assert computed == ["gram"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    block_ids(base, order="published")
    block_ids(other)
    assert computed == ["gram", "published", "gram"]


def test_a_transposed_weight_of_the_same_bytes_has_an_order_of_its_own(computed: list[str]) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear = nn.Linear(12, 12)
    conv = Conv1D(12, 12)
    conv.weight.data.copy_(linear.weight.data)
    rows, cols = block_ids(linear)
    conv_rows, conv_cols = block_ids(conv)
    assert computed == ["gram", "gram"]
    assert torch.equal(rows, conv_cols)
    assert torch.equal(cols, conv_rows)


def test_small_weights_leave_no_files(computed: list[str], tmp_path: Path) -> None:
    block_ids(nn.Linear(7, 9))
    assert computed == ["gram"]
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_does_not_stop_the_training(
    computed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    block_ids(nn.Linear(12, 10))
    assert computed == ["gram"]
    assert "Orders cannot be kept in" in caplog.text
