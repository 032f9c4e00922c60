"""Resident slots, and a slot whose update the base weight holds."""

import pytest
import torch
from smoa_kernels import ShapeError, SlotError, StepPlan, smoa_delta
from smoa_kernels.errors import PlanError
from smoa_kernels.testing import (
    Layer,
    assert_close,
    cpu_cases,
    dense_delta,
    merge_slot,
    random_blocks,
    random_layer,
    random_update,
)

every_implementation = pytest.mark.parametrize(
    ("implementation", "dtype", "instruction_set"), cpu_cases(), ids=str, indirect=["instruction_set"]
)
SLICES = (33, 20)


def made(implementation: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[Layer, dict[int, list]]:
    """A packed layer whose slot 0 updates both slices (ranks 3, 1, 2), slot 1 the first one (K = 2), slot 2 none."""
    layer = random_layer(
        50, SLICES, slots=4, max_rank=3, dtype=dtype, generator=generator, implementation=implementation
    )
    cols = random_blocks(50, 3, generator)
    both = [random_update(random_blocks(size, 3, generator), cols, (3, 1, 2), generator, 0.7) for size in SLICES]
    rows, columns = random_blocks(SLICES[0], 2, generator), random_blocks(50, 2, generator)
    first = [random_update(rows, columns, (2, 0), generator), None]
    updates = {0: both, 1: first, 2: [None, None]}
    for slot, update in updates.items():
        layer.bank.set(slot, update)
    return layer, updates


def run(layer: Layer, slots: list[int], generator: torch.Generator, merged: bool = False):
    """(x, y before, y after) of one call."""
    plan = StepPlan(len(slots), layer.bank.num_slots, "cpu")
    plan.update(slots, merged)
    x = torch.randn(len(slots), layer.bank.h_in, generator=generator).to(layer.bank.dtype)
    y = torch.randn(len(slots), layer.bank.h_out, generator=generator).to(layer.bank.dtype)
    before = y.clone()
    smoa_delta(y, x, layer.bank, plan)
    return x, before, y


def dense(layer: Layer, updates: list) -> torch.Tensor:
    """[H_out, H_in] fp32 of a packed layer's update."""
    parts = zip(updates, layer.weights, strict=True)
    return torch.cat([torch.zeros(w.shape) if u is None else dense_delta(u, w) for u, w in parts])


@every_implementation
@pytest.mark.parametrize("slots", [[0], [0, 1, -1, 0, 2, 1, 0], [1] * 40 + [0] * 3, [0] * 70], ids=str)
def test_resident_slots_give_the_same_delta(implementation, dtype, slots, generator):
    layer, updates = made(implementation, dtype, generator)
    for slot in (0, 1):
        layer.bank.make_resident(slot)
    x, before, y = run(layer, slots, generator)
    for slot in set(slots):
        tokens = [t for t, s in enumerate(slots) if s == slot]
        if slot < 0 or slot == 2:
            assert torch.equal(y[tokens], before[tokens])
        else:
            assert_close(y[tokens], before[tokens].float() + x[tokens].float() @ dense(layer, updates[slot]).T)


@every_implementation
@pytest.mark.parametrize(
    ("h_in", "slices", "ranks"),
    [(67, (45,), (2, 3, 0, 1)), (40, (24, 9), (8,)), (6, (5,), (1,) * 9), (33, (130, 1), (3, 3)), (1, (1,), (1,))],
    ids=["indivisible, rank 0", "K=1", "K above sizes", "three rows of panels", "single numbers"],
)
@pytest.mark.parametrize("slots", [[1], [0, 1, -1, 2, 2, 1], [2] * 30 + [0]], ids=["one", "mixed", "many"])
def test_odd_sizes_with_some_slots_resident(implementation, dtype, h_in, slices, ranks, slots, generator):
    layer = random_layer(
        h_in, slices, slots=3, max_rank=8, dtype=dtype, generator=generator, implementation=implementation
    )
    cols = random_blocks(h_in, len(ranks), generator)
    rows = [random_blocks(size, len(ranks), generator) for size in slices]
    updates = [[random_update(ids, cols, ranks, generator) for ids in rows] for _ in range(3)]
    for slot, update in enumerate(updates):
        layer.bank.set(slot, update)
    layer.bank.make_resident(1)
    layer.bank.make_resident(2)
    x, before, y = run(layer, slots, generator)
    # All tokens at once: a single one may have few entries, all of them small beside its terms.
    expected = torch.stack(
        [
            before[t].float() + (0 if slot < 0 else dense(layer, updates[slot]) @ x[t].float())
            for t, slot in enumerate(slots)
        ]
    )
    assert_close(y, expected)
    idle = [t for t, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[idle], before[idle])


@every_implementation
def test_what_resident_slots_hold_is_counted_and_given_back(implementation, dtype, generator):
    layer, updates = made(implementation, dtype, generator)
    bank = layer.bank
    held = bank.make_resident(0)
    covered = int((dense(layer, updates[0]) != 0).sum()) * dtype.itemsize
    assert held == bank.resident_bytes(0) >= covered
    assert bank.make_resident(0) == held
    assert bank.make_resident(2) == 0
    bank.drop_resident(0)
    assert bank.resident_bytes(0) == 0
    bank.make_resident(0)
    bank.set(0, updates[1])
    assert bank.resident_bytes(0) == 0


def merge(layer: Layer, slot: int, updates: list) -> torch.Tensor:
    """Merges a slot: the packed base weight with the update in it, as the caller keeps it."""
    weights = [weight.clone() for weight in layer.weights]
    for block in merge_slot(layer.bank, slot):
        weights[block.index][block.rows[:, None], block.cols] = block.after
    merged = torch.cat(weights)
    assert_close(merged, torch.cat(layer.weights).float() + dense(layer, updates))
    return merged


@every_implementation
@pytest.mark.parametrize("merged", [0, 1, 2])
def test_beside_a_merged_slot_every_token_gets_its_own_output(implementation, dtype, merged, generator):
    layer, updates = made(implementation, dtype, generator)
    weight = merge(layer, merged, updates[merged])
    slots = [0, -1, 1, 1, 2, 0, -1, 0, 0, 0, 0, 0]
    plan = StepPlan(len(slots), 4, "cpu")
    plan.update([4 if slot == merged else slot for slot in slots], merged=True)
    x = torch.randn(len(slots), 50, generator=generator).to(dtype)
    y = (x.float() @ weight.float().T).to(dtype)
    own = [t for t, slot in enumerate(slots) if slot == merged]
    untouched = y[own].clone()
    smoa_delta(y, x, layer.bank, plan)
    assert torch.equal(y[own], untouched)
    for t, slot in enumerate(slots):
        update = torch.zeros(sum(SLICES), 50) if slot < 0 else dense(layer, updates[slot])
        assert_close(y[t], x[t].float() @ (torch.cat(layer.weights).float() + update).T)


@every_implementation
def test_the_slot_of_a_merged_adapter_may_be_reused(implementation, dtype, generator):
    layer, updates = made(implementation, dtype, generator)
    weight = merge(layer, 0, updates[0])
    layer.bank.clear(0)
    layer.bank.set(0, updates[1])
    plan = StepPlan(3, 4, "cpu")
    plan.update([4, -1, 0], merged=True)
    x = torch.randn(3, 50, generator=generator).to(dtype)
    y = (x.float() @ weight.float().T).to(dtype)
    smoa_delta(y, x, layer.bank, plan)
    base = torch.cat(layer.weights).float()
    for t, update in enumerate((dense(layer, updates[0]), 0.0, dense(layer, updates[1]))):
        assert_close(y[t], x[t].float() @ (base + update).T)


@every_implementation
def test_after_unmerging_nothing_is_taken_off(implementation, dtype, generator):
    layer, updates = made(implementation, dtype, generator)
    merge(layer, 0, updates[0])
    assert layer.bank.merged_bytes > 0
    layer.bank.drop_merged()
    assert layer.bank.merged_bytes == 0
    _, before, y = run(layer, [-1, -1], generator)
    assert torch.equal(y, before)


@every_implementation
def test_a_step_may_run_on_the_original_weight_while_merged_blocks_are_held(implementation, dtype, generator):
    layer, updates = made(implementation, dtype, generator)
    merge_slot(layer.bank, 0)
    x, before, y = run(layer, [0, -1], generator)
    assert_close(y[0], before[0].float() + x[0].float() @ dense(layer, updates[0]).T)
    assert torch.equal(y[1], before[1])


def test_a_merged_plan_needs_a_bank_that_holds_the_difference(generator):
    layer, _ = made("torch", torch.float32, generator)
    with pytest.raises(ShapeError, match=r"the plan says that an adapter is merged and the bank holds none"):
        run(layer, [0], generator, merged=True)


def test_one_adapter_is_merged_at_a_time(generator):
    layer, _ = made("torch", torch.float32, generator)
    merge_slot(layer.bank, 0)
    with pytest.raises(SlotError, match=r"an adapter is merged already; un-merge it before slot 1 is merged"):
        layer.bank.hold_merged(1, [])
    with pytest.raises(SlotError, match=r"slot 4"):
        layer.bank.hold_merged(4, [])


def test_the_number_of_a_merged_adapter_is_a_slot_only_when_merged():
    plan = StepPlan(4, 2, "cpu")
    plan.update([2, -1, 1], merged=True)
    assert plan.groups[0].slot == 1
    assert plan.compensation is not None
    assert [group.count for group in plan.compensation.groups] == [2]
    with pytest.raises(PlanError, match=r"allowed are -1 \(no adapter\) to 1"):
        plan.update([2, -1, 1])
    plan.update([-1, 1])
    assert plan.compensation is None
