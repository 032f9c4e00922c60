"""Cases of the Triton kernels for Triton's interpreter; `test_triton.py` runs them in a process of their own."""

from collections.abc import Sequence

import pytest
import torch
from smoa_kernels import LayerBank, ShapeError, StepPlan, can_be_one_pass, smoa_delta, smoa_linear
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.backends.triton import launch as triton_ops
from smoa_kernels.backends.triton.tables import TRITON_COST, LayerTables, StepTables
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, ALWAYS_RESIDENT, CostModel
from smoa_kernels.testing import (
    WORKLOADS,
    Layer,
    assert_close,
    merge_slot,
    random_blocks,
    random_layer,
    random_update,
    workload,
)

WAYS = {"expand": ALWAYS_EXPAND, "modulate": ALWAYS_MODULATE, "resident": ALWAYS_RESIDENT, "chosen": TRITON_COST}
every_way = pytest.mark.parametrize("cost", WAYS.values(), ids=list(WAYS))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
SLOTS = 4


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers that starts alike in every test."""
    return torch.Generator().manual_seed(0)


def made(
    h_in: int, slices: Sequence[int], held: dict[int, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator
) -> Layer:
    """A layer whose slots hold those branch ranks in every slice; slots of equal K share their partitions."""
    most = max(max(ranks) for ranks in held.values())
    layer = random_layer(
        h_in, slices, slots=SLOTS, max_rank=most, dtype=dtype, generator=generator, implementation="triton"
    )
    orders = {
        (size, len(ranks)): random_blocks(size, len(ranks), generator)
        for ranks in held.values()
        for size in (h_in, *slices)
    }
    for slot, ranks in held.items():
        cols = orders[h_in, len(ranks)]
        updates = [random_update(orders[size, len(ranks)], cols, ranks, generator, 0.5) for size in slices]
        layer.bank.set(slot, updates)
    return layer


def planned(bank: LayerBank, slots: Sequence[int], cost: CostModel, merged: bool = False) -> StepPlan:
    """A plan of that step whose slots are described as the bank holds them."""
    plan = StepPlan(len(slots) + 5, bank.num_slots, "cpu")
    plan.cost = cost
    for slot in range(bank.num_slots):
        entries = [entry for entry in bank.slots[slot] if entry is not None]
        rank = max((entry.rank for entry in entries), default=0)
        plan.describe(slot, rank, any(entry.resident is not None for entry in entries))
    plan.update(slots, merged)
    return plan


def assert_matches_reference(
    bank: LayerBank, slots: Sequence[int], cost: CostModel, generator: torch.Generator
) -> None:
    """Compares the op with the reference; rows without an adapter or beyond the batch keep their bits."""
    plan = planned(bank, slots, cost)
    x = torch.randn(len(slots) + 2, bank.h_in, generator=generator).to(bank.dtype)
    wide = torch.randn(len(slots) + 3, bank.h_out + 3, generator=generator).to(bank.dtype)
    idle = [t for t in range(len(wide)) if t >= len(slots) or slots[t] < 0]
    wide[idle] = torch.nan
    expected, found = wide.clone(), wide.clone()
    smoa_delta_reference(expected[:, : bank.h_out], x, bank, plan)
    smoa_delta(found[:, : bank.h_out], x, bank, plan)
    used = [t for t in range(len(slots)) if slots[t] >= 0]
    assert_close(found[used], expected[used])
    assert torch.equal(found[idle].view(torch.uint8), wide[idle].view(torch.uint8))


@every_dtype
@every_way
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(dtype, cost, name, generator):
    layer = made(64, (48,), dict.fromkeys(range(SLOTS), (4, 4)), dtype, generator)
    if cost is ALWAYS_RESIDENT:
        for slot in range(SLOTS):
            layer.bank.make_resident(slot)
    assert_matches_reference(layer.bank, workload(name, 24, SLOTS).tolist(), cost, generator)


@every_way
@pytest.mark.parametrize(
    ("h_in", "slices", "ranks"),
    [
        (67, (45,), (2, 2, 2, 2)),
        (33, (40, 7, 1), (3, 0, 1)),
        (16, (16,), (1,)),
        (130, (70,), (20, 18)),
        (5, (3,), (2, 2, 2)),
        (70, (33,), (1, 2, 3, 4, 5, 6, 7)),
    ],
    ids=["unequal-blocks", "packed-rank-0", "hira-rank-1", "two-rank-chunks", "tiny", "many-ranks"],
)
def test_odd_sizes(cost, h_in, slices, ranks, generator):
    layer = made(h_in, slices, {0: ranks, 2: ranks}, torch.float32, generator)
    if cost is ALWAYS_RESIDENT:
        layer.bank.make_resident(0)
    assert_matches_reference(layer.bank, [0, 2, -1, 0, 0, 2, 1], cost, generator)


@every_way
def test_one_batch_of_everything(cost, generator):
    """SMoA of several (r, K), HiRA, an empty slot, tokens without an adapter; a slice that one adapter leaves alone."""
    layer = made(50, (37, 20), {0: (4, 4, 4), 1: (2, 0), 2: (3,)}, torch.float32, generator)
    rows, cols = random_blocks(20, 4, generator), random_blocks(50, 4, generator)
    rows[rows == 1], cols[cols == 2] = 9, 8
    layer.bank.set(1, [None, random_update(rows, cols, (1, 2, 3, 4) + (0,) * 6, generator)])
    layer.bank.make_resident(2)
    assert_matches_reference(layer.bank, [0, 1, -1, 2, 3, 2, 1, 0, 0, -1], cost, generator)


@every_way
def test_tokens_of_one_adapter_over_several_tiles(cost, generator):
    layer = made(32, (16,), {0: (2, 2), 1: (1, 2)}, torch.float32, generator)
    assert_matches_reference(layer.bank, [0] * 70 + [1] * 3 + [0] * 2, cost, generator)


@every_way
def test_a_long_batch_in_chunks(cost, generator, monkeypatch):
    monkeypatch.setattr(triton_ops, "CHUNK_ROWS", 16)
    layer = made(32, (16,), {0: (2, 2), 1: (1, 2), 2: (2, 1)}, torch.float32, generator)
    assert_matches_reference(layer.bank, [0] * 9 + [1] * 3 + [0] * 2 + [2] * 11 + [-1, 1], cost, generator)


def test_a_token_alone(generator):
    layer = made(40, (24,), {3: (2, 2)}, torch.float32, generator)
    assert_matches_reference(layer.bank, [3], TRITON_COST, generator)


@pytest.mark.parametrize("merged", [0, 1])
def test_beside_a_merged_adapter(merged, generator):
    layer = made(40, (24, 9), {0: (2, 3), 1: (3,)}, torch.float32, generator)
    merge_slot(layer.bank, merged)
    slots = [SLOTS, -1, 1 - merged, 1 - merged, 3, SLOTS]
    plan = planned(layer.bank, slots, TRITON_COST, merged=True)
    x, y = torch.randn(6, 40, generator=generator), torch.randn(6, 33, generator=generator)
    expected, found = y.clone(), y.clone()
    smoa_delta(expected, x, layer.bank, plan, "reference")
    smoa_delta(found, x, layer.bank, plan, "triton")
    assert_close(found, expected)
    assert torch.equal(found[[0, 5]], y[[0, 5]])
    assert not torch.equal(found[1], y[1])


def test_a_described_rank_may_be_wrong(generator):
    """It chooses the way, and every way takes the true rank from the layer's table."""
    layer = made(40, (24,), {0: (2, 5), 1: (1, 1)}, torch.float32, generator)
    for rank in (1, 99):
        plan = StepPlan(8, SLOTS, "cpu")
        plan.describe(0, rank, resident=True)
        plan.update([0, 1, 0, 0, -1])
        x, y = torch.randn(5, 40, generator=generator), torch.randn(5, 24, generator=generator)
        expected, found = y.clone(), y.clone()
        smoa_delta_reference(expected, x, layer.bank, plan)
        smoa_delta(found, x, layer.bank, plan)
        assert_close(found, expected)


