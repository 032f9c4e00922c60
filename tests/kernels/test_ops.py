from unittest.mock import Mock

import pytest
import torch
from smoa_kernels import (
    ImplementationError,
    LayerBank,
    ShapeError,
    StepPlan,
    available_implementations,
    default_implementation,
    smoa_delta,
)
from smoa_kernels.backends.reference import ReferenceBackend
from smoa_kernels.testing import random_layer


@pytest.fixture
def bank(generator) -> LayerBank:
    return random_layer(8, (6, 2), slots=2, max_rank=2, dtype=torch.float32, generator=generator).bank


@pytest.fixture
def plan() -> StepPlan:
    plan = StepPlan(4, 2, "cpu")
    plan.update([0, -1, 1])
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_and_reference_serve_every_device_and_dtype(device, dtype):
    available = available_implementations(device, dtype)
    assert {"torch", "reference"} <= set(available)
    assert default_implementation(device, dtype) == available[0]


def test_an_unknown_dtype_has_no_default():
    assert available_implementations("cpu", torch.float64) == ()
    with pytest.raises(ImplementationError, match="available: none"):
        default_implementation("cpu", torch.float64)


def test_an_unknown_implementation_is_refused_with_what_is_available(bank, plan):
    with pytest.raises(ImplementationError, match=r"'magic' cannot serve torch.float32 on cpu; available: .*torch"):
        smoa_delta(torch.zeros(3, 8), torch.zeros(3, 8), bank, plan, implementation="magic")


def test_an_explicit_wish_is_what_runs(bank, plan, monkeypatch):
    called = Mock()
    monkeypatch.setattr(ReferenceBackend, "delta", called)
    smoa_delta(torch.zeros(3, 8), torch.zeros(3, 8), bank, plan, implementation="reference")
    called.assert_called_once()


def test_nothing_runs_when_no_token_has_an_adapter(bank, plan, monkeypatch):
    monkeypatch.setattr(bank, "backend", None)
    plan.update([-1, -1])
    y = torch.randn(3, 8)
    before = y.clone()
    # With no backend, running one would be an AttributeError.
    smoa_delta(y, torch.zeros(3, 8), bank, plan)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("y", "x", "message"),
    [
        (torch.zeros(3, 8), torch.zeros(3, 7), r"x has shape \(3, 7\); allowed is \[tokens, 8\]"),
        (torch.zeros(3, 9), torch.zeros(3, 8), r"y has shape \(3, 9\)"),
        (torch.zeros(2, 8), torch.zeros(3, 8), "y has 2 rows; the plan has 3 tokens"),
        (torch.zeros(3, 8), torch.zeros(1, 3, 8), r"x has shape \(1, 3, 8\)"),
        (torch.zeros(3, 8).bfloat16(), torch.zeros(3, 8), "y is torch.bfloat16 on cpu"),
        (torch.zeros(3, 8), torch.zeros(8, 3).T, "x has column stride 3"),
        (torch.zeros(3, 8, device="meta"), torch.zeros(3, 8), "y is torch.float32 on meta"),
    ],
    ids=["x width", "y width", "y rows", "x dims", "dtype", "stride", "device"],
)
def test_tensors_that_do_not_fit_are_refused(bank, plan, y, x, message):
    with pytest.raises(ShapeError, match=message):
        smoa_delta(y, x, bank, plan)


def test_all_reasons_are_named_at_once(bank, plan):
    with pytest.raises(ShapeError) as caught:
        smoa_delta(torch.zeros(2, 8).half(), torch.zeros(3, 7), bank, plan)
    assert len(caught.value.reasons) == 3


def test_a_plan_for_another_number_of_slots_is_refused(bank):
    with pytest.raises(ShapeError, match="plan has 3 slots and the bank has 2"):
        smoa_delta(torch.zeros(1, 8), torch.zeros(1, 8), bank, StepPlan(1, 3, "cpu"))
