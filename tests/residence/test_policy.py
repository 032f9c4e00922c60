"""The automatic policy, on made-up loads."""

import dataclasses
from typing import Any

import pytest
from smoa_kernels import CostModel

from smoa_serve.engine.messages import Residence
from smoa_serve.residence.policy import Load, Others, Policy, PolicySettings, Rates

COST = CostModel(form=5.0, form_per_rank=1.0, resident=4.0)
ALLOWED = PolicySettings(merge=True, resident=True, budget_bytes=1000)


def load(
    name: str = "a",
    residence: str = "slot",
    tokens: float = 8.0,
    alone: float = 0.0,
    alone_steps: float = 0.0,
    **facts: Any,
) -> Load:
    return Load(
        name,
        Residence(residence),
        tokens,
        alone,
        alone_steps,
        **({"rank": 4, "num_blocks": 4, "resident_bytes": 100, "merged_bytes": 500} | facts),
    )


def policy_of(settings: PolicySettings = ALLOWED, *, freely: bool = False) -> Policy:
    return Policy(settings, COST, switches_freely=freely)


def moves(policy: Policy, loads: list[Load], all_tokens: float, intervals: int = 1) -> list[tuple[str, str]]:
    """What is decided in the last of some equal intervals."""
    decisions = [policy.decide(loads, all_tokens) for _ in range(intervals)]
    return [(decision.name, decision.action) for decision in decisions[-1]]


def test_an_adapter_with_nearly_all_tokens_is_merged() -> None:
    assert moves(policy_of(), [load(tokens=15), load("b", tokens=0.5)], 16, 2) == [("a", "merge")]


def test_an_adapter_with_a_fifth_of_the_tokens_becomes_resident() -> None:
    assert moves(policy_of(), [load(tokens=4), load("b", tokens=0.2)], 20, 2) == [("a", "resident")]


def test_merging_is_off_unless_allowed() -> None:
    policy = policy_of(dataclasses.replace(ALLOWED, merge=False))
    assert moves(policy, [load(tokens=16)], 16, 2) == [("a", "resident")]
    policy = policy_of(dataclasses.replace(ALLOWED, merge=False, resident=False))
    assert moves(policy, [load(tokens=16)], 16, 2) == []


def test_a_wish_has_to_stand() -> None:
    policy = policy_of()
    hot, cold = [load(tokens=15)], [load(tokens=0.1)]
    assert moves(policy, hot, 16) == []
    assert moves(policy, cold, 16) == []
    assert moves(policy, hot, 16) == []
    assert moves(policy, hot, 16) == [("a", "merge")]


def test_what_no_longer_pays_goes_down_after_a_while() -> None:
    policy = policy_of()
    loads = [load(residence="merged", tokens=1), load("b", "resident", tokens=0)]
    assert moves(policy, loads, 16, 2) == []
    assert moves(policy, loads, 16) == [("a", "unmerge"), ("b", "slot")]


def test_between_up_and_down_nothing_moves() -> None:
    """A gain that is too small to move for is too large to move back for."""
    policy = policy_of()
    tokens = 13.2
    gain = policy.merge_gain(load(tokens=tokens), 24)
    assert 0 <= gain < ALLOWED.gain
    for where in ("slot", "merged"):
        assert ("a", "merge") not in moves(policy_of(), [load(residence=where, tokens=tokens)], 24, 5)
        assert ("a", "unmerge") not in moves(policy_of(), [load(residence=where, tokens=tokens)], 24, 5)


def test_one_adapter_is_merged_at_a_time() -> None:
    policy = policy_of()
    assert moves(policy, [load(tokens=15), load("b", "merged", tokens=1)], 16, 2) == [("a", "resident")]
    assert moves(policy, [load(tokens=15), load("b", "merged", tokens=1)], 16) == [("b", "unmerge")]


