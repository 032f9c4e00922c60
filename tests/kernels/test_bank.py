from dataclasses import replace

import pytest
import torch
from smoa_kernels import LayerBank, ShapeError, SlotError
from smoa_kernels.testing import random_blocks, random_layer, random_update


@pytest.fixture
def layer(generator):
    return random_layer(12, (10, 6), slots=3, max_rank=4, dtype=torch.float32, generator=generator)


@pytest.fixture
def updates(generator):
    cols = random_blocks(12, 2, generator)
    return [random_update(random_blocks(size, 2, generator), cols, (2, 1), generator, scaling=0.5) for size in (10, 6)]


def test_factors_are_stored_in_sorted_order_with_scaling_in_b(layer, updates):
    bank = layer.bank
    bank.set(1, updates)
    entry = bank.slots[1][0]
    assert entry is not None
    assert entry.rank == 2
    assert torch.equal(bank.a[0][1, :2], updates[0].a[:, entry.partition.col_order])
    assert torch.equal(bank.b[0][1, :2], 0.5 * updates[0].b.T[:, entry.partition.row_order])


def test_blocks_are_those_of_the_base_weight(layer, updates):
    layer.bank.set(0, updates)
    partition = layer.bank.slots[0][1].partition
    for k, block in enumerate(partition.blocks):
        rows = partition.row_order[block.row_start : block.row_end]
        cols = partition.col_order[block.col_start : block.col_end]
        assert torch.equal(partition.store.block(k), layer.weights[1][rows][:, cols])


def test_storage_may_be_a_view_of_foreign_memory(generator):
    # As in vLLM: A is [S, 1, R, H_in], B is [S, 1, H_out, R], reinterpreted.
    a, b = torch.full((2, 1, 4, 12), 7.0), torch.full((2, 1, 10, 4), 7.0)
    bank = LayerBank(
        a=[a.view(2, 4, 12)], b=[b.view(2, 4, 10)], weight_block=lambda _, rows, cols: torch.ones(len(rows), len(cols))
    )
    update = random_update(random_blocks(10, 2, generator), random_blocks(12, 2, generator), (1, 1), generator)
    bank.set(1, [update])
    assert torch.equal(a[0], torch.full((1, 4, 12), 7.0))  # the other slot is not ours
    assert torch.equal(a[1, 0, 0], update.a[0, bank.slots[1][0].partition.col_order])
    assert not a[1, 0, 1:].any()


def test_weight_is_fetched_once_per_block_of_a_partition(generator, updates):
    fetched: list[tuple[int, int, int]] = []

    def fetch(index, rows, cols):
        fetched.append((index, len(rows), len(cols)))
        return torch.ones(len(rows), len(cols))

    bank = LayerBank(
        a=[torch.zeros(3, 4, 12) for _ in range(2)], b=[torch.zeros(3, 4, size) for size in (10, 6)], weight_block=fetch
    )
    bank.set(0, updates)
    bank.set(2, updates)
    bank.clear(0)
    bank.clear(2)
    bank.set(1, updates)
    assert fetched == [(0, 5, 6), (0, 5, 6), (1, 3, 6), (1, 3, 6)]


def test_unused_partitions_are_dropped_beyond_the_limit(generator):
    bank = LayerBank(
        a=[torch.zeros(1, 4, 12)],
        b=[torch.zeros(1, 4, 10)],
        weight_block=lambda _, rows, cols: torch.ones(len(rows), len(cols)),
        retain_partitions=0,
    )
    assert bank.partition_bytes == 0
    for num_blocks in (1, 2, 5):
        cols = random_blocks(12, num_blocks, generator)
        bank.set(0, [random_update(random_blocks(10, num_blocks, generator), cols, [1] * num_blocks, generator)])
        used = bank.slots[0][0].partition.nbytes
        assert bank.partition_bytes == used
    bank.clear(0)
    assert bank.partition_bytes == 0


def test_clear_empties_slot_and_storage(layer, updates):
    layer.bank.set(1, updates)
    version = layer.bank.version
    layer.bank.clear(1)
    assert layer.bank.slots[1] == (None, None)
    assert not any(storage[1].any() for storage in (*layer.bank.a, *layer.bank.b))
    assert layer.bank.version > version


