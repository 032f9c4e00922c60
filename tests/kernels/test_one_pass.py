"""Base product and deltas from one pass over a whole sorted weight, by the C++ kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from smoa_kernels import LayerBank, ShapeError, SliceUpdate, StepPlan, can_be_one_pass, smoa_linear
from smoa_kernels.backends.cpp.launch import smoa_delta_cpp, smoa_linear_cpp
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT, CostModel
from smoa_kernels.testing import assert_close, cpu_cases, dense_delta, merge_slot, random_blocks, random_update
from torch import Tensor

CPP_CASES = [(dtype, instruction_set) for name, dtype, instruction_set in cpu_cases() if name == "cpp"]
every_cpp = pytest.mark.parametrize(("dtype", "instruction_set"), CPP_CASES, ids=str, indirect=["instruction_set"])
every_bf16 = pytest.mark.parametrize(
    "instruction_set", [name for dtype, name in CPP_CASES if dtype is torch.bfloat16], indirect=True
)
every_fp32 = pytest.mark.parametrize(
    "instruction_set", [name for dtype, name in CPP_CASES if dtype is torch.float32], indirect=True
)
SLOTS, MAX_RANK, MAX_TOKENS = 4, 5, 96
Updates = list[list[SliceUpdate | None]]


@dataclass(frozen=True)
class Filled:
    """A layer whose slots share one partition, and hold blocks inside the whole weight."""

    weights: list[Tensor]
    bias: Tensor
    bank: LayerBank
    updates: Updates

    def output(self, slots: Sequence[int], x: Tensor) -> Tensor:
        """The layer's output from its definition, in fp32."""
        y = x.float() @ torch.cat(self.weights).float().T + self.bias.float()
        for slot in set(slots):
            tokens = [t for t, own in enumerate(slots) if own == slot]
            start = 0
            for weight, update in zip(self.weights, self.updates[slot], strict=True):
                end = start + len(weight)
                if update is not None:
                    y[tokens, start:end] += x[tokens].float() @ dense_delta(update, weight).T
                start = end
        return y


