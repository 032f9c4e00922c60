"""The block-wise update: values and gradients against the dense formula."""

import pytest
import torch

from smoa_serve.adapters.model import ModuleUpdate

pytestmark = pytest.mark.matrix
CASES = [
    pytest.param((7, 5), (2, 1), id="two-blocks"),
    pytest.param((5, 8), (3,), id="one-block"),
    pytest.param((6, 6), (2, 0, 1), id="a-block-without-rank"),
    pytest.param((3, 2), (1, 1, 1, 1), id="empty-blocks"),
    pytest.param((4, 4), (0, 0), id="no-rank-at-all"),
]


def _update(shape: tuple[int, int], ranks: tuple[int, ...], seed: int = 0) -> tuple[ModuleUpdate, torch.Tensor]:
    from smoa_serve.peft.start import block_ids, initial_factors, spectral_pieces

    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64)
    rows, cols = spectral_pieces(weight, len(ranks), "gram")
    a, b = initial_factors(rows, cols, ranks, random_b=True)
    return ModuleUpdate(a.double(), b.double(), block_ids(rows).short(), block_ids(cols).short(), ranks, 0.7), weight


@pytest.mark.parametrize(("shape", "ranks"), CASES)
def test_gradients_are_those_of_the_formula(shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    from smoa_serve.peft.blocks import block_update, blocks_of

    update, weight = _update(shape, ranks)
    blocks = blocks_of(update.row_block, update.col_block, ranks)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    a, b = (t.clone().requires_grad_() for t in (update.a, update.b))

    def updated(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return block_update(x, a, b, weight, blocks, update.scaling)

    expected = x.detach() @ update.dense(weight).double().t()
    torch.testing.assert_close(updated(x, a, b).detach(), expected, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(updated, (x, a, b))
    # A transposed weight (Conv1D) gives the same.
    transposed = weight.t().contiguous().t()
    assert torch.equal(block_update(x, a, b, transposed, blocks, update.scaling), updated(x, a, b))


def test_no_matrix_of_the_layers_size_is_kept_for_the_backward_pass() -> None:
    from smoa_serve.peft.blocks import block_update, blocks_of

    update, weight = _update((48, 40), (2, 2))
    a, b = update.a.clone().requires_grad_(), update.b.clone().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    blocks = blocks_of(update.row_block, update.col_block, update.branch_ranks)
    x = torch.randn(3, 40, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block_update(x, a, b, weight, blocks, 1.0)
    # Besides the frozen weight itself, which exists anyway.
    assert sum(t.numel() for t in kept if t.data_ptr() != weight.data_ptr()) < weight.numel() // 2


def test_numbers_beyond_a_branch_get_no_gradient() -> None:
    from smoa_serve.peft.blocks import block_update, blocks_of

    update, weight = _update((9, 8), (3, 1))
    a, b = update.a.clone().requires_grad_(), update.b.clone().requires_grad_()
    blocks = blocks_of(update.row_block, update.col_block, update.branch_ranks)
    block_update(torch.randn(4, 8, dtype=torch.float64), a, b, weight, blocks, 1.0).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert not a.grad[1:, update.col_block == 1].any()
    assert not b.grad[update.row_block == 1, 1:].any()
    assert a.grad[:, update.col_block == 0].any(dim=1).all()
