"""The number of blocks out of the shapes of the factors."""

import time

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from smoa_serve.adapters.canonical import Factors, branch_ranks, piece_sizes
from smoa_serve.adapters.config import PublishedConfig

Shapes = dict[str, tuple[int, int]]


def by_trying(config: PublishedConfig, modules: dict[str, Factors], shapes: Shapes) -> list[int]:
    """Every number of blocks that fits, tried one by one."""
    slots = [slot for factors in modules.values() for slot in factors]
    least = max((k for side, k in slots if side == "A"), default=0) + 1
    counts = range(least, max(max(shape) for shape in shapes.values()) + 1)
    return [
        count
        for count in ([config.num_blocks] if config.num_blocks else counts)
        if all(
            k < count and t.numel() == piece_sizes(cols if side == "A" else rows, count)[k]
            for name, (rows, cols) in shapes.items()
            for (side, k), t in modules[name].items()
        )
    ]


@st.composite
def cut_modules(draw: st.DrawFn) -> tuple[dict[str, Factors], Shapes, int]:
    """Factors of one or two layers cut into K blocks, of which some pieces are left out and a length may be wrong."""
    count = draw(st.integers(1, 14))
    sizes = st.integers(1, 40)
    shapes = {name: (draw(sizes), draw(sizes)) for name in draw(st.sampled_from(["a", "ab"]))}
    modules: dict[str, Factors] = {}
    for name, (rows, cols) in shapes.items():
        kept = draw(st.sets(st.integers(0, count - 1), min_size=1))
        wrong = draw(st.sampled_from([0, 0, 0, 1]))
        modules[name] = {("A", k): torch.empty(1, piece_sizes(cols, count)[k] + wrong) for k in kept} | {
            ("B", k): torch.empty(piece_sizes(rows, count)[k], 1) for k in kept
        }
    return modules, shapes, count


@given(cut_modules(), st.booleans())
@example(({"a": {("A", 0): torch.empty(1, 2), ("B", 0): torch.empty(1, 1)}}, {"a": (3, 3)}, 2), False)
def test_blocks_are_told_from_shapes_as_by_trying_every_number(
    cut: tuple[dict[str, Factors], Shapes, int], configured: bool
) -> None:
    modules, shapes, count = cut
    config = PublishedConfig(peft_type="SMOA", lora_alpha=1.0, num_blocks=count if configured else None)
    expected = by_trying(config, modules, shapes)
    ranks, reasons = branch_ranks(config, modules, shapes)
    if len(expected) == 1:
        assert len(ranks) == expected[0]
        assert reasons == []
    else:
        what = f"{expected[0]} and {expected[1]} blocks fit" if expected else "no number of blocks fits"
        assert reasons == [f"{what} the shapes of the factors; give r and num_blocks in the configuration"]
        assert ranks == ()


def test_the_largest_layers_take_no_time() -> None:
    n, count = 2_000_000, 1999  # trying every number takes hours
    sizes = piece_sizes(n, count)
    factors: Factors = {("A", k): torch.empty(1, sizes[k]) for k in range(count)}
    config = PublishedConfig(peft_type="SMOA", lora_alpha=1.0)
    started = time.process_time()
    ranks, reasons = branch_ranks(config, {"a": factors}, {"a": (n, n)})
    assert (ranks, reasons) == ((1,) * count, [])
    assert time.process_time() - started < 20