def memory_of(bank: LayerBank, plan: StepPlan) -> tuple[torch.Tensor, ...]:
    """All tables that launches are given."""
    layer, step = bank.attached, plan.attached(StepTables)
    assert isinstance(layer, LayerTables)
    return layer.slices, layer.slots, layer.sorted, layer.numbers, step.counts, step.expand, step.tiled, step.tiles


def test_tables_stay_where_they_are(generator):
    """What a captured graph relies on: other adapters and other steps are written into the same memory."""
    layer = made(40, (24,), {0: (2, 5)}, torch.float32, generator)
    plan = planned(layer.bank, [0, -1, 0], TRITON_COST)
    before = [tensor.data_ptr() for tensor in memory_of(layer.bank, plan)]
    layer.bank.set(
        1, [random_update(random_blocks(24, 4, generator), random_blocks(40, 4, generator), (5,) * 4, generator)]
    )
    layer.bank.clear(0)
    layer.bank.make_resident(1)
    plan.update([1] * 7)
    memory = memory_of(layer.bank, plan)
    assert [tensor.data_ptr() for tensor in memory] == before
    assert_matches_reference(layer.bank, [1, 0, 1, -1], TRITON_COST, generator)


def test_more_blocks_than_a_launch_covers_are_refused(generator):
    layer = random_layer(
        80, (80,), slots=2, max_rank=1, dtype=torch.float32, generator=generator, implementation="triton"
    )
    update = random_update(random_blocks(80, 40, generator), random_blocks(80, 40, generator), (1,) * 40, generator)
    with pytest.raises(ShapeError, match=r"it has 40 blocks; on a GPU at most 32 are allowed"):
        layer.bank.set(0, [update])
    assert layer.bank.slots[0] == (None,)
    assert layer.bank.partition_bytes == 0


