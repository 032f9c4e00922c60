"""The choice of the way, and the constants measured on a machine."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from smoa_kernels import cost, tuned
from smoa_kernels.backends.cpp import build
from smoa_kernels.backends.cpp.backend import CPP_COST, TILES_COST
from smoa_kernels.cost import (
    ALWAYS_EXPAND,
    ALWAYS_MODULATE,
    ALWAYS_RESIDENT,
    DEFAULT_COST,
    CostModel,
)
from smoa_kernels.tuned import CostFileError, TunedCost, cost_file, device_name, read_costs, store_costs

CPU = torch.device("cpu")
MEASURED = CostModel(form=8.0, form_per_rank=2.0, resident=3.0)


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)
    for remembered in (cost._cost_model, cost._stored):
        remembered.cache_clear()
    yield
    for remembered in (cost._cost_model, cost._stored):
        remembered.cache_clear()


def entry(**changes: object) -> TunedCost:
    values = {
        "device": device_name(CPU),
        "implementation": "torch",
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "form": MEASURED.form,
        "form_per_rank": MEASURED.form_per_rank,
        "resident": MEASURED.resident,
    }
    return TunedCost.model_validate(values | changes)


@pytest.mark.parametrize(
    ("tokens", "rank", "has_resident", "way"),
    [
        # Rows of expand t*r, of modulate t + 8 + 2r, of resident t + 3.
        (1, 4, False, "expand"),
        (5, 4, False, "expand"),
        (6, 4, False, "modulate"),
        (1, 2, True, "expand"),
        (2, 4, True, "resident"),
        (100, 4, True, "resident"),
        (1000, 1, False, "expand"),
        (1, 0, True, "resident"),
    ],
)
def test_the_way_with_the_fewest_rows_is_taken(tokens: int, rank: int, has_resident: bool, way: str) -> None:
    assert MEASURED.way(tokens, rank, has_resident) == way


def test_the_choice_is_the_cheapest_of_synthetic_costs() -> None:
    for tokens in range(1, 60):
        for rank in range(1, 20):
            costs = {"expand": tokens * rank, "modulate": tokens + 8 + 2 * rank, "resident": tokens + 3}
            assert costs[MEASURED.way(tokens, rank, True)] == min(costs.values())
            del costs["resident"]
            assert costs[MEASURED.way(tokens, rank, False)] == min(costs.values())


@pytest.mark.parametrize(
    ("always", "way"), [(ALWAYS_EXPAND, "expand"), (ALWAYS_MODULATE, "modulate"), (ALWAYS_RESIDENT, "resident")]
)
def test_one_way_can_be_forced(always: CostModel, way: str) -> None:
    assert {always.way(tokens, rank, True) for tokens in (1, 7, 8192) for rank in (1, 2, 64)} == {way}


def test_defaults_hold_where_nothing_was_measured() -> None:
    assert cost.cost_model("torch", CPU, torch.bfloat16) is DEFAULT_COST
    assert cost.cost_model("cpp", CPU, torch.float32) is CPP_COST
    assert read_costs(cost_file()) == []


@pytest.mark.parametrize(("tiles", "expected"), [(True, TILES_COST), (False, CPP_COST)])
def test_the_tile_unit_has_constants_of_its_own(
    tiles: bool, expected: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "unavailable_reason", lambda device, dtype: None)
    monkeypatch.setattr(build, "uses_tiles", lambda dtype: tiles)
    assert cost.default_cost("cpp", CPU, torch.bfloat16) is expected
    assert cost.default_cost("torch", CPU, torch.bfloat16) is DEFAULT_COST


def test_measured_constants_come_back() -> None:
    store_costs(cost_file(), [entry(), entry(implementation="cpp", form=1.5)])
    assert cost.cost_model("torch", CPU, torch.bfloat16) == MEASURED
    default = cost.default_cost("cpp", CPU, torch.bfloat16)
    assert cost.cost_model("cpp", CPU, torch.bfloat16) == CostModel(1.5, 2.0, 3.0, default.beside)
    assert cost.cost_model("torch", CPU, torch.bfloat16) is cost.cost_model("torch", CPU, torch.bfloat16)


@pytest.mark.parametrize("other", [{"device": "another"}, {"dtype": "float16"}, {"threads": 77}])
def test_constants_of_another_setup_are_not_taken(other: dict[str, object]) -> None:
    store_costs(cost_file(), [entry(**other)])
    assert cost.cost_model("torch", CPU, torch.bfloat16) is DEFAULT_COST


def test_a_new_measurement_replaces_only_its_own() -> None:
    store_costs(cost_file(), [entry(), entry(device="another")])
    store_costs(cost_file(), [entry(form=1.0)])
    assert {found.device: found.form for found in read_costs(cost_file())} == {device_name(CPU): 1.0, "another": 8.0}
    assert not list(cost_file().parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"version": 2, "entries": []}', "version"),
        ('{"version": 1, "entries": [{"device": "x"}]}', "entries.0.implementation"),
        ('{"version": 1, "entries": [], "more": 1}', "more"),
        (
            '{"version": 1, "entries": [' + entry(form=8.0).model_dump_json().replace("8.0", "-8.0") + "]}",
            "entries.0.form",
        ),
    ],
    ids=["not-json", "version", "missing", "unknown-key", "negative"],
)
def test_a_broken_file_is_named_and_the_defaults_hold(
    content: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    cost_file().parent.mkdir(parents=True)
    cost_file().write_text(content)
    with caplog.at_level(logging.ERROR, "smoa_kernels"):
        assert cost.cost_model("torch", CPU, torch.bfloat16) is DEFAULT_COST
        assert cost.cost_model("cpp", CPU, torch.float32) is CPP_COST
    assert len(caplog.records) == 1
    assert str(cost_file()) in caplog.text
    assert said in caplog.text
    assert "benchmarks tune" in caplog.text
    with pytest.raises(CostFileError, match=r"cost\.json holds no cost constants"):
        store_costs(cost_file(), [entry()])
    assert cost_file().read_text() == content


def test_a_processor_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    monkeypatch.setattr(tuned, "CPU_INFO", tmp_path / "cpuinfo")
    assert device_name(CPU) == "Some CPU"
    monkeypatch.setattr(tuned, "CPU_INFO", tmp_path / "absent")
    assert device_name(CPU)