def filled(
    h_in: int, slices: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> Filled:
    """Adapters in all slots; slot 1 leaves the second slice alone, slot 2 is resident, some ids have no counterpart."""
    weights = [torch.randn(size, h_in, generator=generator).div(h_in**0.5).to(dtype) for size in slices]
    bank = LayerBank(
        a=[torch.zeros(SLOTS, MAX_RANK, h_in, dtype=dtype) for _ in slices],
        b=[torch.zeros(SLOTS, MAX_RANK, size, dtype=dtype) for size in slices],
        weight_block=lambda index, rows, cols: weights[index][rows][:, cols],
        whole=True,
        implementation="cpp",
    )
    lonely_row, lonely_col = len(ranks), len(ranks) + 1
    rows = [random_blocks(size, len(ranks), generator) for size in slices]
    cols = random_blocks(h_in, len(ranks), generator)
    rows[0][:5], cols[3:8] = lonely_row, lonely_col
    updates: Updates = [
        [random_update(own, cols, (*ranks, 1, 1), generator, 0.5) for own in rows] for _ in range(SLOTS)
    ]
    if len(slices) > 1:
        updates[1][1] = None
    for slot, held in enumerate(updates):
        bank.set(slot, held)
    bank.make_resident(2)
    return Filled(weights, torch.randn(sum(slices), generator=generator).to(dtype), bank, updates)


def planned(slots: Sequence[int]) -> StepPlan:
    """A step."""
    plan = StepPlan(MAX_TOKENS, SLOTS, "cpu")
    plan.update(slots)
    return plan


@every_cpp
@pytest.mark.parametrize(
    "cost", [ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT], ids=["expand", "modulate", "resident"]
)
@pytest.mark.parametrize(
    ("h_in", "slices", "ranks"),
    [
        (64, (64,), (2, 2, 2, 2)),
        (90, (70, 33), (3, 1, 2)),
        (130, (200, 17, 50), (1, 0, 2, 5, 4)),
        (33, (21,), (1,) * 7),
    ],
    ids=["even", "packed", "unequal ranks", "small blocks"],
)
def test_base_and_delta(dtype, cost, h_in, slices, ranks, generator):
    layer = filled(h_in, slices, ranks, dtype, generator)
    for tokens in (1, 7, 16, 17, 70):
        slots = torch.randint(0, SLOTS, (tokens,), generator=generator).tolist()
        x, plan = torch.randn(tokens, h_in, generator=generator).to(dtype), planned(slots)
        expected = layer.output(slots, x)
        found = smoa_linear_cpp(x, layer.bank, plan, layer.bias, cost)
        assert_close(found, expected)
        # Blocks inside the whole weight serve the delta alone too.
        apart = (x.float() @ torch.cat(layer.weights).float().T + layer.bias.float()).to(dtype)
        smoa_delta_cpp(apart, x, layer.bank, plan, cost)
        assert_close(apart, expected)


@every_bf16
def test_a_row_does_not_depend_on_the_rest_of_the_batch(generator):
    layer = filled(96, (80,), (2, 3), torch.bfloat16, generator)
    x = torch.randn(16, 96, generator=generator).bfloat16()
    cost = ALWAYS_EXPAND
    together = smoa_linear_cpp(x, layer.bank, planned([t % SLOTS for t in range(16)]), None, cost)
    alone = [smoa_linear_cpp(x[t : t + 1], layer.bank, planned([t % SLOTS]), None, cost) for t in range(16)]
    assert torch.equal(together, torch.cat(alone))


@every_bf16
def test_rows_may_be_apart_and_more_tokens_take_another_way(generator):
    layer = filled(64, (48, 16), (1, 1), torch.bfloat16, generator)
    wide = torch.randn(40, 80, generator=generator).bfloat16()
    slots = [0] * 30 + [3] * 10
    found = smoa_linear_cpp(wide[:, :64], layer.bank, planned(slots), None, CostModel(2.0, 1.0, 100.0))
    assert_close(found, layer.output(slots, wide[:, :64]) - layer.bias.float())


@every_bf16
def test_a_step_that_comes_again_takes_what_is_new(generator):
    layer = filled(64, (48, 16), (2, 3), torch.bfloat16, generator)
    slots = [0, 2, 2, 3, 1]
    plan, same = planned(slots), planned(slots)
    for bias in (layer.bias, None, layer.bias):
        x = torch.randn(5, 64, generator=generator).bfloat16()
        expected = layer.output(slots, x) - (0 if bias is not None else layer.bias.float())
        assert_close(smoa_linear(x, layer.bank, plan, bias), expected)
        assert_close(smoa_linear(x, layer.bank, same, bias), expected)
    layer.bank.set(2, [None, None])
    kept = smoa_linear(x, layer.bank, plan, layer.bias)
    assert_close(kept[1], (x[1].float() @ torch.cat(layer.weights).float().T + layer.bias.float()))
    assert_close(kept[0], expected[0])


@every_fp32
@pytest.mark.parametrize(
    ("slots", "merged"), [([0, -1], False), ([0, SLOTS], True)], ids=["a token of the base", "something merged"]
)
def test_steps_that_need_the_base_product_are_refused(slots, merged, generator):
    layer = filled(32, (32,), (2,), torch.float32, generator)
    merge_slot(layer.bank, 0)
    plan = StepPlan(MAX_TOKENS, SLOTS, "cpu")
    plan.update(slots, merged=merged)
    assert not can_be_one_pass(layer.bank, plan)
    with pytest.raises(ShapeError, match="whose slots all share the partition"):
        smoa_linear(torch.zeros(2, 32), layer.bank, plan)


@every_fp32
def test_another_partition_has_blocks_of_its_own_until_the_first_is_gone(generator):
    layer = filled(32, (32,), (2, 2), torch.float32, generator)
    first = layer.bank.whole_partition(0)
    other = random_update(random_blocks(32, 4, generator), random_blocks(32, 4, generator), (1,) * 4, generator)
    layer.bank.set(0, [other])
    assert not can_be_one_pass(layer.bank, planned([0, 1]))
    assert can_be_one_pass(layer.bank, planned([1, 3]))
    held = layer.bank.slots[0][0]
    assert held is not None
    assert held.partition.store.nbytes < first.store.nbytes

    for slot in range(SLOTS):
        layer.bank.clear(slot)
    for seed in range(5):  # more than are retained without a user
        blocks = random_blocks(32, 3, torch.Generator().manual_seed(seed))
        layer.bank.set(0, [random_update(blocks, blocks, (1,) * 3, generator)])
    layer.bank.set(1, [other])
    layer.bank.set(0, [other])
    assert layer.bank.whole_partition(0) is not first


@every_fp32
def test_a_bank_without_whole_weights_takes_no_single_pass(generator):
    weight = torch.randn(8, 8, generator=generator)
    bank = LayerBank(
        a=[torch.zeros(SLOTS, 1, 8)],
        b=[torch.zeros(SLOTS, 1, 8)],
        weight_block=lambda index, rows, cols: weight[rows][:, cols],
        implementation="cpp",
    )
    blocks = random_blocks(8, 2, generator)
    bank.set(0, [random_update(blocks, blocks, (1, 1), generator)])
    assert not can_be_one_pass(bank, planned([0]))
