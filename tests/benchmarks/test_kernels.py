"""Kernels and tune: floors counted by hand, bars by their worst point, a tiny run, gates, timing, the fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from smoa_kernels import CostModel
from smoa_kernels.backend import BUILT_IN
from smoa_kernels.testing import WORKLOADS
from smoa_kernels.tuned import cost_file, read_costs

from benchmarks import kernels, tune
from benchmarks.delta import baselines
from benchmarks.delta.cases import GRIDS, SHAPES, Case, LayerShape, shapes
from benchmarks.delta.floor import Ceilings, Work, works
from benchmarks.delta.layers import build_layers
from benchmarks.harness import timing
from benchmarks.harness.bars import Bar
from benchmarks.harness.machine import facts
from benchmarks.harness.publish import page
from benchmarks.harness.question import Options
from benchmarks.harness.timing import Budget, measure, over, times_row
from smoa_serve.errors import ConfigError

# |W| = 48; r = 4, K = 2, so r_k = 2; two adapters with three tokens each.
LAYER = LayerShape("8x6", 8, (6,))
CASE = Case(LAYER, rank=4, blocks=2, tokens=6, adapters=2)
CEILINGS = Ceilings(4.3e12, 790e12)
TINY = LayerShape("tiny", 32, (48, 16))
SHORT = Budget(seconds_each=0.0, least=2, most=2)
CPU = torch.device("cpu")


def test_the_base_reads_everything_once() -> None:
    assert works(CASE)["base"] == Work(2 * (48 + 6 * 8 + 6 * 6), 2 * 48 * 6)


def test_a_delta_reads_the_blocks_once_and_writes_y_again() -> None:
    # Blocks 48 / 2; x, y twice; A and B of two adapters.
    found, numbers = works(CASE), 24 + 6 * (8 + 2 * 6) + 2 * 2 * (8 + 6)
    assert found["expand"] == Work(2 * numbers, 2 * 48 * (2 / 2) * 6)
    assert found["modulate"] == Work(2 * numbers, 2 * (2 * 24 * 3 + 2 * 2 * 24))
    assert found["delta"].flops == min(found["expand"].flops, found["modulate"].flops)


def test_a_single_pass_reads_the_weight_once() -> None:
    found = works(CASE)
    assert found["single pass"].num_bytes == found["base"].num_bytes + 2 * 2 * 2 * (8 + 6)
    assert found["single pass"].flops == found["base"].flops + found["delta"].flops


@pytest.mark.parametrize(("rank", "blocks", "share"), [(32, 2, 8.0), (16, 4, 1.0), (32, 8, 0.5), (16, 8, 0.25)])
def test_expand_costs_what_the_cost_model_says(rank: int, blocks: int, share: float) -> None:
    found = works(Case(SHAPES["4096x4096"], rank, blocks, 32, 32))
    assert found["expand"].flops == share * found["base"].flops


def test_tokens_without_an_adapter_cost_nothing() -> None:
    assert set(works(Case(LAYER, 4, 2, 6, 0))) == {"base"}
    assert works(Case(LAYER, 4, 2, 6, 1))["delta"].num_bytes > 0


def test_each_token_takes_the_way_of_fewer_flops() -> None:
    # 1 token of r_k = 16 expands for 16 rows and modulates for 17; 64 tokens of one adapter modulate.
    one, many = (works(Case(SHAPES["4096x4096"], 32, 2, tokens, 1)) for tokens in (1, 64))
    assert one["delta"].flops == one["expand"].flops < one["modulate"].flops
    assert many["delta"].flops == many["modulate"].flops < many["expand"].flops


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert ceilings.floor_s(Work(200, 100)) == 2.0
    assert ceilings.floor_s(Work(200, 5000)) == 5.0


def test_the_grid_holds_the_points_of_the_table() -> None:
    cases = list(GRIDS["cpu", False].cases(SHAPES["2048x2048"], 16, 4))
    points = {(case.tokens, case.adapters) for case in cases}
    assert {(1, 1), (8, 8), (64, 64), (256, 8), (256, 256), (4096, 1)} <= points
    assert all(len(case.group_sizes()) == case.adapters for case in cases)
    assert sum(CASE.group_sizes()) == 6
    bare = [case for case in GRIDS["cuda", True].cases(SHAPES["4096x4096"], 16, 4) if case.adapters == 0]
    assert [case.group_sizes() for case in bare] == [[]]


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'77x77' is not known; allowed are 896x896"):
        shapes(["77x77"])


def point(
    *, rank: int = 16, blocks: int = 8, tokens: int = 8, adapters: int = 8, own: str = "cpp", **us: float
) -> dict[str, Any]:
    times = {name.replace("_", " "): times_row({0: (v * 1e-6, 0.0), 1: (v * 1e-6, 0.0)}) for name, v in us.items()}
    case = Case(SHAPES["4096x4096"], rank, blocks, tokens, adapters)
    device = "cuda" if own == "triton" else "cpu"
    return {"kind": "kernels", "device": device, **kernels.point_row(case, times, [own], CEILINGS)}


def only(rows: list[dict[str, Any]], words: str) -> Bar:
    (bar,) = (bar for bar in kernels.bars(rows) if bar.name.startswith(words))
    return bar


def test_delta_must_not_be_slower_than_the_better_plain_way_anywhere() -> None:
    fast = point(base=100, cpp=50, bmm_expand=60, bmm_modulate=500)
    slow = point(tokens=64, adapters=64, base=100, cpp=50, bmm_expand=490, bmm_modulate=49)
    assert only([fast], "the better").figure == pytest.approx(1.2)
    bar = only([fast, slow], "the better")
    assert bar.figure == pytest.approx(0.98)
    assert not bar.reached
    assert "worst of 2: 4096x4096, (r, K) = (16, 8), T=64" in bar.name


def test_a_plain_way_that_was_left_out_does_not_count() -> None:
    assert only([point(base=100, cpp=50, bmm_expand=60)], "the better").figure == pytest.approx(1.2)
    assert not [bar for bar in kernels.bars([point(base=100, cpp=50)]) if bar.name.startswith("the better")]


def test_dense_is_compared_with_the_rounds_beside_it() -> None:
    measured = {"base": 100.0, "cpp": 1.0, "dense": 1900.0, "cpp_beside_dense": 100.0}
    bar = only([point(**measured)], "dense dW")
    assert bar.figure == pytest.approx(19.0)
    assert not bar.reached
    assert not [b for b in kernels.bars([point(adapters=1, **measured)]) if b.name.startswith("dense")]


def test_the_share_of_the_base_is_for_all_different_tokens_of_one_configuration() -> None:
    points = [
        point(tokens=64, adapters=64, base=100, cpp=61),
        point(tokens=64, adapters=8, base=100, cpp=900),
        point(tokens=256, adapters=256, base=100, cpp=900),
        point(rank=32, tokens=64, adapters=64, base=100, cpp=900),
    ]
    bar = only(points, "delta / base")
    assert (bar.figure, bar.at_most, bar.reached) == (pytest.approx(0.61), 0.6, False)
    assert only([point(base=100, cpp=60)], "delta / base").reached


def test_bars_of_a_cpu_are_judged_layer_by_layer() -> None:
    other = {**point(base=100, cpp=50, bmm_expand=60), "layer": "another"}
    assert len(kernels.bars([point(base=100, cpp=50, bmm_expand=60), other])) == 4


def test_gpu_bars_take_the_single_pass_where_it_was_measured() -> None:
    few = {"rank": 32, "blocks": 2, "tokens": 16, "adapters": 16, "own": "triton"}
    apart, together = point(**few, base=100, triton=60), point(**few, base=100, triton=60, single_pass=120)
    assert only([apart], "single pass").figure == pytest.approx(1.6)
    assert only([together], "single pass").reached


@pytest.mark.parametrize(("blocks", "limit"), [(2, 1.6), (4, 1.3), (8, 1.18)])
def test_prefill_of_one_adapter_has_a_bar_per_number_of_blocks(blocks: int, limit: float) -> None:
    one = point(rank=32, blocks=blocks, tokens=4096, adapters=1, own="triton", base=100, triton=100 * (limit - 0.99))
    bar = only([one], "base and delta / base, prefill")
    assert (bar.at_most, bar.reached) == (limit, False)


def test_a_batch_without_adapters_has_a_bar() -> None:
    bar = only([point(tokens=32, adapters=0, own="triton", base=100, triton=2)], "base and delta / base without")
    assert (bar.figure, bar.reached) == (pytest.approx(1.02), False)


def test_a_way_is_held_to_its_floor_where_it_is_the_better_one() -> None:
    expanding = point(tokens=64, adapters=64, own="triton", base=20, triton=9, triton_expand=9, triton_modulate=9)
    share = expanding["floor_over_time"]["triton expand"]
    assert only([expanding], "floor / expand").figure == share
    assert share == pytest.approx(expanding["floor_us"]["expand"] / 9, rel=0.01)
    assert only([expanding], "floor / expand").at_least == 0.70
    assert not [bar for bar in kernels.bars([expanding]) if bar.name.startswith("floor / modulate")]


def test_times_pair_only_rounds_that_both_took_part_in() -> None:
    fast, slow = (times_row({i: (s, 0.0) for i, s in by_round.items()})
                  for by_round in ({0: 1.0, 1: 1.0, 2: 4.0, 3: 1.0}, {0: 10.0, 2: 20.0}))  # fmt: skip
    assert over(slow, fast) == (15.0, (5.0, 10.0))


def test_a_result_has_its_tables() -> None:
    names = {"base": 100.0, "cpp": 25.0, "torch": 90.0, "bmm expand": 80.0, "lora (vllm)": 70.0}
    names |= {"dense": 4000.0, "cpp beside dense": 20.0}
    times = {
        name: times_row({0: (us * 1e-6, 0.0), 1: (us * 1.5e-6, 0.0), 2: (us * 0.5e-6, 0.0)})
        for name, us in names.items()
    }
    cases = [Case(SHAPES["896x4864"], 16, 4, 8, 8)]
    cases += [Case(SHAPES["896x4864"], 16, 4, t, 8, name) for name in WORKLOADS for t in (8, 32)]
    shared = {"what": "kernels", "busy_before": 0.0, "time": "2026-01-02T03:04:05", "device": "cpu", **facts()}
    shared |= {"threads": 2, "ceilings": {"bytes_per_s": 30e9, "flops_per_s": 0.4e12}}
    rows = [{"kind": "kernels", **kernels.point_row(case, times, ["cpp", "torch"], CEILINGS)} for case in cases]
    rows += [Bar("fast enough", 0.7, None, (0.6, 0.8), 0.6).row(), Bar("dense", 30.0, 20.0, (25.0, 40.0)).row()]
    text = page("kernels", [json.loads(json.dumps(shared | row)) for row in rows])
    assert "2 threads: 30 GB/s, 0.40 TFLOP/s" in text
    assert "| 896x4864 | (16, 4) | - | 0.25 | - |" in text
    assert "| (16, 4) | 8, 8 | 100 | 25.0 | 90.0 | 12.5 to 37.5 |" in text
    assert "| **0.25** | - | 80.0 | - | - | 70.0 |" in text
    assert "| 896x4864 | (16, 4) | 8, 8 | 20.0 | 4,000 | 200 |" in text
    assert "| (16, 4) | zipf | 0.25 | 0.25 |" in text
    assert "| fast enough | ≤ 0.60 | 0.70 | 0.60 to 0.80 | **no** |" in text
    assert "| dense | ≥ 20.00 | 30.00 | 25.00 to 40.00 | yes |" in text


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(kernels, "BUDGETS", {False: SHORT})
    monkeypatch.setattr(kernels, "DENSE_BUDGET", SHORT)
    monkeypatch.setattr(tune, "BUDGET", SHORT)
    monkeypatch.setattr(tune, "GROUP_TOKENS", (1, 8))
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device: Ceilings(30e9, 0.4e12))
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)
    return


def run_kernels() -> list[dict[str, Any]]:
    points = [
        Case(TINY, 16, 8, 8, 1),
        Case(TINY, 16, 8, 8, 8),
        Case(TINY, 16, 8, 3, 0),
        Case(TINY, 16, 8, 5, 8, "zipf"),
    ]
    return kernels.measure([(8, points)], Options())


@pytest.mark.usefixtures("short")
def test_every_point_has_its_candidates() -> None:
    rows = run_kernels()
    by_point = {(row["workload"], row["tokens"], row["adapters"]): row for row in rows}
    assert len(by_point) == len(rows) == 4
    eight = by_point["equal", 8, 8]
    own, times = eight["implementations"], eight["times_us"]
    expected = {"base", *own, "bmm expand", "bmm modulate", "loop", "lora (vllm)", "dense", f"{own[0]} beside dense"}
    assert set(times) == expected | ({"single pass"} if "cpp" in own else set())
    assert all(found["lowest"] <= found["median"] <= found["highest"] for found in times.values())
    assert set(by_point["equal", 3, 0]["times_us"]) == {"base", *own}
    assert {bar.name.split(",")[0] for bar in kernels.bars(rows)} == {
        "the better of plain bmm expand and modulate / delta",
        "dense dW per forward / delta",
        "delta / base GEMM",
    }


@pytest.mark.usefixtures("short")
def test_a_wrong_result_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.expand

    def wrong(step: Any) -> Any:
        call = right(step)
        return lambda i: (call(i), step.y.mul_(1.5))

    monkeypatch.setattr(baselines, "expand", wrong)
    with pytest.raises(AssertionError, match=r"bmm expand computes another delta for .*'layer': 'tiny'"):
        run_kernels()


@pytest.mark.usefixtures("short")
def test_each_way_is_forced_and_the_constants_are_stored() -> None:
    rows = tune.measure([(TINY, 16, 8)], Options())
    summaries = [row for row in rows if row["kind"] == "tuned"]
    stored = {found.implementation: found for found in read_costs(cost_file())}
    assert {row["implementation"] for row in summaries} == set(stored) <= set(BUILT_IN)
    for row in summaries:
        assert row["constants"] == {name: getattr(stored[row["implementation"]], name) for name in row["constants"]}
        assert row["points"] == 4
    assert all(set(row["times_us"]) == {"expand", "modulate", "resident"} for row in rows if row["kind"] == "way")


def test_all_slots_of_all_copies_hold_the_same_adapters() -> None:
    first, *_, last = build_layers(TINY, 16, 8, slots=3, implementations=["torch"], device=CPU)
    assert first.weight.data_ptr() != last.weight.data_ptr()
    assert torch.equal(first.weight, last.weight)
    assert torch.equal(first.banks["torch"].a[0], last.banks["torch"].a[0])
    assert first.banks["torch"].a[0].data_ptr() != last.banks["torch"].a[0].data_ptr()


def test_a_slow_candidate_takes_part_in_rounds_spread_over_the_run() -> None:
    assert [i for i in range(10) if timing.takes_part(i, 5, 10)] == [0, 2, 4, 6, 8]
    times = measure({"a": lambda i: None, "b": lambda i: None}, 2, CPU, SHORT)
    assert {name: found["rounds"] for name, found in times.items()} == {"a": 2, "b": 2}


def test_a_disturbed_call_is_repeated_while_there_is_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([0.0, 9.0, 9.0, 9.0, 9.0, 18.0, 18.0, 18.0])  # before and after each call
    calls: list[int] = []
    monkeypatch.setattr(timing, "_waited_s", lambda: next(waited))
    found = measure({"a": calls.append}, 2, CPU, Budget(0.0, 2, 2, patience_s=1.0))["a"]
    # One call to learn its length, then two rounds, the second of which took two tries.
    assert len(calls) == 4
    assert found["waiting"] == 0.0


def test_without_patience_a_disturbed_call_is_kept_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter(float(i) for i in range(100))
    monkeypatch.setattr(timing, "_waited_s", lambda: next(waited))
    found = measure({"a": lambda i: None}, 2, CPU, SHORT)["a"]
    assert found["rounds"] == 2
    assert found["waiting"] > timing.MOST_WAITING


def test_the_pressure_counter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu"
    monkeypatch.setattr(timing, "PRESSURE", file)
    assert timing._waited_s() == 0.0
    file.write_text("some avg10=1.00 avg60=0.50 avg300=0.10 total=2500000\nfull avg10=0.00 total=0\n")
    assert timing._waited_s() == 2.5


TRUTH = CostModel(form=7.0, form_per_rank=2.0, resident=3.0)
START = CostModel(form=60.0, form_per_rank=9.0, resident=44.0)


def samples() -> list[tune.Sample]:
    def times(tokens: int, rank: int) -> dict[Any, float]:
        formed = tokens + TRUTH.form + TRUTH.form_per_rank * rank
        return {"expand": tokens * rank, "modulate": formed, "resident": tokens + TRUTH.resident}

    return [(t, r, times(t, r)) for t in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64) for r in (2, 3, 4, 8, 16)]


def test_the_fit_chooses_as_the_truth_does() -> None:
    found = tune.fit(samples(), START)
    for tokens, rank, _ in samples():
        for held in (True, False):
            assert found.way(tokens, rank, held) == TRUTH.way(tokens, rank, held)


def test_regret_is_the_share_of_time_lost() -> None:
    one: list[tune.Sample] = [(4, 4, {"expand": 3.0, "modulate": 2.0})]
    assert tune.regret(one, START) == pytest.approx(0.5)
    assert tune.regret(one, CostModel(0.0, 0.0, 0.0)) == 0.0
    assert tune.regret(samples(), TRUTH) == 0.0
    assert tune.regret(samples(), START) > 0.1


def test_constants_stay_where_nothing_is_gained() -> None:
    # One rank of one token: no constants could choose better.
    assert tune.fit([(1, 2, {"expand": 1.0, "modulate": 50.0})], START) == START
