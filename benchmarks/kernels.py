"""How long does a delta take on one layer, beside the base GEMM, the floor and other ways to compute it?"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from benchmarks.harness import Bar, Columns, Options, Row, of_kind, ops, table, timing
from benchmarks.harness.results import grouped
from benchmarks.harness.timing import MOST_WAITING, Budget

BASE, DENSE, SINGLE_PASS = "base", "dense", "single pass"
BUDGETS = {False: Budget(0.12, 4, 25, patience_s=1.0), True: Budget(0.1, 4, 15, patience_s=1.0)}  # by --quick
DENSE_BUDGET = Budget(seconds_each=1.0, least=3, most=10, patience_s=2.0)
DENSE_TOKENS, DENSE_ADAPTERS = 8, (1, 8)  # where the dense way is measured; it costs the same per adapter elsewhere
Figure = tuple[float, tuple[float, float]]  # the figure, and its lowest and highest value within a round
PREFILL = {2: 1.6, 4: 1.3, 8: 1.18}  # K → most that base and delta may take, as a multiple of the base
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
    shared: Row = {"kind": "kernels", "device": device.type, "threads": torch.get_num_threads()}
    shared["ceilings"] = asdict(ceilings)
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
    others, slow = baselines.plain_calls(step, own[0]), {}
    if case.workload == EQUAL and case.tokens == DENSE_TOKENS and case.adapters in DENSE_ADAPTERS:
        slow = {DENSE: baselines.dense(step)}
    single_pass = step.single_pass()
    step.gate(deltas | others | slow, single_pass)
    calls = {BASE: step.base(), **deltas, **others, **baselines.lora(step)}
    if single_pass is not None:
        calls[SINGLE_PASS] = single_pass
    times = timing.measure(calls, copies, device, budget)
    if slow:
        beside = timing.measure(slow | {own[0]: deltas[own[0]]}, copies, device, DENSE_BUDGET)
        times |= {DENSE: beside[DENSE], f"{own[0]} beside {DENSE}": beside[own[0]]}
    return point_row(case, times, own, ceilings)


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
    """Each by its worst point: of a CPU layer by layer, of a GPU over all layers."""
    found: dict[tuple[object, ...], list[tuple[Row, Figure]]] = {}
    for row in rows:
        layer = row["layer"] if row["device"] == "cpu" else None
        for name, at_least, at_most, figure in _said(row):
            found.setdefault((layer, name, at_least, at_most), []).append((row, figure))
    made = []
    for (_, name, at_least, at_most), points in found.items():
        row, (value, spread) = (max if at_least is None else min)(points, key=lambda pair: pair[1][0])
        where = f"(r, K) = ({row['rank']}, {row['blocks']}), T={row['tokens']}, {row['workload']} {row['adapters']}"
        made.append(Bar(f"{name}, worst of {len(points)}: {row['layer']}, {where}", value, at_least, spread, at_most))
    return made


def _said(row: Row) -> Iterator[tuple[str, float | None, float | None, Figure]]:
    """What a point has to say to each bar: name, at least, at most, figure."""
    times, own, tokens, adapters = row["times_us"], _own(row), row["tokens"], row["adapters"]
    configuration, equal = (row["rank"], row["blocks"]), row["workload"] == EQUAL
    different = tokens if equal and adapters == tokens else math.inf  # so many tokens, of as many adapters
    if row["device"] == "cpu":
        plain = sorted((_median(row, name), name) for name in (EXPAND, MODULATE) if name in times)
        if plain:
            better = timing.over(times[plain[0][1]], times[own])
            yield "the better of plain bmm expand and modulate / delta", 1.0, None, better
        if DENSE in times and adapters == 8:
            yield "dense dW per forward / delta", 20.0, None, timing.over(times[DENSE], times[f"{own} beside {DENSE}"])
        if different <= 64 and configuration == (16, 8):
            yield "delta / base GEMM", None, 0.6, timing.over(times[own], times[BASE])
        return
    if not equal:
        return
    total, spread = timing.over(times[SINGLE_PASS if SINGLE_PASS in times else own], times[BASE])
    apart = 0 if SINGLE_PASS in times else 1  # then the base's own time comes on top
    whole = (apart + total, (apart + spread[0], apart + spread[1]))
    if adapters == 0:
        yield "base and delta / base without adapters", None, 1.01, whole
    if row["h_in"] * sum(row["slices"]) < 4096 * 4096:
        return
    flops = {kind: work["flops"] for kind, work in row["work"].items()}
    for name in FORCED_WAYS:
        way = name.removeprefix("triton ")
        if name in times and tokens >= 32 and flops[way] == min(flops["expand"], flops["modulate"]):
            share = row["floor_over_time"][name]
            shares = [share * times[name]["median"] / us for us in times[name]["by_round"].values()]
            yield f"floor / {way}", 0.70, None, (share, (min(shares), max(shares)))
    if different <= 16 and configuration == (32, 2):
        yield "single pass / base at (32, 2)", None, 1.25, whole
    if different <= 64 and configuration in ((16, 4), (32, 8)):
        yield "base and delta / base at (16, 4) and (32, 8)", None, 1.15, whole
    if (tokens, adapters) == (LONG_TOKENS, 1) and row["blocks"] in PREFILL:
        name = f"base and delta / base, prefill of one adapter, K={row['blocks']}"
        yield name, None, PREFILL[row["blocks"]], whole


def _own(row: Row) -> str:
    return str(row["implementations"][0])


def section(rows: Sequence[Row]) -> str:
    points = of_kind(rows, "kernels")
    equal = [row for row in points if row["workload"] == EQUAL]
    parts = [_ceilings_line(points)]
    batches = {(t, n): f"{t:,} of {n if n > 1 else 'one'}" for t, n in BATCHES}
    summary = partial(_pivot, equal, WHAT, batches, lambda row: (row["tokens"], row["adapters"]))
    parts.append("The delta's time over the base GEMM's, layers H_in x H_out:\n\n" + summary(_own))
    if any(SINGLE_PASS in row["over_base"] for row in equal):
        words = "Base product and delta in one pass over the weight, over the base GEMM's time (1.00: a free delta):"
        parts.append(f"{words}\n\n{summary(lambda row: SINGLE_PASS)}")
    for layer, here in grouped(equal, "layer").items():
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
    return "\n\n".join(parts)


def _ceilings_line(rows: Sequence[Row]) -> str:
    speeds = []
    for key, unit, words in (("bytes_per_s", 1e9, "{:.0f} GB/s"), ("flops_per_s", 1e12, "{:.2f} TFLOP/s")):
        values = [row["ceilings"][key] / unit for row in rows]
        speeds.append(" to ".join(dict.fromkeys(words.format(value) for value in (min(values), max(values)))))
    threads = f", {rows[0]['threads']} threads" if rows[0]["device"] == "cpu" else ""
    disturbed = sum(map(_disturbed, rows))
    ceilings = f"Ceilings measured at the start of each run{threads}: {', '.join(speeds)}."
    waited = f"(†) a thread waited for a core more than {MOST_WAITING:.0%} of the time."
    return f"{ceilings} At {disturbed} of {len(rows)} points {waited}" if disturbed else ceilings


def _pivot(rows: Iterable[Row], what: Columns, columns: Mapping[Any, str], place: Any, name: Any) -> str:
    """Ratios to the base GEMM: a line per `what`, a column per place of a row; of the candidate that `name` gives."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        first = {head: str(cell).format_map(row) for head, cell in what.items()}
        line = lines.setdefault(tuple(first.values()), first | dict.fromkeys(columns.values(), "-"))
        if place(row) in columns and name(row) in row["over_base"]:
            line[columns[place(row)]] = f"{row['over_base'][name(row)]:.2f}"
    cells: dict[str, Any] = {head: lambda line, head=head: line[head] for head in (*what, *columns.values())}
    return table(cells, list(lines.values()))


def _layer_table(rows: Sequence[Row]) -> str:
    """Times in microseconds, share of the floor, and ratios to the base GEMM."""
    own = _own(rows[0])

    def us(*names: str) -> Columns:
        return {names[-1]: lambda row: _us(row, names[0])}

    columns = {
        "(r, K)": WHAT["(r, K)"],
        "T, adapters": lambda row: f"{row['tokens']:,}, {row['adapters'] or 'none'}{' †' * _disturbed(row)}",
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
