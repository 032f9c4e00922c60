"""The kernels' bars: each takes the points it names, and the worst of them decides."""

import pytest

from benchmarks.bars import Bar
from benchmarks.kernels.bars import bars, cpu_bars, gpu_bars
from benchmarks.kernels.cases import SHAPES, Case
from benchmarks.kernels.floor import Ceilings
from benchmarks.kernels.point import Point
from benchmarks.kernels.timing import Times

CEILINGS = Ceilings(4.3e12, 790e12)


def point(
    *, rank: int = 16, blocks: int = 8, tokens: int = 8, adapters: int = 8, own: str = "cpp", **us: float
) -> Point:
    times = {name.replace("_", " "): Times({0: seconds * 1e-6, 1: seconds * 1e-6}) for name, seconds in us.items()}
    case = Case(SHAPES["4096x4096"], rank, blocks, tokens, adapters)
    return Point(case, times, {}, (own,), CEILINGS)


def only(found: list[Bar], words: str) -> Bar:
    (bar,) = (bar for bar in found if bar.name.startswith(words))
    return bar


def test_delta_must_not_be_slower_than_the_better_plain_way_anywhere() -> None:
    fast = point(base=100, cpp=50, bmm_expand=60, bmm_modulate=500)
    slow = point(tokens=64, adapters=64, base=100, cpp=50, bmm_expand=490, bmm_modulate=49)
    assert only(cpu_bars([fast]), "the better").figure == pytest.approx(1.2)
    bar = only(cpu_bars([fast, slow]), "the better")
    assert bar.figure == pytest.approx(0.98)
    assert not bar.reached
    assert "worst of 2: 4096x4096, (r, K) = (16, 8), T=64" in bar.name


def test_a_plain_way_that_was_left_out_does_not_count() -> None:
    assert only(cpu_bars([point(base=100, cpp=50, bmm_expand=60)]), "the better").figure == pytest.approx(1.2)
    assert not [bar for bar in cpu_bars([point(base=100, cpp=50)]) if bar.name.startswith("the better")]


def test_dense_is_compared_with_the_rounds_beside_it() -> None:
    measured = {"base": 100.0, "cpp": 1.0, "dense": 1900.0, "cpp_beside_dense": 100.0}
    bar = only(cpu_bars([point(**measured)]), "dense dW")
    assert bar.figure == pytest.approx(19.0)
    assert not bar.reached
    assert not [b for b in cpu_bars([point(adapters=1, **measured)]) if b.name.startswith("dense")]


def test_the_share_of_the_base_is_for_all_different_tokens_of_one_configuration() -> None:
    points = [
        point(tokens=64, adapters=64, base=100, cpp=61),
        point(tokens=64, adapters=8, base=100, cpp=900),
        point(tokens=256, adapters=256, base=100, cpp=900),
        point(rank=32, tokens=64, adapters=64, base=100, cpp=900),
    ]
    bar = only(cpu_bars(points), "delta / base")
    assert (bar.figure, bar.at_most, bar.reached) == (pytest.approx(0.61), 0.6, False)
    assert "at most 0.60" in bar.line()
    assert only(cpu_bars([point(base=100, cpp=60)]), "delta / base").reached


def test_bars_of_a_cpu_are_judged_layer_by_layer() -> None:
    assert len(bars([point(base=100, cpp=50, bmm_expand=60)] * 2, "cpu")) == 2


def test_gpu_bars_take_the_single_pass_where_it_was_measured() -> None:
    few = {"rank": 32, "blocks": 2, "tokens": 16, "adapters": 16, "own": "triton"}
    apart, together = point(**few, base=100, triton=60), point(**few, base=100, triton=60, single_pass=120)
    assert only(gpu_bars([apart]), "single pass").figure == pytest.approx(1.6)
    assert only(gpu_bars([together]), "single pass").reached


@pytest.mark.parametrize(("blocks", "limit"), [(2, 1.6), (4, 1.3), (8, 1.18)])
def test_prefill_of_one_adapter_has_a_bar_per_number_of_blocks(blocks: int, limit: float) -> None:
    one = point(rank=32, blocks=blocks, tokens=4096, adapters=1, own="triton", base=100, triton=100 * (limit - 0.99))
    bar = only(gpu_bars([one]), "base and delta / base, prefill")
    assert (bar.at_most, bar.reached) == (limit, False)


def test_a_batch_without_adapters_has_a_bar() -> None:
    bar = only(
        gpu_bars([point(tokens=32, adapters=0, own="triton", base=100, triton=2)]), "base and delta / base without"
    )
    assert (bar.figure, bar.reached) == (pytest.approx(1.02), False)


def test_a_way_is_held_to_its_floor_where_it_is_the_better_one() -> None:
    expanding = point(tokens=64, adapters=64, own="triton", base=20, triton=9, triton_expand=9, triton_modulate=9)
    share = expanding.floor_over_time()["triton expand"]
    found = gpu_bars([expanding])
    assert only(found, "floor / expand").figure == pytest.approx(share)
    assert share == pytest.approx(expanding.floors_s()["expand"] / 9e-6)
    assert only(found, "floor / expand").at_least == 0.70
    assert not [bar for bar in found if bar.name.startswith("floor / modulate")]


def test_times_pair_only_rounds_that_both_took_part_in() -> None:
    fast, slow = Times({0: 1.0, 1: 1.0, 2: 4.0, 3: 1.0}), Times({0: 10.0, 2: 20.0})
    assert slow.over(fast) == (15.0, (5.0, 10.0))
