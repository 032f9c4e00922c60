"""The floor's arithmetic: bytes and FLOPs of each way, counted by hand."""

import pytest

from benchmarks.kernels import floor
from benchmarks.kernels.cases import SHAPES, Case, LayerShape, grid
from benchmarks.kernels.floor import Ceilings, Work
from smoa_serve.errors import ConfigError

# |W| = 48; r = 4, K = 2, so r_k = 2; two adapters with three tokens each.
LAYER = LayerShape("8x6", 8, (6,))
CASE = Case(LAYER, rank=4, blocks=2, tokens=6, adapters=2)


def test_the_base_reads_everything_once() -> None:
    assert floor.base_work(CASE) == Work(2 * (48 + 6 * 8 + 6 * 6), 2 * 48 * 6)


def test_a_delta_reads_the_blocks_once_and_writes_y_again() -> None:
    # Blocks 48 / 2; x, y twice; A and B of two adapters.
    numbers = 24 + 6 * (8 + 2 * 6) + 2 * 2 * (8 + 6)
    assert floor.expand_work(CASE) == Work(2 * numbers, 2 * 48 * (2 / 2) * 6)
    assert floor.modulate_work(CASE) == Work(2 * numbers, 2 * (2 * 24 * 3 + 2 * 2 * 24))
    assert floor.delta_work(CASE).flops == min(floor.expand_work(CASE).flops, floor.modulate_work(CASE).flops)


def test_resident_reads_each_adapters_own_blocks() -> None:
    assert floor.resident_work(CASE) == Work(2 * (2 * 24 + 6 * (8 + 12)), 2 * 24 * 6)


def test_a_single_pass_reads_the_weight_once() -> None:
    work = floor.single_pass_work(CASE)
    assert work.num_bytes == floor.base_work(CASE).num_bytes + 2 * 2 * 2 * (8 + 6)
    assert work.flops == floor.base_work(CASE).flops + floor.delta_work(CASE).flops


@pytest.mark.parametrize(("rank", "blocks", "share"), [(32, 2, 8.0), (16, 4, 1.0), (32, 8, 0.5), (16, 8, 0.25)])
def test_expand_costs_what_the_cost_model_says(rank: int, blocks: int, share: float) -> None:
    case = Case(SHAPES["4096x4096"], rank, blocks, 32, 32)
    assert floor.expand_work(case).flops == share * floor.base_work(case).flops


def test_tokens_without_an_adapter_cost_nothing() -> None:
    assert floor.delta_work(Case(LAYER, 4, 2, 6, 0)) == Work(0, 0)
    assert floor.delta_work(Case(LAYER, 4, 2, 6, 1)).num_bytes > 0


def test_each_token_takes_the_way_of_fewer_flops() -> None:
    # 1 token of r_k = 16 expands for 16 rows and modulates for 17; 64 tokens of one adapter modulate.
    one, many = (Case(SHAPES["4096x4096"], 32, 2, tokens, 1) for tokens in (1, 64))
    assert floor.delta_work(one).flops == floor.expand_work(one).flops < floor.modulate_work(one).flops
    assert floor.delta_work(many).flops == floor.modulate_work(many).flops < floor.expand_work(many).flops


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert ceilings.floor_s(Work(200, 100)) == 2.0
    assert ceilings.floor_s(Work(200, 5000)) == 5.0
    assert Work(200, 100).intensity == 0.5


def test_the_grid_holds_the_points_of_the_table() -> None:
    cases = list(grid("cpu", quick=False).cases(SHAPES["2048x2048"], 16, 4))
    points = {(case.tokens, case.adapters) for case in cases}
    assert {(1, 1), (8, 8), (64, 64), (256, 8), (256, 256), (4096, 1)} <= points
    assert all(len(case.group_sizes()) == case.adapters for case in cases)
    assert sum(CASE.group_sizes()) == 6
    bare = [case for case in grid("cuda", quick=True).cases(SHAPES["4096x4096"], 16, 4) if case.adapters == 0]
    assert [case.group_sizes() for case in bare] == [[]]


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'77x77' is not known; allowed are 896x896"):
        grid("cpu", quick=True).shapes(["77x77"])
