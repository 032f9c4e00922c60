"""How long does a delta take on one layer, beside the base GEMM, the floor and other ways to compute it?"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
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
LARGE = 4096 * 4096  # |W| from which the bars of a GPU hold
# Most that base and delta together may take, as a multiple of the base, in a prefill of one adapter: K → bar.
PREFILL = {2: 1.6, 4: 1.3, 8: 1.18}
WHAT = {"layer": "{layer}", "(r, K)": "({rank}, {blocks})"}
# (tokens, adapters) of the summary.
BATCHES = ((1, 1), (8, 8), (64, 1), (64, 8), (64, 64), (256, 8), (256, 64), (256, 256), (4096, 1), (4096, 64))


def cases(options: Options) -> list[tuple[int, list[Case]]]:
    """(slots, points) of each layer and (r, K)."""
    grid = GRIDS[options.device, options.quick]
    return [
        (grid.slots, list(grid.cases(shape, rank, blocks)))
        for shape in shapes(options.layers or grid.layers)
        for rank, blocks in grid.configurations
    ]


def measure(chosen: Sequence[tuple[int, Sequence[Case]]], options: Options) -> list[Row]:
    """A row per point."""
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
            print(_words(rows[-1]))
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


def _words(row: Row) -> str:
    times = ", ".join(f"{name} {one['median']:,.0f}" for name, one in row["times_us"].items())
    waited = f"; {row['waiting']:.0%} of the time a thread waited for a core" if row["waiting"] > MOST_WAITING else ""
    what = f"{row['layer']} ({row['rank']}, {row['blocks']}) T={row['tokens']} {row['workload']} {row['adapters']}"
    return f"{what}: us: {times}{waited}"


def bars(rows: Sequence[Row]) -> list[Bar]:
    """The bars that these points can decide: of a CPU layer by layer, of a GPU over all that are large enough."""
    if any(row["device"] == "cuda" for row in rows):
        return gpu_bars(rows)
    layers = dict.fromkeys(row["layer"] for row in rows)
    return [bar for layer in layers for bar in cpu_bars([row for row in rows if row["layer"] == layer])]


def cpu_bars(rows: Sequence[Row]) -> list[Bar]:
    """Of one layer."""
    wide = [row for row in rows if _is(row, 8, 8) and DENSE in row["times_us"]]
    thin = [row for row in rows if _all_different(row, 64) and (row["rank"], row["blocks"]) == (16, 8)]
    with_plain = [row for row in rows if {EXPAND, MODULATE} & set(row["times_us"])]
    faster = [(row, _ratio(row, _better_plain(row), _own(row))) for row in with_plain]
    dense = [(row, _ratio(row, DENSE, f"{_own(row)} beside {DENSE}")) for row in wide]
    return [
        *_worst("the better of plain bmm expand and modulate / delta", faster, 1.0),
        *_worst("dense dW per forward / delta", dense, 20.0),
        *_worst("delta / base GEMM", [(row, _ratio(row, _own(row), BASE)) for row in thin], at_most=0.6),
    ]


def gpu_bars(rows: Sequence[Row]) -> list[Bar]:
    """Of an H200."""
    large = [row for row in rows if row["h_in"] * sum(row["slices"]) >= LARGE]
    found = []
    for name in FORCED_WAYS:
        way = name.removeprefix("triton ")
        shares = [(row, _share(row, name)) for row in large if row["tokens"] >= 32 and _belongs(row, name, way)]
        found += _worst(f"floor / {way}", shares, 0.70)
    decode = [row for row in large if _all_different(row, 64)]
    few = [row for row in decode if row["tokens"] <= 16 and (row["rank"], row["blocks"]) == (32, 2)]
    found += _totals("single pass / base at (32, 2)", few, 1.25)
    many = [row for row in decode if (row["rank"], row["blocks"]) in ((16, 4), (32, 8))]
    found += _totals("base and delta / base at (16, 4) and (32, 8)", many, 1.15)
    for blocks, most in PREFILL.items():
        prefill = [row for row in large if _is(row, LONG_TOKENS, 1) and row["blocks"] == blocks]
        found += _totals(f"base and delta / base, prefill of one adapter, K={blocks}", prefill, most)
    bare = [row for row in rows if row["workload"] == EQUAL and row["adapters"] == 0]
    return found + _totals("base and delta / base without adapters", bare, 1.01)


def _own(row: Row) -> str:
    return str(row["implementations"][0])


def _ratio(row: Row, name: str, other: str) -> Figure:
    return timing.over(row["times_us"][name], row["times_us"][other])


def _better_plain(row: Row) -> str:
    found = (name for name in (EXPAND, MODULATE) if name in row["times_us"])
    return min(found, key=lambda name: float(row["times_us"][name]["median"]))


def _share(row: Row, name: str) -> Figure:
    """Of the floor that a candidate reaches."""
    share, times = row["floor_over_time"][name], row["times_us"][name]
    values = [share * times["median"] / us for us in times["by_round"].values()]
    return share, (min(values), max(values))


def _totals(name: str, rows: Sequence[Row], at_most: float) -> list[Bar]:
    """Base and delta over the base: in a single pass where one was measured."""
    found = []
    for row in rows:
        if SINGLE_PASS in row["times_us"]:
            found.append((row, _ratio(row, SINGLE_PASS, BASE)))
        else:
            ratio, (low, high) = _ratio(row, _own(row), BASE)
            found.append((row, (1 + ratio, (1 + low, 1 + high))))
    return _worst(name, found, at_most=at_most)


def _worst(
    name: str, found: Sequence[tuple[Row, Figure]], at_least: float | None = None, at_most: float | None = None
) -> list[Bar]:
    """One bar for all these points: the one farthest on the wrong side; none without points."""
    if not found:
        return []
    choose = max if at_least is None else min
    row, (figure, spread) = choose(found, key=lambda pair: pair[1][0])
    where = f"(r, K) = ({row['rank']}, {row['blocks']}), T={row['tokens']}, {row['workload']} {row['adapters']}"
    return [Bar(f"{name}, worst of {len(found)}: {row['layer']}, {where}", figure, at_least, spread, at_most)]


def _is(row: Row, tokens: int, adapters: int) -> bool:
    return bool((row["workload"], row["tokens"], row["adapters"]) == (EQUAL, tokens, adapters))


def _all_different(row: Row, most_tokens: int) -> bool:
    return bool(row["workload"] == EQUAL and row["adapters"] == row["tokens"] <= most_tokens)


def _belongs(row: Row, name: str, way: str) -> bool:
    """Whether this is a point for that way: it needs the fewer FLOPs."""
    if row["workload"] != EQUAL or name not in row["times_us"]:
        return False
    work = row["work"]
    return bool(work[way]["flops"] <= min(work["expand"]["flops"], work["modulate"]["flops"]))


def section(rows: Sequence[Row]) -> str:
    """Setup, the ratios to the base, every point, the dense way, the workloads and the bars."""
    points = of_kind(rows, "kernels")
    equal = [row for row in points if row["workload"] == EQUAL]
    parts = [setup_line(points[-1]), _ceilings_line(points)]
    parts.append("The delta's time over the base GEMM's, layers H_in x H_out:\n\n" + _summary_table(equal, _own))
    if any(SINGLE_PASS in row["over_base"] for row in equal):
        words = (
            "Base product and delta in one pass over the weight, over the base GEMM's time (1.00: the delta is free):"
        )
        parts.append(f"{words}\n\n{_summary_table(equal, lambda row: SINGLE_PASS)}")
    for layer in dict.fromkeys(row["layer"] for row in equal):
        here = [row for row in equal if row["layer"] == layer]
        summary = f"<summary>{layer}: all {len(here)} points, microseconds</summary>"
        parts.append(f"<details>{summary}\n\n{_layer_table(here)}\n\n</details>")
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
        parts.append(f"{words}\n\n{_workload_table(others)}")
    return "\n\n".join([*parts, bar_table(rows)])


def _ceilings_line(rows: Sequence[Row]) -> str:
    bandwidth = sorted(row["ceilings"]["bytes_per_s"] / 1e9 for row in rows)
    rate = sorted(row["ceilings"]["flops_per_s"] / 1e12 for row in rows)
    threads = f", {rows[0]['threads']} threads" if rows[0]["device"] == "cpu" else ""
    speeds = f"{_range(bandwidth, 0)} GB/s, {_range(rate, 2)} TFLOP/s"
    disturbed = sum(row["waiting"] > MOST_WAITING for row in rows)
    noted = (
        f" The machine had other work: at {disturbed} of {len(rows)} points (†) a thread waited for a core "
        f"during more than {MOST_WAITING:.0%} of the time."
    )
    return f"Ceilings measured at the start of each run{threads}: {speeds}." + (noted if disturbed else "")


def _summary_table(rows: Iterable[Row], candidate: Callable[[Row], str]) -> str:
    """Ratio to the base GEMM: a line per layer and (r, K), a column per batch."""
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        where = {head: cell.format_map(row) for head, cell in WHAT.items()}
        ratio = row["over_base"].get(candidate(row))
        line = lines.setdefault(tuple(where.values()), {**where, **dict.fromkeys(BATCHES, "-")})
        line[row["tokens"], row["adapters"]] = "-" if ratio is None else f"{ratio:.2f}"
    heads = {batch: f"{batch[0]:,} of {batch[1] if batch[1] > 1 else 'one'}" for batch in BATCHES}
    columns = {head: f"{{{head}}}" for head in WHAT}
    return table(
        columns | {head: lambda row, batch=batch: row[batch] for batch, head in heads.items()}, list(lines.values())
    )


def _workload_table(rows: Sequence[Row]) -> str:
    """A line per (r, K) and workload, a column per number of tokens."""
    lines: dict[tuple[object, ...], Row] = {}
    for row in rows:
        line = lines.setdefault((row["rank"], row["blocks"], row["workload"]), dict(row))
        line[f"T={row['tokens']}"] = row["over_base"][_own(row)]
    columns: dict[str, Any] = {"(r, K)": WHAT["(r, K)"], "workload": "{workload}"}
    columns |= {f"T={tokens}": f"{{T={tokens}:.2f}}" for tokens in sorted({row["tokens"] for row in rows})}
    return table(columns, list(lines.values()))


def _layer_table(rows: Sequence[Row]) -> str:
    """Times in microseconds, share of the floor, and ratios to the base GEMM."""
    own = _own(rows[0])

    def us(*names: str) -> Columns:
        return {names[-1]: lambda row: _us(row, names[0])}

    columns = {
        "(r, K)": WHAT["(r, K)"],
        "T, adapters": lambda row: f"{row['tokens']:,}, {row['adapters'] or 'none'}" + _dagger(row),
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


def _dagger(row: Row) -> str:
    return " †" if row["waiting"] > MOST_WAITING else ""


def _median(row: Row, name: str) -> float:
    return float(row["times_us"][name]["median"])


def _us(row: Row, name: str) -> str:
    return _us_words(_median(row, name)) if name in row["times_us"] else "-"


def _us_words(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _range(values: Sequence[float], digits: int) -> str:
    low, high = f"{values[0]:.{digits}f}", f"{values[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"
