"""The comparison of methods: equal parameters, targets of the right kind, and the page it writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import method_report
from benchmarks.method_models import DORA, GRID, HIRA, LORA, METHODS, SHUFFLED, SMOA, Fit, adapt
from benchmarks.method_reach import family_reach, reach_of
from benchmarks.method_tasks import (
    ALIGNED,
    ALPHABET,
    DIALECTS,
    H_IN,
    H_OUT,
    MODULATION,
    REGRESSION_RANK,
    STRENGTH,
    TARGETS,
    VERB_LAST,
    VOWELS,
    llm_like_weight,
    regression,
    sentences,
    target_update,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def layer() -> torch.nn.Module:
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(H_IN, H_OUT, bias=False)})
    model["layer"].weight.data.copy_(llm_like_weight(1))
    return model


def test_methods_have_equally_many_parameters_and_dora_its_magnitudes_on_top() -> None:
    counts = {}
    for method in METHODS:
        adapted = adapt(layer(), Fit(method, REGRESSION_RANK, 0.0, 0, 1), ["layer"])
        counts[method] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    expected = REGRESSION_RANK * (H_OUT + H_IN)
    assert counts == {LORA: expected, DORA: expected + H_OUT, HIRA: expected, SMOA: expected, SHUFFLED: expected}


def test_the_random_order_has_blocks_of_the_same_sizes_elsewhere() -> None:
    spectral, shuffled = (
        adapt(layer(), Fit(method, REGRESSION_RANK, 0.0, 0, 1), ["layer"]).base_model.model["layer"].smoa_row_block
        for method in (SMOA, SHUFFLED)
    )
    assert torch.equal(spectral["default"].bincount(), shuffled["default"].bincount())
    assert not torch.equal(spectral["default"], shuffled["default"])


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_have_the_same_size(kind: str) -> None:
    weight = llm_like_weight(2)
    target = target_update(kind, weight, 2)
    assert float(target.norm() / weight.norm()) == pytest.approx(STRENGTH)


def test_each_family_learns_its_own_target() -> None:
    def error(target: str, method: str) -> float:
        return regression(target, Fit(method, REGRESSION_RANK, 0.1, 200, 1)).error

    assert error(ALIGNED, SMOA) < 0.05 < error(ALIGNED, SHUFFLED)
    assert error(MODULATION, HIRA) < 0.05 < error(MODULATION, LORA)


def test_reach_is_counted() -> None:
    weight = torch.diag(torch.arange(1.0, 9.0))
    one = torch.zeros(8, 8)
    one[2, 3] = 1.0
    found = reach_of(one, weight)
    assert (found.rank, found.directions) == (1 / 8, 1 / 8)
    assert found.effective_rank == pytest.approx(1 / 8)
    whole = reach_of(torch.eye(8), weight)
    assert (whole.rank, whole.directions) == (1.0, 1.0)
    assert whole.effective_rank == pytest.approx(1.0)
    ranks = {str(row["method"]): row["rank"] for row in family_reach(llm_like_weight(0), REGRESSION_RANK, 1)}
    assert ranks[LORA] == REGRESSION_RANK / H_IN
    assert ranks[SMOA] == ranks[HIRA] == 1.0


def test_dialects_use_the_alphabet_and_differ_from_the_base() -> None:
    plain = sentences(None, 1, 400)
    for dialect in DIALECTS:
        assert set(sentences(dialect, 1, 400)) <= set(ALPHABET)
        assert sentences(dialect, 1, 400) != plain
    first = plain.split("\n")[0]
    assert sentences(VOWELS, 1, 400).split("\n")[0] == first.translate(str.maketrans("aeiou", "eioua"))
    words = set(first.rstrip(".").split())
    assert set(sentences(VERB_LAST, 1, 400).split("\n")[0].rstrip(".").split()) == words


def made_up_rows() -> list[dict[str, Any]]:
    reach = {"rank": 0.5, "effective_rank": 0.25, "directions": 0.75}
    rows: list[dict[str, Any]] = [{"kind": "reach", "method": method, **reach} for method in METHODS]
    for kind, tasks in (("regression", TARGETS), ("dialect", DIALECTS)):
        for task in tasks:
            for number, method in enumerate(METHODS):
                errors = [0.1 + number / 100, 0.3 + number / 100]
                rows.append(
                    {
                        "kind": kind,
                        "task": task,
                        "method": method,
                        "parameters": 7,
                        "learning_rate": GRID[number],
                        "errors": errors,
                        "mean": sum(errors) / 2,
                        "spread": 0.1,
                        "reach": reach,
                    }
                )
    return [*rows, {"kind": "base", "loss_of_its_own_dialect": 0.3, **dict.fromkeys(DIALECTS, 5.0)}]


def test_the_page_keeps_its_text_and_gets_new_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "method.md"
    page.write_text(f"before\n{method_report.BEGIN}\nold\n{method_report.END}\nafter\n")
    monkeypatch.setattr(method_report, "PAGE", page)
    monkeypatch.setattr(method_report, "PLOT", tmp_path / "method.png")
    for _ in range(2):
        method_report.write_report(made_up_rows(), 2)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert f"| {SMOA} | 7 | 0.230 ± 0.100 (0.1) |" in text
    assert "0.0100 lower on average, better in 2 of 2 seeds" in text
    assert (tmp_path / "method.png").stat().st_size > 1000


def test_the_written_page_is_the_one_that_ships() -> None:
    text = method_report.PAGE.read_text()
    assert method_report.BEGIN in text
    assert all(f"| {method} |" in text for method in METHODS)
