"""How long does a delta take on one layer, beside the base GEMM, the floor and other ways to compute it?"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.delta import baselines
from benchmarks.delta.baselines import EXPAND, LOOP, LORA, LORA_TORCH, MODULATE
from benchmarks.delta.cases import EQUAL, GRIDS, LONG_TOKENS, Case, shapes
from benchmarks.delta.floor import Ceilings, measure_ceilings, works
from benchmarks.delta.layers import DTYPE, build_layers
from benchmarks.delta.step import FORCED_WAYS, Step
from benchmarks.harness import ops, timing
from benchmarks.harness.bars import Bar
from benchmarks.harness.markdown import Columns, bar_table, setup_line, table
from benchmarks.harness.question import Options
from benchmarks.harness.results import Row, of_kind
from benchmarks.harness.timing import MOST_WAITING, Budget

BASE, DENSE, SINGLE_PASS = "base", "dense", "single pass"
BUDGETS = {False: Budget(0.12, 4, 25, patience_s=1.0), True: Budget(0.1, 4, 15, patience_s=1.0)}  # by --quick
DENSE_BUDGET = Budget(seconds_each=1.0, least=3, most=10, patience_s=2.0)
DENSE_TOKENS, DENSE_ADAPTERS = 8, (1, 8)  # where the dense way is measured; it costs the same per adapter elsewhere
Figure = tuple[float, tuple[float, float]]  # the figure, and its lowest and highest value within a round
# Name, figure of a point (None where it is none of the bar's), at least, at most.
Rule = tuple[str, Callable[[Row], Figure | None], float | None, float | None]
WHAT = {"layer": "{layer}", "(r, K)": "({rank}, {blocks})"}
# (tokens, adapters) of the summary.
BATCHES = ((1, 1), (8, 8), (64, 1), (64, 8), (64, 64), (256, 8), (256, 64), (256, 256), (4096, 1), (4096, 64))


def cases(options: Options) -> list[tuple[int, list[Case]]]:
    grid = GRIDS[options.device, options.quick]
    return [
        (grid.slots, list(grid.cases(shape, rank, blocks)))
        for shape in shapes(options.layers or grid.layers)
        for rank, blocks in grid.configurations
    ]


def measure(chosen: Sequence[tuple[int, Sequence[Case]]], options: Options) -> list[Row]:
    device, ceilings = torch.device(options.device), measure_ceilings(torch.device(options.device))
    own = [name for name in ops.available_implementations(device, DTYPE) if name != "reference"]
    print(f"{ceilings}; implementations {', '.join(own)}")
    shared = {
        "kind": "kernels",
        "device": device.type,
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "ceilings": asdict(ceilings),
    }
    rows = []
    for slots, points in chosen:
        first = points[0]
        sizes = (first.layer, first.rank, first.blocks)
        copies = build_layers(*sizes, slots=slots, implementations=own, device=device)
        for case in points:
            rows.append(shared | _measure_point(Step(case, copies), own, ceilings, BUDGETS[options.quick]))
            print(case.row(), {name: f"{times['median']:,.0f} us" for name, times in rows[-1]["times_us"].items()})
    return rows


def _measure_point(step: Step, own: Sequence[str], ceilings: Ceilings, budget: Budget) -> Row:
    case, device, copies = step.case, step.x.device, len(step.copies)
    deltas = step.deltas(own)
    others, skipped = baselines.plain_calls(step, own[0])
    slow = {}
    if case.workload == EQUAL and case.tokens == DENSE_TOKENS and case.adapters in DENSE_ADAPTERS:
        slow = {DENSE: baselines.dense(step)}
    step.gate(deltas | others | slow)
    calls = {BASE: step.base(), **deltas, **others, **baselines.lora(step)}
    single_pass = step.single_pass()
    if single_pass is not None:
        step.gate_single_pass(single_pass, deltas[own[0]])
        calls[SINGLE_PASS] = single_pass
    times = timing.measure(calls, copies, device, budget)
    if slow:
        beside = timing.measure(slow | {own[0]: deltas[own[0]]}, copies, device, DENSE_BUDGET)
        times |= {DENSE: beside[DENSE], f"{own[0]} beside {DENSE}": beside[own[0]]}
    else:
        skipped[DENSE] = f"it is measured at {DENSE_TOKENS} tokens; it forms the same matrices at any number"
    return point_row(case, times, own, ceilings) | {"skipped": skipped}


def point_row(case: Case, times: Row, own: Sequence[str], ceilings: Ceilings) -> Row:
    """One point: microseconds, shares of the floor and ratios to the base by candidate; ours, the default one first."""
    work = works(case)
    floors = {name: ceilings.floor_s(one) * 1e6 for name, one in work.items()}
    counterpart = {BASE: BASE, SINGLE_PASS: SINGLE_PASS, **dict.fromkeys(own, "delta")}
    counterpart |= {name: name.removeprefix("triton ") for name in FORCED_WAYS}
    shares = {n: floors[counterpart[n]] / t["median"] for n, t in times.items() if counterpart.get(n) in floors}
    return {
        **case.row(),
        "implementations": list(own),
        "times_us": times,
        "work": {name: asdict(one) for name, one in work.items()},
        "floor_us": {name: round(us, 2) for name, us in floors.items()},
        "floor_over_time": {name: round(share, 4) for name, share in shares.items()},
        "over_base": {n: round(t["median"] / times[BASE]["median"], 4) for n, t in times.items() if n != BASE},
        "waiting": max(times[own[0]]["waiting"], times[BASE]["waiting"]),
    }


def bars(rows: Sequence[Row]) -> list[Bar]:
    if rows[0]["device"] == "cuda":
        return list(_decide(rows, GPU_BARS))
    layers = dict.fromkeys(row["layer"] for row in rows)
    return [bar for layer in layers for bar in _decide([row for row in rows if row["layer"] == layer], CPU_BARS)]


def _decide(rows: Sequence[Row], rules: Sequence[Rule]) -> Iterator[Bar]:
    for name, figure, at_least, at_most in rules:
        found = [(row, figured) for row in rows if (figured := figure(row))]
        if found:
            row, (value, spread) = (max if at_least is None else min)(found, key=lambda pair: pair[1][0])
            where = f"(r, K) = ({row['rank']}, {row['blocks']}), T={row['tokens']}, {row['workload']} {row['adapters']}"
            full_name = f"{name}, worst of {len(found)}: {row['layer']}, {where}"
            yield Bar(full_name, value, at_least, spread, at_most)


def _own(row: Row) -> str:
    return str(row["implementations"][0])


def _ratio(row: Row, name: str, other: str) -> Figure:
    return timing.over(row["times_us"][name], row["times_us"][other])


def _better_plain(row: Row) -> Figure | None:
    found = sorted((_median(row, name), name) for name in (EXPAND, MODULATE) if name in row["times_us"])
    return _ratio(row, found[0][1], _own(row)) if found else None


def _dense(row: Row) -> Figure | None:
    if DENSE not in row["times_us"] or row["adapters"] != 8:
        return None
    return _ratio(row, DENSE, f"{_own(row)} beside {DENSE}")  # from rounds of its own


def _thin(row: Row) -> Figure | None:
    belongs = _all_different(row, 64) and (row["rank"], row["blocks"]) == (16, 8)
    return _ratio(row, _own(row), BASE) if belongs else None


def _floor(way: str) -> Callable[[Row], Figure | None]:
    """Share of the floor that a forced way reaches where it is the one of fewer FLOPs."""

    def figure(row: Row) -> Figure | None:
        name, flops = f"triton {way}", {kind: work["flops"] for kind, work in row["work"].items()}
        if not (name in row["times_us"] and row["workload"] == EQUAL and _large(row) and row["tokens"] >= 32):
            return None
        if flops[way] > min(flops["expand"], flops["modulate"]):
            return None
        share, times = row["floor_over_time"][name], row["times_us"][name]
        values = [share * times["median"] / us for us in times["by_round"].values()]
        return share, (min(values), max(values))

    return figure


def _total(belongs: Callable[[Row], bool]) -> Callable[[Row], Figure | None]:
    """Base and delta over the base: in a single pass where one was measured."""

    def figure(row: Row) -> Figure | None:
        if row["workload"] != EQUAL or not belongs(row):
            return None
        if SINGLE_PASS in row["times_us"]:
            return _ratio(row, SINGLE_PASS, BASE)
        ratio, (low, high) = _ratio(row, _own(row), BASE)
        return 1 + ratio, (1 + low, 1 + high)

    return figure


def _all_different(row: Row, most_tokens: int) -> bool:
    return bool(row["workload"] == EQUAL and row["adapters"] == row["tokens"] <= most_tokens)


def _decode(most_tokens: int, *configurations: tuple[int, int]) -> Callable[[Row], bool]:
    def belongs(row: Row) -> bool:
        return _all_different(row, most_tokens) and _large(row) and (row["rank"], row["blocks"]) in configurations

    return belongs


def _large(row: Row) -> bool:
    return bool(row["h_in"] * sum(row["slices"]) >= 4096 * 4096)


def _prefill(blocks: int) -> Callable[[Row], bool]:
    return lambda row: _large(row) and (row["tokens"], row["adapters"], row["blocks"]) == (LONG_TOKENS, 1, blocks)


CPU_BARS: list[Rule] = [
    ("the better of plain bmm expand and modulate / delta", _better_plain, 1.0, None),
    ("dense dW per forward / delta", _dense, 20.0, None),
    ("delta / base GEMM", _thin, None, 0.6),
]
GPU_BARS: list[Rule] = [
    ("floor / expand", _floor("expand"), 0.70, None),
    ("floor / modulate", _floor("modulate"), 0.70, None),
    ("single pass / base at (32, 2)", _total(_decode(16, (32, 2))), None, 1.25),
    ("base and delta / base at (16, 4) and (32, 8)", _total(_decode(64, (16, 4), (32, 8))), None, 1.15),
    *((f"base and delta / base, prefill of one adapter, K={blocks}", _total(_prefill(blocks)), None, most)
      for blocks, most in ((2, 1.6), (4, 1.3), (8, 1.18))),
    ("base and delta / base without adapters", _total(lambda row: row["adapters"] == 0), None, 1.01),
]  # fmt: skip


def section(rows: Sequence[Row]) -> str:
    points = of_kind(rows, "kernels")
    equal = [row for row in points if row["workload"] == EQUAL]
    parts = [setup_line(points[-1]), _ceilings_line(points)]
    batches = {(t, n): f"{t:,} of {n if n > 1 else 'one'}" for t, n in BATCHES}
    summary = partial(_pivot, equal, WHAT, batches, lambda row: (row["tokens"], row["adapters"]))
    parts.append("The delta's time over the base GEMM's, layers H_in x H_out:\n\n" + summary(_own))
    if any(SINGLE_PASS in row["over_base"] for row in equal):
        words = (
            "Base product and delta in one pass over the weight, over the base GEMM's time (1.00: the delta is free):"
        )
        parts.append(f"{words}\n\n{summary(lambda row: SINGLE_PASS)}")
    for layer in dict.fromkeys(row["layer"] for row in equal):
        here = [row for row in equal if row["layer"] == layer]
        title = f"<summary>{layer}: all {len(here)} points, microseconds</summary>"
        parts.append(f"<details>{title}\n\n{_layer_table(here)}\n\n</details>")
    dense: Columns = {
        **WHAT,
        "T, adapters": "{tokens}, {adapters}",
        "smoa_delta, us": lambda row: _us(row, f"{_own(row)} beside {DENSE}"),
        "dense dW per forward, us": lambda row: _us(row, DENSE),
        "times as long": lambda row: f"{_median(row, DENSE) / _median(row, f'{_own(row)} beside {DENSE}'):.0f}",
    }
    parts.append(table(dense, [row for row in equal if DENSE in row["times_us"]]))
    others = [row for row in points if row["workload"] != EQUAL]
    if others:
        words = f"Other workloads on {others[0]['layer']}, {others[0]['adapters']} slots, over the base GEMM's time:"
        heads = {tokens: f"T={tokens}" for tokens in sorted({row["tokens"] for row in others})}
        kinds = {"(r, K)": WHAT["(r, K)"], "workload": "{workload}"}
        parts.append(f"{words}\n\n{_pivot(others, kinds, heads, lambda row: row['tokens'], _own)}")
    return "\n\n".join([*parts, bar_table(rows)])


def _ceilings_line(rows: Sequence[Row]) -> str:
    speeds = []
    for key, unit, words in (("bytes_per_s", 1e9, "{:.0f} GB/s"), ("flops_per_s", 1e12, "{:.2f} TFLOP/s")):
        values = [row["ceilings"][key] / unit for row in rows]
        speeds.append(" to ".join(dict.fromkeys(words.format(value) for value in (min(values), max(values)))))
    threads = f", {rows[0]['threads']} threads" if rows[0]["device"] == "cpu" else ""
    disturbed = sum(map(_disturbed, rows))
    noted = (
        f" The machine had other work: at {disturbed} of {len(rows)} points (†) a thread waited for a core "
        f"during more than {MOST_WAITING:.0%} of the time."
    )
    return f"Ceilings measured at the start of each run{threads}: {', '.join(speeds)}." + (noted if disturbed else "")


def _pivot(rows: Iterable[Row], what: Columns, columns: Mapping[Any, str], place: Any, name: Any) -> str:
    """Ratios to the base GEMM: a line per `what`, a column per place of a row; of the candidate that `name` gives."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        first = {head: str(cell).format_map(row) for head, cell in what.items()}
        line = lines.setdefault(tuple(first.values()), first | dict.fromkeys(columns.values(), "-"))
        if place(row) in columns and name(row) in row["over_base"]:
            line[columns[place(row)]] = f"{row['over_base'][name(row)]:.2f}"
    return table(
        {head: lambda line, head=head: line[head] for head in (*what, *columns.values())}, list(lines.values())
    )


