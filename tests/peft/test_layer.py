"""One layer against the recorded numbers of the published layer; merging, several adapters, Conv1D."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from smoa_serve.peft import SMoALinear

pytestmark = pytest.mark.matrix


def _base(tensors: dict[str, Tensor], transposed: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight = tensors["W"]
    bias = tensors.get("bias")
    if transposed:
        layer: nn.Module = Conv1D(weight.shape[1], weight.shape[0])
        bias = torch.zeros(weight.shape[1], dtype=weight.dtype) if bias is None else bias
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _layer(case: dict[str, Any], tensors: dict[str, Tensor]) -> "SMoALinear":
    """Our layer on the recorded weight, with the recorded order and factors."""
    from smoa_serve.adapters.canonical import canonical_update
    from smoa_serve.adapters.config import ModuleEntry
    from smoa_serve.peft import SMoAConfig, SMoALinear
    from smoa_serve.peft.start import id_dtype

    ranks = case["branch_ranks"]
    factors = {
        (side, k): tensors[f"lora_{side}.{k}.weight"]
        for side in "AB"
        for k in range(case["num_blocks"])
        if f"lora_{side}.{k}.weight" in tensors
    }
    update = canonical_update(factors, tensors["row_order"], tensors["col_order"], ranks, case["scaling"])
    config = SMoAConfig(r=sum(ranks), num_blocks=len(ranks), branch_ranks=ranks, lora_dropout=0.0)
    entry = ModuleEntry(branch_ranks=ranks, scaling=case["scaling"])
    layer = SMoALinear(_base(tensors, case["fan_in_fan_out"]), "default", config, entry)
    ids = id_dtype(len(ranks))
    state = {
        "smoa_a.default": update.a,
        "smoa_b.default": update.b,
        "smoa_row_block.default": update.row_block.to(ids),
        "smoa_col_block.default": update.col_block.to(ids),
    }
    layer.smoa_a["default"].data = layer.smoa_a["default"].data.to(update.a.dtype)
    layer.smoa_b["default"].data = layer.smoa_b["default"].data.to(update.b.dtype)
    assert not layer.load_state_dict(state, strict=False).unexpected_keys
    return layer


def _close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.detach().double(), expected.double(), rtol=0, atol=atol)


def test_recorded_layers_are_reproduced(vectors: Path, vector_index: dict[str, Any]) -> None:
    for case in vector_index["layers"]:
        tensors = load_file(vectors / case["file"])
        layer, atol = _layer(case, tensors), case["suggested_atol"]
        _close(layer(tensors["x"]), tensors["y"], atol["y"])
        _close(layer.get_delta_weight("default"), tensors["delta"], atol["delta"])
        if "y_autocast" in tensors:
            with torch.autocast("cpu", torch.bfloat16):
                _close(layer(tensors["x"].float()), tensors["y_autocast"], 2 * atol["y"])
        layer.merge(safe_merge=True)
        merged = layer.get_base_layer().weight
        _close(merged, tensors["W_merged"], atol["delta"] + _ulp(tensors["W_merged"]))
        _close(layer(tensors["x"]), tensors["y_merged"], atol["y"] + 8 * _ulp(tensors["y_merged"]))
        layer.enable_adapters(False)
        assert torch.equal(layer(tensors["x"]), layer.base_layer(tensors["x"])), case["name"]
        assert torch.equal(layer.get_base_layer().weight, tensors["W"]), case["name"]
        _close(layer(tensors["x"]), tensors["y_base"], atol["y"])


def _ulp(numbers: Tensor) -> float:
    """One rounding of the largest number."""
    return float(torch.finfo(numbers.dtype).eps * numbers.abs().max()) if numbers.numel() else 0.0


@pytest.mark.parametrize("order", ["gram", "published"])
def test_own_order_is_the_recorded_one_where_it_is_well_determined(
    vectors: Path, vector_index: dict[str, Any], order: str
) -> None:
    from smoa_serve.peft.start import spectral_pieces

    checked = 0
    for case in vector_index["layers"]:
        if case["order_well_determined"]:
            tensors = load_file(vectors / case["file"])
            weight = tensors["W"].t() if case["fan_in_fan_out"] else tensors["W"]
            rows, cols = spectral_pieces(weight, case["num_blocks"], order)
            for k in range(case["num_blocks"]):
                assert torch.equal(rows[k], tensors[f"rows.{k}"]), case["name"]
                assert torch.equal(cols[k], tensors[f"cols.{k}"]), case["name"]
            checked += 1
    assert checked > 15


def test_a_new_adapter_changes_nothing_and_is_drawn_like_the_published_one() -> None:
    from smoa_serve.peft import SMoAConfig, SMoALinear

    torch.manual_seed(0)
    layer = SMoALinear(nn.Linear(24, 18), "default", SMoAConfig(r=5, num_blocks=2, lora_dropout=0.5), None)
    x = torch.randn(4, 24)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.entries["default"].branch_ranks == [3, 2]
    assert layer.entries["default"].scaling == 8 / 5
    assert not layer.smoa_b["default"].any()
    assert 0 < float(layer.smoa_a["default"].detach().abs().max()) <= 12**-0.5
    assert layer.smoa_a["default"].dtype == torch.float32


def _two_adapters(dtype: torch.dtype = torch.float32) -> "SMoALinear":
    from smoa_serve.peft import SMoAConfig, SMoALinear

    torch.manual_seed(1)
    base = nn.Linear(30, 20).to(dtype)
    layer = SMoALinear(base, "one", SMoAConfig(r=4, num_blocks=2, lora_dropout=0, init_lora_weights=False), None)
    config = SMoAConfig(r=6, num_blocks=3, lora_dropout=0, branch_ranks=[6, 0, 0], init_lora_weights=False)
    layer.update_layer("two", config, None)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_exact_with_overlapping_adapters(dtype: torch.dtype) -> None:
    layer = _two_adapters(dtype)
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.set_adapter(["one", "two"])
    x = torch.randn(5, 30, dtype=dtype)
    expected = layer(x)
    layer.merge()
    assert not torch.equal(weight, before)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert torch.equal(layer.pristine, before)
    layer.unmerge()
    assert torch.equal(weight, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_an_adapter_added_while_another_is_merged_sees_the_pristine_weight() -> None:
    from smoa_serve.peft import SMoAConfig

    layer = _two_adapters()
    layer.set_adapter("one")
    torch.manual_seed(5)
    layer.update_layer("before", SMoAConfig(num_blocks=3), None)
    layer.merge()
    torch.manual_seed(5)
    layer.update_layer("after", SMoAConfig(num_blocks=3), None)
    assert torch.equal(layer.smoa_row_block["before"], layer.smoa_row_block["after"])
    assert torch.equal(layer.smoa_a["before"], layer.smoa_a["after"])
    assert layer.entries["before"] == layer.entries["after"]


def test_an_unsafe_merge_leaves_the_weight_alone() -> None:
    layer = _two_adapters()
    layer.set_adapter("one")
    layer.smoa_b["one"].data.fill_(float("inf"))
    before = layer.get_base_layer().weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


@pytest.mark.parametrize(
    ("num_blocks", "ranks"), [(4, [4, 4, 0, 0]), (2, [4, 3]), (1, [4])], ids=["more-blocks", "narrower", "fewer-blocks"]
)
def test_tensors_of_other_branches_are_refused(num_blocks: int, ranks: list[int]) -> None:
    from smoa_serve.errors import ConfigError
    from smoa_serve.peft import SMoAConfig, SMoALinear

    torch.manual_seed(0)
    made = SMoALinear(nn.Linear(9, 7), "default", SMoAConfig(r=8, num_blocks=2, init_lora_weights=False), None)
    other = SMoAConfig(r=sum(ranks), num_blocks=num_blocks, branch_ranks=ranks)
    resumed = SMoALinear(nn.Linear(9, 7), "default", other, None)
    resumed.load_state_dict(made.state_dict())
    with pytest.raises(ConfigError, match="the settings that the checkpoint was made with"):
        resumed(torch.ones(1, 9))


def test_a_quantized_weight_is_refused() -> None:
    from smoa_serve.errors import ConfigError
    from smoa_serve.peft import SMoAConfig, SMoALinear

    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantized"):
        SMoALinear(base, "default", SMoAConfig(), None)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"branch_ranks": [4]}, "1 entries for num_blocks=2"),
        ({"branch_ranks": [4, 5]}, "sum to r=8"),
        ({"order": "random"}, "allowed are gram, published"),
        ({"layers_to_transform": [0], "target_modules": ".*q"}, "target_modules as a list"),
        ({"alpha": 32}, "no setting alpha"),
        ({"num_blocks": 0}, "at least 1 block"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"task_type": "SEQ_CLS"}, "trained head"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], reason: str) -> None:
    from smoa_serve.errors import ConfigError
    from smoa_serve.peft import SMoAConfig

    with pytest.raises(ConfigError, match=reason):
        SMoAConfig(**settings)