def test_where_others_never_pay_what_counts_are_the_steps_without_others() -> None:
    """Half the tokens, most of them in steps of the adapter's own: merging saves there and costs nowhere."""
    few, many = load(tokens=8, alone=0.1, alone_steps=0.05), load(tokens=8, alone=7, alone_steps=0.5)
    assert policy_of().merge_gain(many, 16) <= 0
    assert policy_of(freely=True).merge_gain(few, 16) < ALLOWED.gain
    allowed = dataclasses.replace(ALLOWED, resident=False)
    assert moves(policy_of(allowed, freely=True), [few], 16, 2) == []
    assert moves(policy_of(allowed, freely=True), [many], 16, 2) == [("a", "merge")]


def test_where_others_never_pay_merged_stays_while_it_saves_anything_worth_it() -> None:
    quiet = load(residence="merged", tokens=8, alone=0.01, alone_steps=0.01)
    busy = load(residence="merged", tokens=8, alone=2, alone_steps=0.2)
    assert moves(policy_of(freely=True), [busy], 16, 5) == []
    assert moves(policy_of(freely=True), [quiet], 16, 3) == [("a", "unmerge")]
    assert moves(policy_of(freely=True), [busy, load("b", tokens=8, alone=7.5, alone_steps=0.5)], 16, 3) == [
        ("a", "unmerge")
    ]


def test_the_budget_holds() -> None:
    policy = policy_of(dataclasses.replace(ALLOWED, merge=False, budget_bytes=250))
    loads = [load("a", tokens=9), load("b", tokens=8), load("c", tokens=7), load("d", "resident", tokens=6)]
    assert moves(policy, loads, 30, 2) == [("a", "resident")]
    policy = policy_of(dataclasses.replace(ALLOWED, budget_bytes=499))
    assert moves(policy, [load(tokens=16)], 16, 2) == [("a", "resident")]


def test_a_decision_says_why() -> None:
    policy = policy_of()
    policy.decide([load(tokens=15)], 16)
    (decision,) = policy.decide([load(tokens=15)], 16)
    assert decision.reason.startswith("94% of 16.0 tokens a step: merged saves ")


def test_rates_follow_the_counters() -> None:
    rates = Rates()
    assert rates.observe(10, {0: 20, 7: 40})
    assert rates.tokens == {0: 2.0, 7: 4.0}
    assert not rates.observe(10, {0: 20, 7: 40})
    assert rates.observe(20, {0: 40, 7: 40, 8: 10})
    assert rates.tokens == {0: 2.0, 7: 2.0, 8: pytest.approx(1.0)}
    assert rates.all == pytest.approx(5.0)
    rates.observe(30, {0: 60})  # the engine forgot an adapter
    assert rates.tokens[7] == 1.0


def test_an_action_that_was_refused_rules_out_no_other() -> None:
    hot = load(tokens=15, refused=frozenset({"merge"}))
    assert moves(policy_of(), [hot], 16, 2) == [("a", "resident")]
    assert moves(policy_of(), [load(tokens=15, refused=frozenset({"merge", "resident"}))], 16, 2) == []
    # And it may still be brought down again.
    idle = load(tokens=0, residence="resident", refused=frozenset({"merge"}))
    assert moves(policy_of(), [idle], 16, 3) == [("a", "slot")]


def test_what_is_pinned_is_not_moved_and_counts_for_what_it_holds() -> None:
    pinned = load("by-hand", tokens=1, residence="resident", resident_bytes=950, movable=False)
    hot = load(tokens=4)
    assert moves(policy_of(), [hot], 20, 2) == [("a", "resident")]
    assert moves(policy_of(), [hot, pinned], 20, 2) == []


def test_beside_an_adapter_that_was_merged_by_hand_no_other_is_merged() -> None:
    merged = load("by-hand", tokens=0, residence="merged", merged_bytes=100, movable=False)
    assert moves(policy_of(), [load(tokens=15), merged], 16, 4) == [("a", "resident")]


def test_revisions_that_end_their_requests_count_for_what_they_hold() -> None:
    policy = policy_of()
    for _ in range(2):
        decided = policy.decide([load(tokens=15)], 16, Others(bytes=100, merged=True))
    assert [decision.action for decision in decided] == ["resident"]
    policy = policy_of()
    for _ in range(2):
        decided = policy.decide([load(tokens=15)], 16, Others(bytes=950))
    assert decided == []
