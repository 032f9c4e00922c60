"""The custom op that every layer calls: torch.compile must keep it and its writes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from smoa_kernels import LayerBank, SliceUpdate, StepPlan, smoa_delta

T, H_IN, H_OUT, R = 6, 16, 24, 2


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer with one adapter in slot 1, where the op looks for it."""
    from smoa_serve.engine import linear as layers

    torch.manual_seed(0)
    weight = torch.randn(H_OUT, H_IN)
    bank = LayerBank(
        a=[torch.zeros(2, R, H_IN)],
        b=[torch.zeros(2, R, H_OUT)],
        weight_block=lambda _, rows, cols: weight[rows][:, cols],
    )
    update = SliceUpdate(
        a=torch.randn(R, H_IN),
        b=torch.randn(H_OUT, R),
        row_block=(torch.arange(H_OUT) % 2).to(torch.int16),
        col_block=(torch.arange(H_IN) % 2).to(torch.int16),
        scaling=0.5,
    )
    bank.set(1, [update])
    plan = StepPlan(T, 2, "cpu")
    plan.update([1, -1, 1, -1, -1, 1])
    found = layers.SmoaLinearMixin()
    found.smoa_bank, found.smoa_plan, found.smoa_one_op = bank, plan, False
    context = SimpleNamespace(no_compile_layers={"layer": found})
    monkeypatch.setattr(layers, "get_forward_context", lambda: context)
    return found


def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer with the op on its output, as the plugin leaves it in vLLM's graph."""
    y = x @ weight.T
    torch.ops.smoa_serve.delta(y, x, "layer")
    return torch.relu(y) + y


def test_the_op_adds_the_delta_in_place(layer: Any) -> None:
    x = torch.randn(T, H_IN)
    expected, found = torch.zeros(T, H_OUT), torch.zeros(T, H_OUT)
    smoa_delta(expected, x, layer.smoa_bank, layer.smoa_plan, "reference")
    torch.ops.smoa_serve.delta(found, x, "layer")
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_keeps_the_op_for_later_batches(layer: Any, backend: str) -> None:
    weight = torch.randn(H_OUT, H_IN)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for slots in ([-1] * T, [1, -1, 1, -1, -1, 1], [1] * T):
        layer.smoa_plan.update(slots)
        x = torch.randn(T, H_IN)
        torch.testing.assert_close(compiled(x, weight), model(x, weight), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_keeps_a_layer_that_is_one_op(layer: Any, backend: str) -> None:
    """Steps that take one pass over the weight, and steps that do not, through one graph."""
    weight, bias = torch.randn(H_OUT, H_IN), torch.randn(H_OUT)
    layer.base_layer = SimpleNamespace(
        quant_method=SimpleNamespace(apply=lambda _, x, bias: torch.nn.functional.linear(x, weight, bias))
    )
    layer.punica_wrapper = SimpleNamespace(no_lora=True)

    def one_op(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.smoa_serve.linear(x, bias, H_OUT, "layer")
        return torch.relu(y) + y

    compiled = torch.compile(one_op, fullgraph=True, backend=backend)
    for slots in ([-1] * T, [1, -1, 1, -1, -1, 1], [1] * T):
        layer.smoa_plan.update(slots)
        x = torch.randn(T, H_IN)
        expected = torch.nn.functional.linear(x, weight, bias)
        smoa_delta(expected, x, layer.smoa_bank, layer.smoa_plan, "reference")
        torch.testing.assert_close(compiled(x), torch.relu(expected) + expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_the_op_passes_torchs_own_checks(layer: Any) -> None:
    y, x = torch.randn(T, H_OUT), torch.randn(T, H_IN)
    results = torch.library.opcheck(
        torch.ops.smoa_serve.delta.default,
        (y, x, "layer"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    assert set(results.values()) == {"SUCCESS"}
