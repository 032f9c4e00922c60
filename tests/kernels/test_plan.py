import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from smoa_kernels import PlanError, StepPlan
from smoa_kernels.plan import TokenGroup


@pytest.fixture
def plan() -> StepPlan:
    return StepPlan(8, 4, "cpu")


def test_running_example_of_the_docstring(plan):
    plan.update([3, -1, 0, 3])
    assert plan.groups == (TokenGroup(3, 0, 2), TokenGroup(0, 2, 3))
    assert plan.token_order[:3].tolist() == [0, 3, 2]
    assert plan.token_to_slot.tolist() == [3, -1, 0, 3, -1, -1, -1, -1]
    assert plan.active


@pytest.mark.parametrize("slots", [[], [-1, -1]], ids=["empty", "no adapter"])
def test_a_batch_without_adapters_is_not_active(plan, slots):
    plan.update([0])
    plan.update(slots)
    assert not plan.active
    assert plan.num_tokens == len(slots)
    assert plan.groups == ()


def test_device_tensors_are_never_reallocated(plan):
    pointers = plan.token_to_slot.data_ptr(), plan.token_order.data_ptr()
    plan.update([1, 2])
    plan.update([0, 0, 0])
    assert (plan.token_to_slot.data_ptr(), plan.token_order.data_ptr()) == pointers
    assert plan.token_to_slot.tolist() == [0, 0, 0, -1, -1, -1, -1, -1]


def test_an_equal_map_keeps_what_was_derived(plan):
    plan.update([1, 2])
    version, first = plan.version, plan.cached("key", object)
    plan.update(np.array([1, 2], dtype=np.int32))
    assert plan.version == version
    assert plan.cached("key", object) is first


def test_another_map_drops_what_was_derived(plan):
    plan.update([1, 2])
    version, first = plan.version, plan.cached("key", object)
    plan.update([1, 2, -1])
    assert plan.version != version
    assert plan.cached("key", object) is not first


def test_versions_of_two_plans_differ(plan):
    other = StepPlan(8, 4, "cpu")
    plan.update([1])
    other.update([1])
    assert plan.version != other.version


def test_the_callers_array_may_change_afterwards(plan):
    slots = np.array([1, 2])
    plan.update(slots)
    slots[:] = 3
    plan.update(slots)
    assert plan.token_to_slot[:2].tolist() == [3, 3]


def test_consecutive_tokens_need_no_gather(plan):
    plan.update([-1, 3, 3, 1])
    x = torch.arange(8.0)[:, None]
    tokens = plan.tokens(plan.groups)
    assert tokens.rows == slice(1, 4)
    assert tokens.take(x).flatten().tolist() == [1, 2, 3]


def test_scattered_tokens_are_gathered_in_the_order_of_the_groups(plan):
    plan.update([2, -1, 1, 2])
    assert plan.tokens(plan.groups).take(torch.arange(8.0)[:, None]).flatten().tolist() == [0, 3, 2]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0] * 9, "max_tokens=8"),
        ([[0], [1]], "one dimension"),
        ([4], "slots from 4 to 4"),
        ([-2, 0], "slots from -2 to 0"),
    ],
    ids=["too long", "2-D", "slot too large", "slot too small"],
)
def test_a_map_that_does_not_fit_is_refused_and_changes_nothing(plan, slots, message):
    plan.update([1])
    with pytest.raises(PlanError, match=message):
        plan.update(slots)
    assert plan.groups == (TokenGroup(1, 0, 1),)


@pytest.mark.parametrize(("tokens", "slots"), [(0, 1), (1, 0)])
def test_a_plan_without_room_is_refused(tokens, slots):
    with pytest.raises(PlanError, match="at least 1"):
        StepPlan(tokens, slots, "cpu")


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-1, 3), max_size=8), st.booleans(), st.lists(st.integers(0, 7), max_size=3)),
        max_size=6,
    )
)
def test_any_series_of_steps_groups_tokens_as_a_dictionary_does(steps):
    plan = StepPlan(8, 4, "cpu")
    for drawn, merged, own in steps:
        slots = [4 if merged and token in own else slot for token, slot in enumerate(drawn)]
        plan.update(slots, merged=merged)
        model = {}
        for token, slot in enumerate(slots):
            if 0 <= slot < 4:
                model.setdefault(slot, []).append(token)
        found = {group.slot: plan.token_order[group.start : group.end].tolist() for group in plan.groups}
        assert list(found.items()) == list(model.items())
        assert plan.active == bool(model)
        assert plan.num_tokens == len(slots)
        visible = [-1 if slot == 4 else slot for slot in slots]
        assert plan.token_to_slot.tolist() == visible + [-1] * (8 - len(slots))
        for group in plan.groups:
            assert plan.tokens([group]).take(torch.arange(8)).tolist() == model[group.slot]
        if merged:
            others = [token for token, slot in enumerate(slots) if slot != 4]
            back = plan.compensation
            compensated = [token for group in back.groups for token in back.order[group.start : group.end].tolist()]
            assert compensated == others
        else:
            assert plan.compensation is None
