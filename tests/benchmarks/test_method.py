"""The comparison of methods: equal parameters, targets of the right kind, and the page it writes."""

from typing import Any

import pytest
import torch

from benchmarks import learning, method
from benchmarks.harness.machine import facts
from benchmarks.harness.publish import page
from benchmarks.learning import DORA, H_IN, H_OUT, HIRA, LORA, METHODS, REGRESSION_RANK, SHUFFLED, SMOA, Fit, adapt

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layer() -> torch.nn.Module:
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(H_IN, H_OUT, bias=False)})
    model["layer"].weight.data.copy_(learning.llm_like_weight(1))
    return model


def test_methods_have_equally_many_parameters_and_dora_its_magnitudes_on_top() -> None:
    counts = {}
    for name in METHODS:
        adapted = adapt(layer(), Fit(name, REGRESSION_RANK, seed=1), ["layer"])
        counts[name] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    expected = REGRESSION_RANK * (H_OUT + H_IN)
    assert counts == {LORA: expected, DORA: expected + H_OUT, HIRA: expected, SMOA: expected, SHUFFLED: expected}


def test_the_random_order_has_blocks_of_the_same_sizes_elsewhere() -> None:
    spectral, shuffled = (
        adapt(layer(), Fit(name, REGRESSION_RANK, seed=1), ["layer"]).base_model.model["layer"].smoa_row_block
        for name in (SMOA, SHUFFLED)
    )
    assert torch.equal(spectral["default"].bincount(), shuffled["default"].bincount())
    assert not torch.equal(spectral["default"], shuffled["default"])


@pytest.mark.parametrize("kind", learning.TARGETS)
def test_targets_have_the_same_size(kind: str) -> None:
    weight = learning.llm_like_weight(2)
    target = learning.target_update(kind, weight, 2)
    assert float(target.norm() / weight.norm()) == pytest.approx(learning.STRENGTH)


def test_each_family_learns_its_own_target() -> None:
    def error(target: str, name: str) -> float:
        return learning.regression(target, Fit(name, REGRESSION_RANK, 0.1, 200, 1)).error

    assert error(learning.ALIGNED, SMOA) < 0.05 < error(learning.ALIGNED, SHUFFLED)
    assert error(learning.MODULATION, HIRA) < 0.05 < error(learning.MODULATION, LORA)


def test_reach_is_counted() -> None:
    weight = torch.diag(torch.arange(1.0, 9.0))
    one = torch.zeros(8, 8)
    one[2, 3] = 1.0
    found = learning.reach_of(one, weight)
    assert (found["rank"], found["directions"]) == (1 / 8, 1 / 8)
    assert found["effective_rank"] == pytest.approx(1 / 8)
    whole = learning.reach_of(torch.eye(8), weight)
    assert (whole["rank"], whole["directions"]) == (1.0, 1.0)
    assert whole["effective_rank"] == pytest.approx(1.0)
    ranks = {
        name: learning.random_reach(learning.llm_like_weight(0), name, REGRESSION_RANK, 1)["rank"]
        for name in (LORA, SMOA, HIRA)
    }
    assert ranks == {LORA: REGRESSION_RANK / H_IN, SMOA: 1.0, HIRA: 1.0}


def test_dialects_use_the_alphabet_and_differ_from_the_base() -> None:
    plain = learning.sentences(None, 1, 400)
    for dialect in learning.DIALECTS:
        assert set(learning.sentences(dialect, 1, 400)) <= set(learning.ALPHABET)
        assert learning.sentences(dialect, 1, 400) != plain
    first = plain.split("\n")[0]
    assert learning.sentences(learning.VOWELS, 1, 400).split("\n")[0] == first.translate(
        str.maketrans("aeiou", "eioua")
    )
    words = set(first.rstrip(".").split())
    assert set(learning.sentences(learning.VERB_LAST, 1, 400).split("\n")[0].rstrip(".").split()) == words


def made_up_rows() -> list[dict[str, Any]]:
    reach = {"rank": 0.5, "effective_rank": 0.25, "directions": 0.75}
    rows: list[dict[str, Any]] = [{"kind": "reach", "method": name, **reach} for name in METHODS]
    for kind, tasks in (("regression", learning.TARGETS), ("dialect", learning.DIALECTS)):
        for task in tasks:
            for number, name in enumerate(METHODS):
                errors = [0.1 + number / 100, 0.3 + number / 100]
                row = {"kind": kind, "task": task, "method": name, "parameters": 7, "reach": reach, "errors": errors}
                rows.append(row | {"learning_rate": method.GRID[number], "mean": sum(errors) / 2, "spread": 0.1})
    shared = {"time": "2026-01-02T03:04:05", "busy_before": 0.0, **facts()}
    base = {"kind": "base", "loss_of_its_own_dialect": 0.3, **dict.fromkeys(learning.DIALECTS, 5.0)}
    return [shared | row for row in (*rows, base)]


def test_a_result_has_its_tables() -> None:
    text = page("method", made_up_rows())
    assert f"| {SMOA} | 7 | 0.230 ± 0.100 (0.1) |" in text
    assert "0.0100 lower on average, better in 2 of 2 seeds" in text
    assert all(f"| {name} | 50% | 25% | 75% | 25% | 25% |" in text for name in METHODS)
