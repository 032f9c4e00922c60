"""Numbers that are finite as stored and not as served."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from smoa_serve.adapters import load_adapter, open_adapter, write_portable
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.adapters.overflow import overflow_reasons
from smoa_serve.adapters.rounding import Lost, too_much_lost
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.cli.app import app
from smoa_serve.errors import AdapterError, MergeLossError
from smoa_serve.offline.checkpoint import merge

MakeBase = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


def update(a: float, b: float, scaling: float = 1.0, dtype: torch.dtype = torch.float32) -> ModuleUpdate:
    """One layer of 4 x 3 with two blocks; A and B hold one number each, at a place that both blocks share."""
    row_block, col_block = (torch.tensor([0, 0, 1, 1][:n], dtype=torch.int16) for n in (4, 3))
    factor_a, factor_b = torch.zeros(1, 3, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
    factor_a[0, 0], factor_b[0, 0] = a, b
    return ModuleUpdate(factor_a, factor_b, row_block, col_block, (1, 1), scaling)


@pytest.mark.parametrize(
    ("numbers", "dtype", "what"),
    [
        (update(7e4, 1.0), torch.float16, "A holds 7e+04"),
        (update(1.0, -7e4), torch.float16, "B holds 7e+04"),
        (update(1.0, 4e4, 2.0), torch.float16, "times the scale 2"),
        (update(1.0, 3.4e38), torch.bfloat16, "not finite in bfloat16"),
        (update(1e-30, 1.0, 1e300), torch.float32, "times the scale 1e+300"),
        (update(1e200, 0.0, dtype=torch.float64), torch.float32, "A holds 1e+200"),
        (update(1e30, 1e30), torch.float32, "the product B A"),
    ],
)
def test_what_overflows_where_it_is_served_is_named(numbers: ModuleUpdate, dtype: torch.dtype, what: str) -> None:
    (reason,) = overflow_reasons({Q: numbers}, dtype)
    assert what in reason
    assert Q in reason


def test_what_stays_finite_passes() -> None:
    assert overflow_reasons({Q: update(6.5e4, 6.5e4)}, torch.float16) == []
    assert overflow_reasons({Q: update(1e200, 1e-300, 1e90, torch.float64)}, torch.float32) != []
    assert overflow_reasons({Q: update(0.0, 0.0, 1e30)}, torch.float16) == []
    apart = update(0.0, 1e30)
    apart.a[0, 2] = 1e30  # in another block: no product is formed
    assert overflow_reasons({Q: apart}) == []


def hira(folder: Path, a: torch.Tensor, b: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{Q}.hira_A": a, f"base_model.model.{Q}.hira_B": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 1, "target_modules": ["q_proj"]}))
    return folder


def portable(folder: Path, numbers: ModuleUpdate) -> Path:
    adapter = Adapter(AdapterKind.SMOA, {Q: numbers}, 2, 2, 2.0, OrderStatus.RECORDED)
    return write_portable(adapter, folder)


def test_float64_factors_beyond_float32_are_refused(tmp_path: Path) -> None:
    path = hira(tmp_path / "hira", torch.full((1, 3), 1e200, dtype=torch.float64), torch.ones(4, 1).double())
    with pytest.raises(AdapterError, match="3 of 3 numbers are too large for float32"):
        load_adapter(path, None)


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"times the scale 5e\+299 it is not finite in float32"):
        load_adapter(portable(tmp_path / "scaled", update(1.0, 1.0, 5e299)), None)


def test_verify_looks_at_the_dtype_that_is_served(tmp_path: Path, make_base: MakeBase) -> None:
    base = BaseCheckpoint.open(make_base({f"{Q}.weight": torch.randn(4, 3)}, dtype="float16"))
    path = portable(tmp_path / "wide", update(1.0, 7e4))
    with pytest.raises(AdapterError, match="not finite in float16"):
        open_adapter(path).check(base)
    assert open_adapter(path).check(base, "bfloat16").layers == 1
    command = ["verify", str(path), "--base", str(base.path)]
    assert CliRunner().invoke(app, [*command, "--dtype", "float32"]).exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("allowed", [0.25, 1e9, None])
def test_a_loss_that_is_no_number_refuses(loss: float, allowed: float | None) -> None:
    (reason,) = too_much_lost({"a": 0.1, "b": loss}, allowed, "do so")
    assert reason == "the merged weights of 1 of 2 layers would not be finite (NaN or Inf): b; do so"


def test_the_loss_of_a_weight_that_is_not_finite_is_no_number() -> None:
    for kept in (math.inf, math.nan):
        lost = Lost()
        lost.add(torch.ones(2), torch.tensor([1.0, kept]))
        assert not math.isfinite(lost.share)


def test_a_merge_that_overflows_writes_nothing(make_base: MakeBase, tmp_path: Path) -> None:
    base = BaseCheckpoint.open(make_base({f"{Q}.weight": torch.full((4, 3), 100.0)}))
    deltas = load_adapter(portable(tmp_path / "big", update(1.0, 1e4)), base).modules
    assert merge(base, {Q: deltas[Q].dense}, tmp_path / "wide").lost == {Q: 0.0}
    with pytest.raises(MergeLossError, match="would not be finite"):
        merge(base, {Q: deltas[Q].dense}, tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
