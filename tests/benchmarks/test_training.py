"""The training benchmark compares like with like, and sees the memory it is about."""

import pytest
import torch

from benchmarks import training
from benchmarks.harness.timing import times_row
from benchmarks.training import DenseFormulation, peak_bytes
from smoa_serve.peft import SMoAConfig, SMoALinear


@pytest.mark.parametrize(("rank", "num_blocks"), [(6, 3), (5, 2), (2, 4)])
def test_the_dense_formulation_is_the_same_layer(rank: int, num_blocks: int) -> None:
    torch.manual_seed(0)
    config = SMoAConfig(r=rank, num_blocks=num_blocks, lora_dropout=0.0, init_lora_weights=False)
    ours = SMoALinear(torch.nn.Linear(14, 11).requires_grad_(False), "default", config, None)
    dense = DenseFormulation(ours)
    x = torch.randn(5, 14, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    torch.testing.assert_close(ours(x), dense(x_dense))
    ours(x).square().sum().backward()
    dense(x_dense).square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)
    grad_a, grad_b = ours.smoa_a["default"].grad, ours.smoa_b["default"].grad
    for block, a, b in zip(dense.blocks, dense.a, dense.b, strict=True):
        a_k, b_k = block.factors(grad_a, grad_b)
        torch.testing.assert_close(a_k, a.grad)
        torch.testing.assert_close(b_k, b.grad)


def test_the_peak_of_a_step_is_seen_after_it_is_freed() -> None:
    def step(megabytes: int) -> float:
        return float(torch.ones(megabytes, 250_000).sum())

    step(1)
    small, large = peak_bytes(lambda: step(1), 1), peak_bytes(lambda: step(200), 1)
    assert 150e6 < large - small < 300e6


def test_bars_are_the_memory_above_the_base_and_paired_times() -> None:
    seconds = {"base": [1.0], "ours": [2.0, 2.0, 4.0], "dense": [3.0, 4.0, 4.0]}
    times = {name: times_row({i: (value, 0.0) for i, value in enumerate(found)}) for name, found in seconds.items()}
    row = {
        "kind": "training",
        "setting": "x",
        "times_us": times,
        "peak_bytes": {"base": 100, "ours": 150, "dense": 300},
    }
    memory, time = training.bars([row])
    assert (memory.figure, memory.at_least) == (4.0, 2.0)
    assert (time.figure, time.spread) == (1.5, (1.0, 2.0))
