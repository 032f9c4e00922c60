"""The portable format: exact round trips, and every reason for which a file is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter, write_portable
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.fingerprint import WeightFingerprint
from smoa_serve.errors import AdapterError

Q = "model.layers.0.self_attn.q_proj"
MARK = WeightFingerprint((6, 5), "bfloat16", "ab" * 32)


def _adapter(num_blocks: int = 2, kind: AdapterKind = AdapterKind.SMOA, **module: Any) -> Adapter:
    generator = torch.Generator().manual_seed(num_blocks)
    ranks = (2, 1, *[0] * (num_blocks - 2))[:num_blocks]
    rows = torch.arange(6).remainder(num_blocks).to(torch.int16)
    cols = torch.arange(5).remainder(num_blocks).to(torch.int16)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator)
    limit = torch.tensor(ranks)
    a[torch.arange(2)[:, None] >= limit[cols.long()]] = 0
    b[torch.arange(2) >= limit[rows.long()][:, None]] = 0
    update = ModuleUpdate(a, b, rows, cols, ranks, 1 / 3, MARK, 0.25)
    fields = {name: module.get(name, getattr(update, name)) for name in update.__dataclass_fields__}
    return Adapter(
        kind=kind,
        modules={Q: ModuleUpdate(**fields)},
        rank=sum(ranks),
        num_blocks=num_blocks,
        alpha=1.0,
        order=OrderStatus.RECORDED,
        base_model="tiny",
        metadata={"seed": 3, "note": "two"},
    )


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, num_blocks: int, dtype: torch.dtype) -> None:
    made = _adapter(num_blocks)
    update = made.modules[Q]
    made = _adapter(num_blocks, a=update.a.to(dtype), b=update.b.to(dtype))
    found = load_adapter(write_portable(made, tmp_path), None)
    assert found.digest == made.digest
    for name in ("kind", "rank", "num_blocks", "alpha", "order", "base_model", "metadata", "order_error", "nbytes"):
        assert getattr(found, name) == getattr(made, name), name
    assert found.modules[Q].base == MARK
    assert found.modules[Q].scaling == 1 / 3
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored[f"{Q}.smoa_row_block"].dtype == (torch.uint8 if num_blocks <= 256 else torch.uint16)


def test_published_adapters_round_trip_exactly(vectors: Path, vector_index: dict[str, Any], tmp_path: Path) -> None:
    for model in vector_index["e2e"]:
        base = BaseCheckpoint.open(vectors / model["base"])
        for entry in model["adapters"]:
            made = load_adapter(vectors / entry["safetensors_dir"], base)
            folder = write_portable(made, tmp_path / entry["name"])
            assert load_adapter(folder, base).digest == load_adapter(folder, None).digest == made.digest


def test_hira_keeps_its_kind_under_a_type_that_peft_does_not_know(tmp_path: Path) -> None:
    folder = write_portable(_adapter(1, AdapterKind.HIRA), tmp_path)
    assert open_adapter(folder).kind is AdapterKind.HIRA
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "SMOA"


def test_no_lora_loader_takes_the_file(tmp_path: Path) -> None:
    folder = write_portable(_adapter(), tmp_path)
    assert not [name for name in load_file(folder / "adapter_model.safetensors") if "lora" in name]
    for loader in ("PeftConfig", "LoraConfig"):
        # A process of its own: in this one the training side may have taught PEFT about SMoA.
        code = f"import peft; peft.{loader}.from_pretrained({str(folder)!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert run.returncode != 0
        assert run.stderr.strip().splitlines()[-1].startswith(("KeyError", "TypeError", "ValueError")), run.stderr


def _spoil(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> list[str]:
    write_portable(_adapter(), folder)
    file = folder / "adapter_model.safetensors"
    state = load_file(file) | (tensors or {})
    save_file({name: t for name, t in state.items() if t is not None}, file)
    settings = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, None)
    return caught.value.reasons


def test_missing_and_extra_tensors_are_told_at_once(tmp_path: Path) -> None:
    assert _spoil(tmp_path, {f"{Q}.smoa_a": None, "x.lora_A.weight": torch.zeros(1)}) == [
        f"{Q}.smoa_a is missing",
        "x.lora_A.weight is no tensor of this adapter",
    ]


def test_shapes_dtypes_and_numbers_are_checked_at_once(tmp_path: Path) -> None:
    a = torch.zeros(2, 5)
    a[0, 0] = torch.nan
    blocks = torch.tensor([0, 1, 0, 1, 2, 0], dtype=torch.uint8)
    changes: dict[str, torch.Tensor | None] = {
        f"{Q}.smoa_a": a,
        f"{Q}.smoa_b": torch.zeros(6, 3),
        f"{Q}.smoa_row_block": blocks,
        f"{Q}.smoa_col_block": torch.zeros(5, dtype=torch.int64),
    }
    assert _spoil(tmp_path, changes) == [
        f"{Q}.smoa_a: 1 of 10 numbers are not finite (NaN or Inf)",
        f"{Q}.smoa_b has shape [6, 3], expected [6, 2]",
        f"{Q}.smoa_row_block names a block beyond the 2 there are",
        f"{Q}.smoa_col_block must be uint8 or uint16 of shape [5]",
    ]


def test_numbers_beyond_the_rank_of_their_block_are_refused(tmp_path: Path) -> None:
    assert _spoil(tmp_path, {f"{Q}.smoa_a": torch.ones(2, 5)}) == [f"{Q}: numbers beyond the rank of their block"]


def test_changed_contents_are_noticed(tmp_path: Path) -> None:
    assert "it was changed or damaged" in _spoil(tmp_path, {f"{Q}.smoa_a": torch.zeros(2, 5)})[0]


def test_unknown_keys_versions_and_kinds_are_refused(tmp_path: Path) -> None:
    reasons = " ".join(_spoil(tmp_path, format_version=2, temperature=1, kind="lora", order="guessed"))
    for part in ("format_version", "'temperature' (1) is not known", "SMoA and HiRA adapters only", "order: "):
        assert part in reasons


def test_an_adapter_without_modules_is_refused(tmp_path: Path) -> None:
    assert "it has no factors at all, nothing would be bound" in _spoil(tmp_path, modules={})


def test_strict_order_holds_for_a_recorded_error_too(tmp_path: Path) -> None:
    folder = write_portable(_adapter(), tmp_path)
    with pytest.raises(AdapterError, match=r"expected error of the update 0\.250"):
        load_adapter(folder, None, LoadOptions(strict_order=True))