def test_replacing_leaves_nothing_of_the_old_update(layer, updates, generator):
    layer.bank.set(1, updates)
    small = random_update(updates[0].row_block, updates[0].col_block, (1, 1), generator)
    layer.bank.set(1, [small, None])
    assert not layer.bank.a[0][1, 1:].any()
    assert not layer.bank.b[1][1].any()
    assert layer.bank.slots[1][1] is None


def test_a_failing_fetch_leaves_the_slot_as_it_was(layer, updates, generator):
    bank = layer.bank
    bank.set(1, updates)
    before, held = bank.a[0].clone(), bank.slots[1]
    bank._source._weight_block = lambda index, rows, cols: torch.ones(1, 1)
    other = random_update(random_blocks(6, 3, generator), random_blocks(12, 3, generator), (1, 1, 1), generator)
    with pytest.raises(ShapeError, match="weight_block of slice 1"):
        bank.set(1, [updates[0], other])
    assert torch.equal(bank.a[0], before)
    assert bank.slots[1] == held
    assert held[0].partition.users == 1


def test_a_refused_update_names_every_reason(layer, updates):
    bad = [
        replace(updates[0], a=torch.ones(5, 12), b=torch.ones(9, 5), row_block=updates[0].row_block.int()),
        replace(updates[1], a=torch.ones(2, 12, dtype=torch.int32), col_block=updates[1].col_block[:3]),
    ]
    with pytest.raises(ShapeError) as caught:
        layer.bank.set(0, bad)
    message = str(caught.value)
    for part in ("slice 0: b is (9, 5)", "rank 5 is above 4", "torch.int32; allowed", "slice 1: col_block is (3,)"):
        assert part in message
    assert len(caught.value.reasons) == 5


def test_the_number_of_updates_must_be_that_of_the_slices(layer, updates):
    with pytest.raises(ShapeError, match="there are 1 updates; the layer has 2 slices"):
        layer.bank.set(0, updates[:1])


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_does_not_exist_is_refused(layer, updates, slot):
    with pytest.raises(SlotError, match="slots 0 to 2"):
        layer.bank.set(slot, updates)
    with pytest.raises(SlotError, match="slots 0 to 2"):
        layer.bank.clear(slot)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "0 a and 0 b"),
        ([torch.zeros(2, 4, 12)], [], "1 a and 0 b"),
        ([torch.zeros(2, 12)], [torch.zeros(2, 4, 10)], r"a\[0\] is \(2, 12\)"),
        ([torch.zeros(2, 4, 12)], [torch.zeros(2, 3, 10)], r"b\[0\] is \(2, 3, 10\)"),
        ([torch.zeros(2, 4, 12)], [torch.zeros(2, 4, 10).half()], "float16"),
        ([torch.zeros(2, 4, 12).double()], [torch.zeros(2, 4, 10).double()], "float64"),
        ([torch.zeros(2, 12, 4).transpose(1, 2)], [torch.zeros(2, 4, 10)], "not contiguous"),
    ],
    ids=["none", "uneven", "2-D", "rank", "mixed dtype", "float64", "strided"],
)
def test_storage_that_does_not_fit_is_refused(a, b, message):
    with pytest.raises(ShapeError, match=message):
        LayerBank(a=a, b=b, weight_block=lambda index, rows, cols: torch.ones(len(rows), len(cols)))


def test_an_owner_who_never_comes_back_leaves_nothing(layer, updates):
    bank = layer.bank
    bank.set(0, updates)
    bank.own(0, "first")
    bank.set(1, updates)
    bank.own(1, "second")
    bank.clear(0)
    bank.forget("first")
    assert bank.num_partitions == 2, "the second owner uses them"
    bank.clear(1)
    assert bank.num_partitions == 2, "kept for the second owner to come back"
    bank.forget("first")
    assert bank.num_partitions == 2
    bank.forget("second")
    assert (bank.num_partitions, bank.partition_bytes) == (0, 0)


def test_an_owner_is_remembered_while_his_blocks_are_kept(layer, updates):
    bank = layer.bank
    bank.set(0, updates)
    bank.own(0, "first")
    bank.clear(0)
    bank.set(2, updates)
    bank.own(2, "second")
    bank.clear(2)
    bank.forget("second")
    assert bank.num_partitions == 2, "the first owner may come back"
    bank.forget("first")
    assert bank.num_partitions == 0