def fp8_layer(generator: torch.Generator, implementation: str) -> tuple[LayerBank, torch.Tensor]:
    """A bank over an fp8 weight with a scale per row, and the weight in float32."""
    scales = torch.rand(24, generator=generator) + 0.5
    stored = torch.randn(24, 40, generator=generator).to(torch.float8_e4m3fn)
    bank = LayerBank(
        a=[torch.zeros(SLOTS, 3, 40)], b=[torch.zeros(SLOTS, 3, 24)],
        weight_block=lambda _, rows, cols: stored[rows][:, cols], row_scale=lambda _, rows: scales[rows],
        implementation=implementation,
    )  # fmt: skip
    return bank, stored.float() * scales[:, None]


@every_way
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_fp8_weights_are_dequantized(cost, implementation, generator):
    bank, weight = fp8_layer(generator, implementation)
    update = random_update(random_blocks(24, 3, generator), random_blocks(40, 3, generator), (3, 1, 2), generator)
    bank.set(0, [update])
    if cost is ALWAYS_RESIDENT:
        bank.make_resident(0)
    assert bank.fp8 is (implementation == "triton")
    plan = planned(bank, [0, -1, 0], cost)
    x, y = torch.randn(3, 40, generator=generator), torch.zeros(3, 24)
    smoa_delta(y, x, bank, plan)
    same = update.row_block[:, None] == update.col_block[None, :]
    delta = torch.where(same, (update.b @ update.a) * weight, 0.0)
    assert_close(y[[0, 2]], x[[0, 2]] @ delta.T)


def whole_layer(h_in: int, slices: Sequence[int], rank: int, dtype: torch.dtype, generator: torch.Generator) -> Layer:
    """A layer whose bank keeps the whole weight."""
    layer = random_layer(h_in, slices, slots=SLOTS, max_rank=rank, dtype=dtype, generator=generator)
    bank = LayerBank(
        a=layer.bank.a, b=layer.bank.b, weight_block=lambda index, rows, cols: layer.weights[index][rows][:, cols],
        whole=True, implementation="triton",
    )  # fmt: skip
    return Layer(layer.weights, bank)


