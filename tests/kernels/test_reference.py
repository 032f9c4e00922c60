import pytest
import torch
from smoa_kernels import StepPlan
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.testing import assert_close, dense_delta, random_blocks, random_layer, random_update


@pytest.mark.parametrize(
    ("h_in", "h_out", "ranks"),
    [(16, 12, (2, 2)), (23, 17, (3, 1, 0, 2)), (8, 8, (4,)), (5, 3, (1,) * 7), (6, 6, (0, 0))],
    ids=["even", "odd sizes and ranks", "one block", "more blocks than coordinates", "rank 0"],
)
def test_reference_is_the_dense_formula(generator, h_in, h_out, ranks):
    layer = random_layer(h_in, (h_out,), slots=2, max_rank=4, dtype=torch.float32, generator=generator)
    blocks = random_blocks(h_out, len(ranks), generator), random_blocks(h_in, len(ranks), generator)
    update = random_update(*blocks, ranks, generator, scaling=1.5)
    layer.bank.set(1, [update])
    plan = StepPlan(4, 2, "cpu")
    plan.update([1, -1, 1, 0])
    x, y = torch.randn(4, h_in, generator=generator), torch.randn(4, h_out, generator=generator)
    expected = y.clone()
    expected[[0, 2]] += x[[0, 2]] @ dense_delta(update, layer.weights[0]).T
    smoa_delta_reference(y, x, layer.bank, plan)
    assert_close(y, expected)
    assert torch.equal(y[[1, 3]], expected[[1, 3]])
