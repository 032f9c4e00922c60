"""The bars of the kernels: each names its worst point."""

from collections.abc import Iterable, Sequence

from benchmarks.bars import Bar
from benchmarks.kernels.cases import EQUAL
from benchmarks.kernels.point import BASE, DENSE, EXPAND, FORCED_WAYS, MODULATE, SINGLE_PASS, Point

Figure = tuple[float, tuple[float, float]]  # the figure, and its lowest and highest value within a round
Measured = Iterable[tuple[Point, Figure]]
LARGE = 4096 * 4096  # |W| from which the bars of a GPU hold
# Most that base and delta together may take, as a multiple of the base, in a prefill of one adapter: K → bar.
PREFILL = {2: 1.6, 4: 1.3, 8: 1.18}


def bars(points: Sequence[Point], device_type: str) -> list[Bar]:
    """The bars of a kind of device that these points can decide."""
    if device_type == "cuda":
        return gpu_bars(points)
    layers = dict.fromkeys(point.case.layer.name for point in points)
    return [bar for layer in layers for bar in cpu_bars([p for p in points if p.case.layer.name == layer])]


def cpu_bars(points: Sequence[Point]) -> list[Bar]:
    """Of one layer."""
    wide = [point for point in points if _is(point, tokens=(8,), adapters=8) and DENSE in point.times]
    thin = [point for point in points if _all_different(point, 64) and (point.case.rank, point.case.blocks) == (16, 8)]
    with_plain = [point for point in points if EXPAND in point.times or MODULATE in point.times]
    return [
        *_worst("the better of plain bmm expand and modulate / delta", [(p, plain_figure(p)) for p in with_plain], 1.0),
        *_worst("dense dW per forward / delta", [(p, dense_figure(p)) for p in wide], 20.0),
        *_worst("delta / base GEMM", [(p, p.own.over(p.times[BASE])) for p in thin], at_most=0.6),
    ]


def gpu_bars(points: Sequence[Point]) -> list[Bar]:
    """Of an H200, over all layers that are large enough."""
    large = [point for point in points if point.case.layer.numel >= LARGE]
    found = []
    for name, way in FORCED_WAYS.items():
        shares = [(p, floor_figure(p, name)) for p in large if p.case.tokens >= 32 and _belongs(p, name, way)]
        found += _worst(f"floor / {way}", shares, 0.70)
    decode = [point for point in large if _all_different(point, 64)]
    few = [point for point in decode if point.case.tokens <= 16 and _rank(point, (32, 2))]
    found += _totals("single pass / base at (32, 2)", few, 1.25)
    many = [point for point in decode if _rank(point, (16, 4), (32, 8))]
    found += _totals("base and delta / base at (16, 4) and (32, 8)", many, 1.15)
    for blocks, most in PREFILL.items():
        prefill = [point for point in large if _is(point, (4096,), 1) and point.case.blocks == blocks]
        found += _totals(f"base and delta / base, prefill of one adapter, K={blocks}", prefill, most)
    bare = [point for point in points if _is(point, None, 0)]
    return found + _totals("base and delta / base without adapters", bare, 1.01)


def plain_figure(point: Point) -> Figure:
    """The better plain way's time over ours."""
    plain = min((point.times[n] for n in (EXPAND, MODULATE) if n in point.times), key=lambda times: times.median)
    return plain.over(point.own)


def dense_figure(point: Point) -> Figure:
    """The dense way's time over ours, from rounds of their own."""
    return point.times[DENSE].over(point.times[f"{point.implementations[0]} beside {DENSE}"])


def floor_figure(point: Point, name: str) -> Figure:
    """Share of the floor that a candidate reaches."""
    share, times = point.floor_over_time()[name], point.times[name]
    values = [share * times.median / seconds for seconds in times.by_round.values()]
    return share, (min(values), max(values))


def total_figure(point: Point) -> Figure:
    """Base and delta over the base: in a single pass where one was measured."""
    if SINGLE_PASS in point.times:
        return point.times[SINGLE_PASS].over(point.times[BASE])
    ratio, (low, high) = point.own.over(point.times[BASE])
    return 1 + ratio, (1 + low, 1 + high)


def _totals(name: str, points: Sequence[Point], at_most: float) -> list[Bar]:
    return _worst(name, [(point, total_figure(point)) for point in points], at_most=at_most)


def _worst(name: str, measured: Measured, at_least: float | None = None, at_most: float | None = None) -> list[Bar]:
    """One bar for all these points: the one farthest on the wrong side; none without points."""
    found = list(measured)
    if not found:
        return []
    choose = max if at_least is None else min
    point, (figure, spread) = choose(found, key=lambda pair: pair[1][0])
    case = point.case
    where = (
        f"{case.layer.name}, (r, K) = ({case.rank}, {case.blocks}), T={case.tokens}, {case.workload} {case.adapters}"
    )
    return [Bar(f"{name}, worst of {len(found)}: {where}", figure, at_least, spread, at_most)]


def _is(point: Point, tokens: tuple[int, ...] | None, adapters: int) -> bool:
    case = point.case
    return case.workload == EQUAL and (tokens is None or case.tokens in tokens) and case.adapters == adapters


def _all_different(point: Point, most_tokens: int) -> bool:
    case = point.case
    return case.workload == EQUAL and case.adapters == case.tokens <= most_tokens


def _rank(point: Point, *allowed: tuple[int, int]) -> bool:
    return (point.case.rank, point.case.blocks) in allowed


def _belongs(point: Point, name: str, way: str) -> bool:
    """Whether this is a point for that way: it needs the fewer FLOPs."""
    if point.case.workload != EQUAL or name not in point.times:
        return False
    works = point.works()
    return works[way].flops <= min(works["expand"].flops, works["modulate"].flops)