@every_dtype
@pytest.mark.parametrize("tokens", [1, 9, 16])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_single_pass_is_base_and_delta(dtype, tokens, biased, generator):
    layer = whole_layer(67, (45, 20), 3, dtype, generator)
    cols = [random_blocks(67, 3, generator) for _ in range(2)]
    rows = [random_blocks(size, 3, generator) for size in (45, 20)]
    cols[0][cols[0] == 2], rows[1][rows[1] == 1] = 9, 7  # columns and rows without a counterpart
    for slot in range(3):
        ranks = tuple((3, 0, 1, 2)[(slot + k) % 4] for k in range(10))
        layer.bank.set(slot, [random_update(rows[i], cols[i], ranks, generator) for i in range(2)])
    bias = torch.randn(65, generator=generator).to(dtype) if biased else None
    for present in ((0, 1, -1, 2, 3), (0, 1, 2, 3)):
        slots = [present[t % len(present)] for t in range(tokens)]
        plan = planned(layer.bank, slots, TRITON_COST)
        x = torch.randn(tokens, 67, generator=generator).to(dtype)
        base = x.float() @ torch.cat(layer.weights).float().T
        expected = (base if bias is None else base + bias.float()).to(dtype)
        smoa_delta_reference(expected, x, layer.bank, plan)
        # The kernel serves tokens of the base too; the op leaves them to the base product, whose bits they keep.
        assert_close(triton_ops.smoa_linear_triton(x, layer.bank, plan, bias), expected)
        assert can_be_one_pass(layer.bank, plan) == (-1 not in slots)
        if can_be_one_pass(layer.bank, plan):
            assert_close(smoa_linear(x, layer.bank, plan, bias), expected)
    assert_matches_reference(layer.bank, [0, -1, 2, 1], TRITON_COST, generator)


def test_the_sorted_weight_is_that_of_the_partition_in_use(generator):
    """One that nobody uses any more is dropped, another one takes its place, and the tables follow."""
    layer, first = whole_layer(40, (24,), 4, torch.float32, generator), None
    plan, x = planned(layer.bank, [0], TRITON_COST), torch.randn(1, 40, generator=generator)
    for seed in range(12):  # more than are retained without a user
        ids = random_blocks(40, 2 + seed % 3, torch.Generator().manual_seed(seed))
        layer.bank.set(0, [random_update(ids[:24], ids, (4,) * 4, generator)])
        first = first or layer.bank.whole_partition(0)
        if can_be_one_pass(layer.bank, plan) and layer.bank.whole_partition(0) is not first:
            expected = x @ layer.weights[0].T
            smoa_delta_reference(expected, x, layer.bank, plan)
            assert_close(smoa_linear(x, layer.bank, plan), expected)
            return
    pytest.fail("the first one stayed")


def test_single_pass_refuses_other_partitions_and_long_steps(generator):
    layer = whole_layer(40, (24,), 2, torch.float32, generator)
    rows, cols = random_blocks(24, 2, generator), random_blocks(40, 2, generator)
    for slot, ranks in {0: (2, 2), 2: (2, 1)}.items():
        layer.bank.set(slot, [random_update(rows, cols, ranks, generator)])
    other = random_update(random_blocks(24, 3, generator), random_blocks(40, 3, generator), (1, 2, 1), generator)
    layer.bank.set(1, [other])
    smoa_linear(torch.zeros(2, 40), layer.bank, planned(layer.bank, [0, 2], TRITON_COST))
    with pytest.raises(ShapeError, match=r"slot 1 has another partition than the sorted weight in slice 0"):
        smoa_linear(torch.zeros(2, 40), layer.bank, planned(layer.bank, [0, 1], TRITON_COST))
    with pytest.raises(ShapeError, match=r"at most 16 tokens"):
        smoa_linear(torch.zeros(17, 40), layer.bank, planned(layer.bank, [0] * 17, TRITON_COST))
