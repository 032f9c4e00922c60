"""Every implementation against the reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from smoa_kernels import LayerBank, SliceUpdate, StepPlan, smoa_delta
from smoa_kernels.backends.cpp.backend import CPP_COST
from smoa_kernels.backends.cpp.launch import smoa_delta_cpp
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.backends.torch import smoa_delta_torch
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT, CostModel
from smoa_kernels.testing import (
    WORKLOADS,
    assert_close,
    cpu_cases,
    random_blocks,
    random_layer,
    random_update,
    workload,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Op = Callable[[torch.Tensor, torch.Tensor, LayerBank, StepPlan], None]

# Resident where there are blocks; of the others, those of rank 4 modulate from three tokens on.
ALL_WAYS = CostModel(form=2.0, form_per_rank=1.0, resident=float("-inf"))


def resident(op: Callable[..., None], cost: CostModel, every: int = 1) -> Op:
    """The op with the blocks of every n-th slot resident."""

    def run(y: torch.Tensor, x: torch.Tensor, bank: LayerBank, plan: StepPlan) -> None:
        for slot in range(0, bank.num_slots, every):
            bank.make_resident(slot)
        op(y, x, bank, plan, cost=cost)

    return run


OPS: dict[str, Op] = {
    name + suffix: way
    for name, op in {"cpp": smoa_delta_cpp, "torch": smoa_delta_torch}.items()
    for suffix, way in {
        "": op,
        "-expand": partial(op, cost=ALWAYS_EXPAND),
        "-modulate": partial(op, cost=ALWAYS_MODULATE),
        "-resident": resident(op, ALWAYS_RESIDENT),
        "-mixed": resident(op, ALL_WAYS, every=3),
    }.items()
}
# Every way of the C++ kernel under every instruction set that the CPU has.
CASES = [
    (name, implementation, dtype, instruction_set)
    for implementation, dtype, instruction_set in cpu_cases()
    for name in OPS
    if name.split("-")[0] == implementation
]
every_op = pytest.mark.parametrize(
    ("implementation", "op", "dtype", "instruction_set"),
    [(implementation, OPS[name], dtype, instruction_set) for name, implementation, dtype, instruction_set in CASES],
    ids=[
        f"{name}-{str(dtype).removeprefix('torch.')}" + (f"-{instruction_set}" if instruction_set else "")
        for name, _, dtype, instruction_set in CASES
    ],
    indirect=["instruction_set"],
)
CPP_CASES = [(dtype, instruction_set) for name, dtype, instruction_set in cpu_cases() if name == "cpp"]
every_cpp = pytest.mark.parametrize(("dtype", "instruction_set"), CPP_CASES, ids=str, indirect=["instruction_set"])
every_bf16_cpp = pytest.mark.parametrize(
    "instruction_set", [name for dtype, name in CPP_CASES if dtype is torch.bfloat16], indirect=True
)


def fill(bank: LayerBank, slots: dict[int, tuple[int, ...]], generator: torch.Generator) -> None:
    """Slots with those branch ranks in every slice; one partition per number of blocks."""
    orders = {
        (size, len(ranks)): random_blocks(size, len(ranks), generator)
        for ranks in slots.values()
        for size in (bank.h_in, *bank.slices)
    }
    for slot, ranks in slots.items():
        cols = orders[bank.h_in, len(ranks)]
        updates = [random_update(orders[size, len(ranks)], cols, ranks, generator, 0.5) for size in bank.slices]
        bank.set(slot, updates)


def assert_matches_reference(op: Op, bank: LayerBank, slots, generator: torch.Generator) -> None:
    """Compares op with the reference on random x and y; rows without an adapter or beyond the batch keep their bits."""
    plan = StepPlan(len(slots) + 5, bank.num_slots, "cpu")
    plan.update(slots)
    x = torch.randn(len(slots) + 2, bank.h_in, generator=generator).to(bank.dtype)
    y = torch.randn(len(slots) + 3, bank.h_out, generator=generator).to(bank.dtype)
    idle = [t for t in range(len(y)) if t >= len(slots) or slots[t] < 0]
    x[[t for t in idle if t < len(x)]] = torch.nan
    y[idle[::2]] = torch.nan
    y[idle[1::2]] = -0.0
    expected, found = y.clone(), y.clone()
    smoa_delta_reference(expected, x, bank, plan)
    op(found, x, bank, plan)
    used = [t for t in range(len(slots)) if slots[t] >= 0]
    assert_close(found[used], expected[used])
    assert torch.equal(found[idle].view(torch.uint8), y[idle].view(torch.uint8))


@every_op
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(implementation, op, dtype, name, generator):
    layer = random_layer(
        64, (48,), slots=6, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, dict.fromkeys(range(6), (4, 4, 4, 4)), generator)
    assert_matches_reference(op, layer.bank, workload(name, 24, 6), generator)


@every_op
@pytest.mark.parametrize(
    ("h_in", "h_out", "ranks"),
    [
        (67, 45, (2, 2, 2, 2)),
        (64, 48, (3, 0, 5, 1)),
        (40, 24, (8,)),
        (6, 5, (1,) * 9),
        (33, 130, (3, 3)),
        (32, 32, (0, 0)),
        (1, 1, (1,)),
    ],
    ids=["indivisible", "unequal ranks", "K=1", "K above sizes", "three rows of panels", "rank 0", "single numbers"],
)
def test_odd_sizes(implementation, op, dtype, h_in, h_out, ranks, generator):
    layer = random_layer(
        h_in, (h_out,), slots=3, max_rank=8, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, dict.fromkeys(range(3), ranks), generator)
    assert_matches_reference(op, layer.bank, [0, 2, -1, 2, 1, 2], generator)


@every_op
@pytest.mark.parametrize("slots", [[], [-1] * 4, [1], [-1, 1], [0]], ids=["empty", "none", "one", "last", "unset slot"])
def test_small_batches(implementation, op, dtype, slots, generator):
    layer = random_layer(
        24, (16,), slots=2, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, {1: (2, 2)}, generator)
    assert_matches_reference(op, layer.bank, slots, generator)


@every_op
def test_more_tokens_than_are_summed_at_once(implementation, op, dtype, generator):
    layer = random_layer(
        96, (80,), slots=70, max_rank=2, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, dict.fromkeys(range(0, 70, 2), (2, 1)), generator)
    assert_matches_reference(op, layer.bank, workload("distinct", 150, 70), generator)


@every_op
def test_the_result_does_not_depend_on_the_other_adapters_of_the_batch(implementation, op, dtype, generator):
    layer = random_layer(
        64, (48,), slots=3, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, {0: (4, 4), 1: (4, 4), 2: (2,) * 4}, generator)
    x, results = torch.randn(7, 64, generator=generator).to(dtype), []
    for slots in ([0] * 7, [0, 1, 2, 0, 1, 2, -1]):
        plan = StepPlan(7, 3, "cpu")
        plan.update(slots)
        results.append(torch.zeros(7, 48, dtype=dtype))
        op(results[-1], x, layer.bank, plan)
    assert_close(results[1][[0, 3]], results[0][[0, 3]])


@every_op
def test_several_partitions_and_ranks_at_once(implementation, op, dtype, generator):
    layer = random_layer(
        64, (48, 16, 16), slots=8, max_rank=8, dtype=dtype, generator=generator, implementation=implementation
    )
    kinds = {0: (4,) * 4, 1: (4,) * 8, 2: (8,), 3: (2, 2), 4: (1,) * 4, 5: (4,) * 4, 6: (0, 3, 1, 0)}
    fill(layer.bank, kinds, generator)
    assert_matches_reference(op, layer.bank, workload("uniform", 40, 8), generator)


@every_op
def test_slices_that_an_adapter_leaves_alone_keep_their_bits(implementation, op, dtype, generator):
    layer = random_layer(
        64, (48, 16, 16), slots=3, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    bank = layer.bank
    fill(bank, {0: (4, 4), 1: (2, 2, 2, 2), 2: (2, 2)}, generator)
    cols = random_blocks(64, 2, generator)
    bank.set(0, [random_update(random_blocks(48, 2, generator), cols, (4, 4), generator), None, None])
    bank.set(2, [None, None, random_update(random_blocks(16, 2, generator), cols, (4, 4), generator)])
    assert_matches_reference(op, bank, [0, 1, 2, 2, 0], generator)
    plan = StepPlan(2, 3, "cpu")
    plan.update([0, 2])
    x, y = torch.randn(2, 64, generator=generator).to(dtype), torch.full((2, 80), -0.0, dtype=dtype)
    op(y, x, bank, plan)
    assert y[0, :48].any()
    assert y[1, 64:].any()
    for rest in (y[0, 48:], y[1, :64]):
        assert torch.equal(rest, torch.zeros_like(rest))
        assert torch.signbit(rest).all()


@every_op
def test_rows_and_columns_without_a_block_contribute_nothing(implementation, op, dtype, generator):
    layer = random_layer(
        40, (32,), slots=1, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    rows, cols = random_blocks(32, 3, generator), random_blocks(40, 3, generator)
    rows[rows == 1], cols[cols == 0] = 9, 7
    layer.bank.set(0, [random_update(rows.clamp(max=3), cols.clamp(max=4), (4, 4, 4, 4, 4), generator)])
    assert_matches_reference(op, layer.bank, [0] * 9, generator)
    plan = StepPlan(1, 1, "cpu")
    plan.update([0])
    y = torch.full((1, 32), -0.0, dtype=dtype)
    op(y, torch.randn(1, 40, generator=generator).to(dtype), layer.bank, plan)
    assert torch.signbit(y[0, rows != 2]).all()


@every_op
def test_x_and_y_may_be_views_of_wider_tensors(implementation, op, dtype, generator):
    layer = random_layer(
        24, (16, 8), slots=2, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, {0: (2, 2), 1: (4,)}, generator)
    plan = StepPlan(5, 2, "cpu")
    plan.update([0, 1, -1, 1, 0])
    wide_x = torch.randn(10, 40, generator=generator).to(dtype)
    wide_y = torch.randn(10, 30, generator=generator).to(dtype)
    x, expected, before = wide_x[::2, 3:27], wide_y[::2, 5:29].clone(), wide_y.clone()
    smoa_delta_reference(expected, x, layer.bank, plan)
    op(wide_y[::2, 5:29], x, layer.bank, plan)
    assert_close(wide_y[::2, 5:29], expected)
    wide_y[::2, 5:29] = before[::2, 5:29]
    assert torch.equal(wide_y, before)


@every_op
def test_slots_replaced_cleared_and_reloaded(implementation, op, dtype, generator):
    layer = random_layer(
        32, (24,), slots=2, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    slots = [0, 1, 1, 0]
    for kinds in ({0: (2, 2)}, {0: (4,), 1: (1, 1)}, {1: (3, 3)}, {0: (2, 2)}):
        fill(layer.bank, kinds, generator)
        assert_matches_reference(op, layer.bank, slots, generator)
    layer.bank.clear(0)
    assert_matches_reference(op, layer.bank, slots, generator)


@every_op
def test_one_plan_over_changing_banks(implementation, op, dtype, generator):
    layer = random_layer(
        32, (24,), slots=2, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    plan = StepPlan(2, 2, "cpu")
    plan.update([0, 1])
    x = torch.randn(2, 32, generator=generator).to(dtype)
    for kinds in ({0: (2, 2)}, {1: (4,)}, {0: (1, 2)}):
        fill(layer.bank, kinds, generator)
        found, expected = torch.zeros(2, 24, dtype=dtype), torch.zeros(2, 24, dtype=dtype)
        op(found, x, layer.bank, plan)
        smoa_delta_reference(expected, x, layer.bank, plan)
        assert_close(found, expected)


@every_op
def test_equal_inputs_give_equal_bits(implementation, op, dtype, generator):
    layer = random_layer(
        64, (48, 16), slots=4, max_rank=4, dtype=dtype, generator=generator, implementation=implementation
    )
    fill(layer.bank, {0: (4, 4), 1: (4,) * 4, 2: (2, 2), 3: (1,)}, generator)
    plan = StepPlan(30, 4, "cpu")
    plan.update(workload("uniform", 30, 4))
    x = torch.randn(30, 64, generator=generator).to(dtype)
    results = []
    for _ in range(3):
        results.append(torch.zeros(30, 64, dtype=dtype))
        op(results[-1], x, layer.bank, plan)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_bf16_cpp
def test_the_number_of_threads_does_not_change_a_bit(generator):
    layer = random_layer(96, (200, 40), slots=4, max_rank=4, dtype=torch.bfloat16, generator=generator)
    fill(layer.bank, {0: (4, 4), 1: (4,) * 4, 2: (2, 2), 3: (1,)}, generator)
    plan = StepPlan(60, 4, "cpu")
    plan.update(workload("zipf", 60, 4))
    x, results = torch.randn(60, 96, generator=generator).bfloat16(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.zeros(60, 240, dtype=torch.bfloat16))
        smoa_delta_cpp(results[-1], x, layer.bank, plan)
    assert torch.equal(*results)


@every_cpp
def test_numbers_are_rounded_as_torch_rounds_them(dtype, generator):
    # W = A = B = 1 on a single number: the delta is x, so y + x is rounded once, and so is 3 x of rank 3.
    weight = torch.ones(1, 1, dtype=dtype)
    ids = torch.zeros(1, dtype=torch.int16)
    for rank in (1, 3):
        bank = LayerBank(
            a=[torch.zeros(1, 3, 1, dtype=dtype)],
            b=[torch.zeros(1, 3, 1, dtype=dtype)],
            weight_block=lambda *_: weight,
            implementation="cpp",
        )
        bank.set(0, [SliceUpdate(torch.ones(rank, 1), torch.ones(1, rank), ids, ids, 1.0)])
        x = torch.randn(500, 1, generator=generator).to(dtype)
        x[:4, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
        y = torch.randn(500, 1, generator=generator).to(dtype)
        expected = (y.float() + (rank * x.float()).to(dtype).float()).to(dtype)
        plan = StepPlan(500, 1, "cpu")
        plan.update([0] * 500)
        smoa_delta_cpp(y, x, bank, plan, ALWAYS_EXPAND)
        torch.testing.assert_close(y, expected, rtol=0.0, atol=0.0, equal_nan=True)


@every_bf16_cpp
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("held", [False, True], ids=["factors only", "resident"])
def test_the_kernel_goes_the_way_that_the_cost_model_says(rank, held, generator):
    """The ways are told apart by what they compute, as their rounding is the same under some instruction sets."""
    layer = random_layer(64, (48,), slots=1, max_rank=8, dtype=torch.bfloat16, generator=generator)
    cols, rows = (random_blocks(size, 2, generator) for size in (64, 48))
    update = random_update(rows, cols, (rank, rank), generator)
    # x * A is beyond float32, which only expand computes; B * A is of size 1.
    layer.bank.set(0, [replace(update, a=update.a * 1e30, b=update.b * 1e-30)])
    if held:
        layer.bank.make_resident(0)
        layer.bank.slots[0][0].resident.weights.mul_(2)
    forced = {"expand": ALWAYS_EXPAND, "modulate": ALWAYS_MODULATE, "resident": ALWAYS_RESIDENT}
    seen = set()
    for cost in (CPP_COST, ALL_WAYS, CostModel(form=-1.0, form_per_rank=3.0, resident=12.0)):
        for tokens in (1, 2, 3, 5, 8, 13, 40):
            plan = StepPlan(tokens, 1, "cpu")
            plan.update([0] * tokens)
            x = (torch.randn(tokens, 64, generator=generator) * 1e30).bfloat16()
            found, *results = (torch.zeros(tokens, 48, dtype=torch.bfloat16) for _ in range(4))
            smoa_delta_cpp(found, x, layer.bank, plan, cost)
            for result, always in zip(results, forced.values(), strict=True):
                smoa_delta_cpp(result, x, layer.bank, plan, always)
            found, expand, modulate, resident = (result.view(torch.int16) for result in (found, *results))
            assert not torch.equal(expand, modulate)
            assert not torch.equal(modulate, resident)
            assert torch.equal(expand, resident) is not held
            way = cost.way(tokens, rank, held)
            seen.add(way)
            assert torch.equal(found, {"expand": expand, "modulate": modulate, "resident": resident}[way]), tokens
    assert "resident" in seen if held else seen <= {"expand", "modulate"}


def test_the_default_serves_every_dtype(generator):
    for dtype in DTYPES:
        layer = random_layer(24, (16,), slots=2, max_rank=4, dtype=dtype, generator=generator)
        fill(layer.bank, {0: (2, 2), 1: (4,)}, generator)
        assert_matches_reference(smoa_delta, layer.bank, [0, 1, -1, 1], generator)
