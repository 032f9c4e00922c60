"""The recorded layers of the published implementation, through bank and op."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from smoa_kernels import LayerBank, SliceUpdate, StepPlan, smoa_delta
from smoa_kernels.testing import assert_close, cpu_cases, dense_delta

ROOT = Path(__file__).parents[1] / "data" / "vectors"
CASES = json.loads((ROOT / "index.json").read_text())["layers"]


def recorded_update(case, tensors) -> SliceUpdate:
    """The factors in the layer's own coordinates."""
    h_in, h_out, ranks = case["in_features"], case["out_features"], case["branch_ranks"]
    a, b = torch.zeros(max(ranks), h_in), torch.zeros(h_out, max(ranks))
    row_block, col_block = torch.zeros(h_out, dtype=torch.int16), torch.zeros(h_in, dtype=torch.int16)
    for k, rank in enumerate(ranks):
        rows, cols = tensors[f"rows.{k}"], tensors[f"cols.{k}"]
        row_block[rows], col_block[cols] = k, k
        if rank:
            a[:rank, cols] = tensors[f"lora_A.{k}.weight"].float()
            b[rows, :rank] = tensors[f"lora_B.{k}.weight"].float()
    return SliceUpdate(a, b, row_block, col_block, case["scaling"])


RUNS = [
    (case, implementation, instruction_set)
    for case in CASES
    for implementation, dtype, instruction_set in cpu_cases()
    if dtype is getattr(torch, case["dtype"])
]


@pytest.mark.parametrize(
    ("case", "implementation", "instruction_set"),
    RUNS,
    ids=["-".join((case["name"], *filter(None, which))) for case, *which in RUNS],
    indirect=["instruction_set"],
)
def test_recorded_layer(case, implementation):
    tensors = load_file(ROOT / case["file"])
    weight = tensors["W"].T.contiguous() if case["fan_in_fan_out"] else tensors["W"]
    update = recorded_update(case, tensors)
    assert_close(
        dense_delta(update, weight).to(weight.dtype), tensors["delta"].T if case["fan_in_fan_out"] else tensors["delta"]
    )
    rank = max(1, update.a.shape[0])
    bank = LayerBank(
        a=[torch.zeros(2, rank, weight.shape[1], dtype=weight.dtype)],
        b=[torch.zeros(2, rank, weight.shape[0], dtype=weight.dtype)],
        weight_block=lambda _, rows, cols: weight[rows][:, cols],
        implementation=implementation,
    )
    bank.set(1, [update])
    x = tensors["x"].flatten(0, -2)
    y = tensors["y_base"].flatten(0, -2).clone()
    plan = StepPlan(len(x), 2, "cpu")
    plan.update([1] * len(x))
    smoa_delta(y, x, bank, plan, implementation)
    assert_close(y, tensors["y"].flatten(0, -2))