def _layer_table(rows: Sequence[Row]) -> str:
    """Times in microseconds, share of the floor, and ratios to the base GEMM."""
    own = _own(rows[0])

    def us(*names: str) -> Columns:
        return {names[-1]: lambda row: _us(row, names[0])}

    columns = {
        "(r, K)": WHAT["(r, K)"],
        "T, adapters": lambda row: (
            f"{row['tokens']:,}, {row['adapters'] or 'none'}" + " †" * (row["waiting"] > MOST_WAITING)
        ),
        **us(BASE),
        **{name: column for name in rows[0]["implementations"] for name, column in us(name).items()},
        "spread": lambda row: " to ".join(_us_words(row["times_us"][own][end]) for end in ("lowest", "highest")),
        "floor / time": lambda row: f"{row['floor_over_time'].get(own, float('nan')):.2f}",
        "floor / time of the base": "{floor_over_time[base]:.2f}",
        "over base": lambda row: f"**{row['over_base'][own]:.2f}**",
        **us(SINGLE_PASS, "one pass"),
        **us(EXPAND, "plain expand"),
        **us(MODULATE, "plain modulate"),
        **us(LOOP),
        "LoRA": lambda row: f"{_us(row, LORA_TORCH)} (torch)" if LORA_TORCH in row["times_us"] else _us(row, LORA),
    }
    return table(columns, rows)


def _disturbed(row: Row) -> bool:
    return bool(row["waiting"] > MOST_WAITING)


def _median(row: Row, name: str) -> float:
    return float(row["times_us"][name]["median"])


def _us(row: Row, name: str) -> str:
    return _us_words(_median(row, name)) if name in row["times_us"] else "-"


def _us_words(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
