"""The kernels' benchmark from end to end on a tiny layer, and that wrong results stop it before any timing."""

from pathlib import Path

import pytest
import torch
from smoa_kernels.backend import BUILT_IN
from smoa_kernels.tuned import cost_file, read_costs

from benchmarks.kernels import candidates, cases, lora, plain, run, timing, tune
from benchmarks.kernels.cases import Case, Grid, LayerShape
from benchmarks.kernels.layers import build_layers
from benchmarks.kernels.timing import Budget, measure

SHAPE = LayerShape("tiny", 32, (48, 16))
SHORT = Budget(seconds_each=0.0, least=2, most=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grid = Grid(
        layers=("tiny",),
        configurations=((16, 8),),
        tokens=(8,),
        adapters=(1,),
        long_tokens=None,
        workload_layer="tiny",
        workload_tokens=(5,),
        workload_configurations=((16, 8),),
        slots=8,
        bare_tokens=(3,),
    )
    monkeypatch.setitem(cases.SHAPES, "tiny", SHAPE)
    monkeypatch.setattr(run, "grid", lambda device, quick: grid)
    monkeypatch.setattr(run, "measure_ceilings", lambda device: ceilings())
    monkeypatch.setattr(lora, "vllm_missing", lambda: "not in this test")
    for module, names in ((run, ("BUDGET", "DENSE_BUDGET")), (tune, ("BUDGET",))):
        for name in names:
            monkeypatch.setattr(module, name, SHORT)
    monkeypatch.setattr(tune, "CONFIGURATIONS", ((16, 8),))
    monkeypatch.setattr(tune, "GROUP_TOKENS", (1, 8))
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)


def ceilings() -> run.Ceilings:
    return run.Ceilings(30e9, 0.4e12)


def test_every_point_has_its_candidates() -> None:
    rows, bars = run.run(quick=False, device="cpu")
    by_point = {(row["workload"], row["tokens"], row["adapters"]): row for row in rows}
    assert len(by_point) == len(rows) == 8
    eight = by_point["equal", 8, 8]
    own = eight["implementations"]
    assert isinstance(own, list)
    times = eight["times_us"]
    assert isinstance(times, dict)
    expected = {"base", *own, "bmm expand", "bmm modulate", "loop", "lora (torch)", "dense", f"{own[0]} beside dense"}
    assert set(times) == expected | ({"single pass"} if "cpp" in own else set())
    assert all(figures["lowest"] <= figures["median"] <= figures["highest"] for figures in times.values())
    assert set(by_point["equal", 3, 0]["times_us"]) == {"base", *own}
    assert "dense" in by_point["equal", 3, 0]["skipped"]
    assert [bar.name.split(",")[0] for bar in bars] == [
        "the better of plain bmm expand and modulate / delta",
        "dense dW per forward / delta",
        "delta / base GEMM",
    ]


def test_a_wrong_result_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.expand
    monkeypatch.setattr(plain, "expand", lambda y, *rest: (right(y, *rest), y.mul_(1.5)))
    with pytest.raises(AssertionError, match=r"bmm expand computes another delta for .*'layer': 'tiny'"):
        run.run(quick=False, device="cpu")


def test_each_way_is_forced_and_the_constants_are_stored() -> None:
    rows, bars = tune.run(quick=False, device="cpu", layers=["tiny"])
    assert not bars
    summaries = [row for row in rows if row["kind"] == "tuned"]
    stored = {found.implementation: found for found in read_costs(cost_file())}
    assert {row["implementation"] for row in summaries} == set(stored) <= set(BUILT_IN)
    for row in summaries:
        assert row["constants"] == {name: getattr(stored[row["implementation"]], name) for name in row["constants"]}
        assert row["points"] == 4
    assert all(set(row["times_us"]) == {"expand", "modulate", "resident"} for row in rows if row["kind"] == "way")


def test_all_slots_of_all_copies_hold_the_same_adapters() -> None:
    layers = build_layers(SHAPE, 16, 8, slots=3, implementations=["torch"], device=CPU)
    assert len(layers.copies) > 1
    first, last = layers.copies[0], layers.copies[-1]
    assert first.weight.data_ptr() != last.weight.data_ptr()
    assert torch.equal(first.weight, last.weight)
    assert torch.equal(first.banks["torch"].a[0], last.banks["torch"].a[0])
    assert first.banks["torch"].a[0].data_ptr() != last.banks["torch"].a[0].data_ptr()


def test_a_slow_candidate_takes_part_in_rounds_spread_over_the_run() -> None:
    assert [i for i in range(10) if takes_part(i, 5, 10)] == [0, 2, 4, 6, 8]
    times = measure({"a": lambda i: None, "b": lambda i: None}, 2, CPU, SHORT)
    assert {name: len(found.by_round) for name, found in times.items()} == {"a": 2, "b": 2}


def takes_part(i: int, rounds: int, most: int) -> bool:
    from benchmarks.kernels.timing import _takes_part

    return _takes_part(i, rounds, most)


def test_a_plain_way_that_would_take_too_long_is_named() -> None:
    step = candidates.Step(
        Case(SHAPE, 16, 8, 8, 8), build_layers(SHAPE, 16, 8, slots=8, implementations=["torch"], device=CPU)
    )
    calls, skipped = candidates.plain_calls(step, "torch", run.Ceilings(1e3, 1e3))
    assert set(skipped) == {"bmm expand", "bmm modulate"}
    assert set(calls) == {"loop"}


def test_a_disturbed_call_is_repeated_while_there_is_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([0.0, 9.0, 9.0, 9.0, 9.0, 18.0, 18.0, 18.0])  # before and after each call
    calls: list[int] = []
    monkeypatch.setattr(timing, "_waited_s", lambda: next(waited))
    once = Budget(seconds_each=0.0, least=2, most=2, patience_s=1.0)
    found = measure({"a": calls.append}, 2, CPU, once)["a"]
    # One call to learn its length, then two rounds, the second of which took two tries.
    assert len(calls) == 4
    assert found.waiting == 0.0


def test_without_patience_a_disturbed_call_is_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter(float(i) for i in range(100))
    monkeypatch.setattr(timing, "_waited_s", lambda: next(waited))
    found = measure({"a": lambda i: None}, 2, CPU, SHORT)["a"]
    assert len(found.by_round) == 2
    assert found.row()["waiting"] > timing.MOST_WAITING


def test_the_pressure_counter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu"
    monkeypatch.setattr(timing, "PRESSURE", file)
    assert timing._waited_s() == 0.0
    file.write_text("some avg10=1.00 avg60=0.50 avg300=0.10 total=2500000\nfull avg10=0.00 total=0\n")
    assert timing._waited_s() == 2.5
